"""How blockwise attention cuts a call: chunks of heads that share tiles, and visits to parts of the logits.

A chunk is ``batch_chunk`` batch entries by ``head_chunk`` key heads whose tiles are computed together; it is one batch
entry or whole batch entries. A pass walks the rows of tiles (forward) or the columns (backward). In each it visits the
tiles that the block map lists one by one, or, where all of them lie in a narrow band, the whole band at once: small
products and short loops cost a CPU more than a few masked keys. Forward on a CPU, a row whose tiles turn out to lie
close together (packed documents) is seen at once too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maskformer import masks
from maskformer.attention import platform
from maskformer.attention.arguments import fill

# Keys (or queries) of the widest band that is visited at once.
BAND = 768

# Where only the run knows how many blocks a row has: those that it is seen at once by, and the keys they may have.
WIDTHS, WIDEST = (1, 2, 4, 6, 8), 1024

# Logits held at once. Smaller tiles leave the CPU's matmul short of work, larger ones leave its caches.
TILE_LOGITS = 8 * 256 * 512


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static sizes of one pass. ``groups`` is query heads per key head, ``visit`` the (queries, keys) seen at once."""

    batch: int
    kv_heads: int
    groups: int
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    visit: tuple[int, int]
    batch_chunk: int
    head_chunk: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Blocks of keys by which a row may be seen at once, on a CPU; none where the blocks are large."""
        fitting = tuple(width for width in WIDTHS if width * self.block_kv <= WIDEST and width <= self.kv_blocks)
        return fitting if 4 * self.block_kv <= WIDEST and platform.current() == "cpu" else ()

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_kv)

    @property
    def chunks(self) -> int:
        return self.batch // self.batch_chunk * (self.kv_heads // self.head_chunk)

    def origin(self, chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First batch entry and first query head of a chunk."""
        across = self.kv_heads // self.head_chunk
        return chunk // across * self.batch_chunk, chunk % across * self.head_chunk * self.groups

    def pad_queries(self, x: jax.Array) -> jax.Array:
        """[batch, q_len, ...] padded to whole blocks."""
        return fill(x, 1, self.q_blocks * self.block_q)

    def pad_keys(self, x: jax.Array) -> jax.Array:
        """[batch, kv_len, ...] padded to whole blocks."""
        return fill(x, 1, self.kv_blocks * self.block_kv)

    def pad_bias(self, bias: jax.Array) -> jax.Array:
        """Pads the q and k axes that a bias has to whole blocks."""
        for axis, size in ((2, self.q_blocks * self.block_q), (3, self.kv_blocks * self.block_kv)):
            bias = fill(bias, axis, size) if bias.shape[axis] > 1 else bias
        return bias


