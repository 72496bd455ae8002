"""Which tiles of the attention matrix a mask leaves empty, fills, or cuts through."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maskformer.masks.expression import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileLists:
    """For each row of tiles, the columns to visit, ascending.

    Attributes:
      count: int32 ``[batch | 1, heads | 1, rows]``, how many entries of ``index`` are valid.
      index: int32 ``[batch | 1, heads | 1, rows, width]``; entries past ``count`` repeat the last valid one (or 0).
    """

    count: Any
    index: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMap:
    """Tiles to visit. See TileLists; ``*_t`` are the transposes, rows being kv-blocks and entries q-blocks."""

    partial: TileLists
    full: TileLists
    partial_t: TileLists
    full_t: TileLists
    q_len: int = dataclasses.field(metadata=dict(static=True))
    kv_len: int = dataclasses.field(metadata=dict(static=True))
    block_q: int = dataclasses.field(metadata=dict(static=True))
    block_kv: int = dataclasses.field(metadata=dict(static=True))
    q_offset: Any = dataclasses.field(metadata=dict(static=True), default=0)


def _lists(flags: jax.Array) -> TileLists:
    width = flags.shape[-1]
    count = flags.sum(-1, dtype=jnp.int32)
    key = jnp.sort(jnp.where(flags, jnp.arange(width, dtype=jnp.int32), width), axis=-1)
    last = jnp.take_along_axis(key, jnp.maximum(count - 1, 0)[..., None], axis=-1)
    return TileLists(count, jnp.where(key < width, key, jnp.where(last < width, last, 0)))


def block_map(mask: Mask, q_len: int, kv_len: int, block: int | tuple[int, int], q_offset: Any = 0) -> BlockMap:
    """First, plain form: reduce the dense matrix."""
    block_q, block_kv = (block, block) if isinstance(block, int) else block
    rows, columns = -(-q_len // block_q), -(-kv_len // block_kv)
    matrix = mask.dense(q_len, kv_len, q_offset)
    matrix = matrix.reshape(mask.shape + (q_len, kv_len))
    pad = [(0, 0), (0, 0), (0, rows * block_q - q_len), (0, columns * block_kv - kv_len)]
    tiles = jnp.pad(matrix, pad).reshape(mask.shape + (rows, block_q, columns, block_kv))
    full = tiles.all((3, 5))
    partial = tiles.any((3, 5)) & ~full
    swap = lambda flags: jnp.swapaxes(flags, -1, -2)  # noqa: E731
    return BlockMap(
        _lists(partial), _lists(full), _lists(swap(partial)), _lists(swap(full)), q_len, kv_len, block_q, block_kv, q_offset
    )
