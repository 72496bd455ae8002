"""How blockwise attention cuts a call: chunks of heads that share tile lists, and blocks of the sequence.

A chunk is ``batch_chunk`` batch entries by ``head_chunk`` key heads whose tiles are computed together; it is one batch
entry or whole batch entries, so that chunks are contiguous. Within a chunk, arrays are heads-first
``[batch_chunk, head_chunk, (groups,) length, dim]`` with the length padded to whole blocks.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# Logits held at once. Smaller tiles leave the CPU's matmul short of work, larger ones leave its caches.
TILE_LOGITS = 8 * 256 * 512


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static sizes of one blockwise call. ``groups`` is query heads per key head."""

    batch: int
    kv_heads: int
    groups: int
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    batch_chunk: int
    head_chunk: int

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
        return _pad(x, 1, self.q_blocks * self.block_q)

    def pad_keys(self, x: jax.Array) -> jax.Array:
        """[batch, kv_len, ...] padded to whole blocks."""
        return _pad(x, 1, self.kv_blocks * self.block_kv)

    def split_queries(self, x: jax.Array) -> jax.Array:
        """[batch, q_len, heads, dim] -> [chunks, batch_chunk, head_chunk, groups, q_blocks * block_q, dim]."""
        x = x.reshape(self.batch, self.q_len, self.kv_heads, self.groups, x.shape[-1]).transpose(0, 2, 3, 1, 4)
        return self._split(_pad(x, 3, self.q_blocks * self.block_q))

    def split_keys(self, x: jax.Array) -> jax.Array:
        """[batch, kv_len, kv_heads, dim] -> [chunks, batch_chunk, head_chunk, kv_blocks * block_kv, dim]."""
        return self._split(_pad(x.transpose(0, 2, 1, 3), 2, self.kv_blocks * self.block_kv))

    def join_queries(self, x: jax.Array) -> jax.Array:
        """The inverse of `split_queries`."""
        x = self._join(x)[:, :, :, : self.q_len].transpose(0, 3, 1, 2, 4)
        return x.reshape(self.batch, self.q_len, self.kv_heads * self.groups, x.shape[-1])

    def join_keys(self, x: jax.Array) -> jax.Array:
        """The inverse of `split_keys`."""
        return self._join(x)[:, :, : self.kv_len].transpose(0, 2, 1, 3)

    def _split(self, x: jax.Array) -> jax.Array:
        b, h = self.batch_chunk, self.head_chunk
        x = x.reshape(self.batch // b, b, self.kv_heads // h, h, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(self.chunks, b, h, *x.shape[4:])

    def _join(self, x: jax.Array) -> jax.Array:
        b, h = self.batch_chunk, self.head_chunk
        x = x.reshape(self.batch // b, self.kv_heads // h, b, h, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(self.batch, self.kv_heads, *x.shape[4:])


def plan(
    batch: int,
    kv_heads: int,
    groups: int,
    lengths: tuple[int, int],
    block: tuple[int, int],
    mask_shape: tuple[int, int],
) -> Layout:
    """Chunks as large as shared tile lists (``mask_shape`` of 1) and `TILE_LOGITS` allow."""
    room = max(1, TILE_LOGITS // (groups * block[0] * block[1]))
    head_chunk = _divisor(kv_heads, room) if mask_shape[1] == 1 else 1
    whole_entries = head_chunk == kv_heads and mask_shape == (1, 1)
    batch_chunk = _divisor(batch, room // kv_heads) if whole_entries else 1
    return Layout(batch, kv_heads, groups, *lengths, *block, batch_chunk, head_chunk)


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


def pad_bias(bias: jax.Array, layout: Layout) -> jax.Array:
    """Pads the q and k axes that a bias has to whole blocks."""
    if bias.shape[2] > 1:
        bias = _pad(bias, 2, layout.q_blocks * layout.block_q)
    if bias.shape[3] > 1:
        bias = _pad(bias, 3, layout.kv_blocks * layout.block_kv)
    return bias


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    missing = size - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``, and at least 1."""
    return max(d for d in range(1, number + 1) if number % d == 0 and d <= max(1, limit))