def plan(
    batch: int,
    kv_heads: int,
    groups: int,
    lengths: tuple[int, int],
    block_map: masks.BlockMap,
    *,
    transposed: bool,
) -> Layout:
    """Chunks as large as shared tiles (a map of shape 1) and `TILE_LOGITS` allow."""
    block_q, block_kv = block_map.block_q, block_map.block_kv
    blocks = band_blocks(block_map, transposed=transposed) or 1
    visit = (block_q * blocks, block_kv) if transposed else (block_q, block_kv * blocks)
    room = max(1, TILE_LOGITS // (groups * visit[0] * visit[1]))
    head_chunk = _divisor(kv_heads, room) if block_map.shape[1] == 1 else 1
    whole_entries = head_chunk == kv_heads and block_map.shape == (1, 1)
    batch_chunk = _divisor(batch, room // kv_heads) if whole_entries else 1
    return Layout(batch, kv_heads, groups, *lengths, block_q, block_kv, visit, batch_chunk, head_chunk)


def band_blocks(block_map: masks.BlockMap, *, transposed: bool) -> int | None:
    """Blocks of the band that each row is seen at once by; None where its tiles are visited one by one.

    Only a band that is known: traced segments may leave most of the tiles that a window allows empty.
    """
    band = block_map.band_t if transposed else block_map.band
    size = block_map.block_q if transposed else block_map.block_kv
    return None if band is None or band.reach * size > BAND else band.reach


@dataclasses.dataclass(frozen=True)
class Walk:
    """The visits of each row of tiles of one batch entry and head; of each column, if transposed.

    Attributes:
      full, partial: ``(start, count, index)`` of the block map's lists.
      first: [rows], where the band begins; None where tiles are visited one by one.
      size, blocks: of a block in the direction of the visits, and how many there are.
      every_row: no row of the band is empty, so none is asked.
    """

    full: tuple[jax.Array, jax.Array, jax.Array]
    partial: tuple[jax.Array, jax.Array, jax.Array]
    first: jax.Array | None
    size: int
    blocks: int
    every_row: bool

    @property
    def banded(self) -> bool:
        """Whether a row has one visit of its whole band, or none."""
        return self.first is not None

    @classmethod
    def of(cls, block_map: masks.BlockMap, entry: tuple[Any, Any], *, transposed: bool) -> Walk:
        lists = (block_map.full_t, block_map.partial_t) if transposed else (block_map.full, block_map.partial)
        band = block_map.band_t if transposed else block_map.band
        size = block_map.block_q if transposed else block_map.block_kv
        blocks = block_map.grid[not transposed]
        full, partial = (tuple(jnp.asarray(x)[entry] for x in (kind.start, kind.count, kind.index)) for kind in lists)
        if band is None or band_blocks(block_map, transposed=transposed) is None:
            return cls(full, partial, None, size, blocks, False)
        return cls(full, partial, jnp.asarray(band.first)[entry], size, blocks, band.every_row)

    def band_start(self, row: jax.Array) -> jax.Array:
        """Where the visit of a row's band begins."""
        assert self.first is not None
        return self.first[row] * self.size

    def span(self, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first block of a row's tiles, and the number of blocks from it to the last; 0 if it has none."""
        firsts, lasts = [], []
        for start, count, index in (self.full, self.partial):
            some = count[row] > 0
            firsts.append(jnp.where(some, index[start[row]], self.blocks))
            lasts.append(jnp.where(some, index[start[row] + count[row] - 1], -1))
        first = jnp.minimum(*firsts)
        return first, jnp.maximum(jnp.maximum(*lasts) - first + 1, 0)

    def start(self, first: jax.Array, width: int) -> jax.Array:
        """Where a visit of so many blocks begins that has the block ``first`` in it."""
        return jnp.minimum(first, self.blocks - width) * self.size

    def fold(self, row: jax.Array, visit: Callable[..., Any], carry: Any) -> Any:
        """``carry`` after ``visit(start, carry, masked)`` of all that the row has to visit."""
        if self.banded:
            start = self.band_start(row)
            if self.every_row:
                return visit(start, carry, masked=True)
            # A loop of one turn or none: a conditional would copy what it carries, the gradient of all queries.
            busy = (self.full[1][row] + self.partial[1][row] > 0).astype(jnp.int32)
            return jax.lax.fori_loop(0, busy, lambda _, carry: visit(start, carry, masked=True), carry)
        for (start, count, index), masked in ((self.full, False), (self.partial, True)):
            carry = jax.lax.fori_loop(
                start[row],
                start[row] + count[row],
                lambda i, carry, index=index, masked=masked: visit(index[i] * self.size, carry, masked=masked),
                carry,
            )
        return carry


def cut(array: jax.Array, starts, sizes) -> jax.Array:
    """The tile of a broadcastable array: axes of size 1 stay whole, the others are sliced."""
    whole = [size == 1 for size in array.shape]
    starts = [jnp.int32(0) if one else start for one, start in zip(whole, starts, strict=True)]
    sizes = [1 if one else size for one, size in zip(whole, sizes, strict=True)]
    return jax.lax.dynamic_slice(array, starts, sizes)


def add_cut(array: jax.Array, tile: jax.Array, starts) -> jax.Array:
    """Adds a tile back where `cut` took it, summed over the axes on which ``array`` broadcasts."""
    tile = tile.astype(array.dtype)
    starts = [jnp.int32(0) if size == 1 else start for size, start in zip(array.shape, starts, strict=True)]
    old = jax.lax.dynamic_slice(array, starts, tile.shape)
    return jax.lax.dynamic_update_slice(array, old + tile, starts)


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``, and at least 1."""
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(1, limit))
