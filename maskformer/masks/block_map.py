"""Which tiles of the attention matrix a mask leaves empty, fills, or cuts through."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import shown
from maskformer.masks.builder_arguments import offset, whole_number
from maskformer.masks.tile_lists import Band, TileLists, band, compacted, listed, stacked
from maskformer.masks.tiles import Found, MaskLike, Programs, Reading, bounds, search, tile_set


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["partial", "full", "partial_t", "full_t", "band", "band_t"],
    meta_fields=["q_len", "kv_len", "block_q", "block_kv", "widened"],
)
@dataclasses.dataclass(frozen=True)
class BlockMap:
    """The tiles that attention under a mask has to visit, and how.

    Tiles in no list are empty: nothing in them attends. ``full`` tiles attend everywhere and lie wholly inside
    ``q_len x kv_len``, so they need no mask. The rest are ``partial``: evaluate the mask there. A tile that
    hangs over the end of the sequence is never full.

    Attributes:
      partial, full: rows are q-blocks, entries kv-blocks (the forward pass and dQ).
      partial_t, full_t: the same tiles with rows kv-blocks and entries q-blocks (dK and dV).
      band, band_t: the consecutive blocks among which a row's tiles lie; None where arrays are traced.
      q_len, kv_len, block_q, block_kv: static ints.
      widened: what the analysis had no rule for, e.g. ``"sort in predicate(fn)"``; such tiles are partial.
    """

    partial: TileLists
    full: TileLists
    partial_t: TileLists
    full_t: TileLists
    band: Band | None
    band_t: Band | None
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    widened: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """The number of q-blocks and kv-blocks."""
        return -(-self.q_len // self.block_q), -(-self.kv_len // self.block_kv)

    @property
    def shape(self) -> tuple[int, int]:
        """``(batch | 1, heads | 1)``."""
        return self.partial.count.shape[0], self.partial.count.shape[1]

    def sparsity(self) -> Any:
        """The share of tiles not visited, in ``[0, 1]``, over all batch entries and heads."""
        xp = _namespace(self)
        visited = xp.sum(self.partial.count.astype(np.float32)) + xp.sum(self.full.count.astype(np.float32))
        rows, columns = self.grid
        share = 1.0 - visited / (self.shape[0] * self.shape[1] * rows * columns)
        return float(share) if xp is np else share

    def active_area(self) -> Any:
        """Query-key pairs in visited tiles, ``[batch | 1, heads | 1]``; overhang is not counted."""
        xp = _namespace(self)
        rows, columns = self.grid
        heights = np.full(rows, self.block_q, np.float64 if xp is np else np.float32)
        heights[-1] = self.q_len - self.block_q * (rows - 1)
        overhang = columns * self.block_kv - self.kv_len
        area = 0.0
        for lists in (self.partial, self.full):
            # Columns ascend: only a row's last one can be the one that hangs over.
            place = xp.clip(lists.start + lists.count - 1, 0, lists.index.shape[-1] - 1)
            last = xp.take_along_axis(xp.asarray(lists.index), xp.asarray(place), axis=-1)
            cut = xp.where((lists.count > 0) & (last == columns - 1), overhang, 0)
            area = area + ((lists.count * self.block_kv - cut) * heights).sum(-1)
        return area

    def active_flops(
        self, head_dim: int, batch: int = 1, heads: int = 1, v_head_dim: int | None = None, backward: bool = False
    ) -> Any:
        """Floating-point operations of attention over the visited tiles.

        ``2 * area * (head_dim + v_head_dim)`` for each batch entry and head: the two products ``Q K^T`` and
        ``P V``, a multiply and an add each. ``batch`` and ``heads`` count where the map itself is shared.

        Args:
          head_dim: of queries and keys.
          batch, heads: of the attention; a map with its own must agree.
          v_head_dim: of values, if it differs.
          backward: adds the backward pass: five products for the forward's two.
        """
        for name, own, given in (("batch", self.shape[0], batch), ("heads", self.shape[1], heads)):
            if own != 1 and given not in (1, own):
                raise ValueError(f"active_flops({name}={given}): the block map has {name} {own}")
        times = (batch if self.shape[0] == 1 else 1) * (heads if self.shape[1] == 1 else 1)
        value_dim = head_dim if v_head_dim is None else v_head_dim
        forward = 2.0 * (head_dim + value_dim)
        # Backward: S again, dP = dO V^T, dV = P^T dO, dQ = dS K, dK = dS^T Q.
        per_pair = forward + (2.0 * (3 * head_dim + 2 * value_dim) if backward else 0.0)
        total = self.active_area().sum() * times * per_pair
        return float(total) if isinstance(total, (np.ndarray, np.generic, float)) else total

    def kinds(self) -> np.ndarray:
        """int8 ``[batch | 1, heads | 1, q_blocks, kv_blocks]``: 0 empty, 1 partial, 2 full. For concrete maps."""
        kinds = np.zeros(self.shape + self.grid, np.int8)
        for b, h in np.ndindex(*self.shape):
            for value, lists in ((1, self.partial), (2, self.full)):
                kinds[(b, h, *lists.pairs(b, h))] = value
        return kinds

    def to_string(self, batch: int = 0, head: int = 0) -> str:
        """A picture of one entry: full tiles ``█``, partial ``▒``, empty ``·``.

        >>> from maskformer import masks
        >>> print(masks.causal().block_map(64, 64, 16).to_string())
        ▒ · · ·
        █ ▒ · ·
        █ █ ▒ ·
        █ █ █ ▒
        """
        return "\n".join(" ".join("·▒█"[kind] for kind in row) for row in self.kinds()[batch, head])


def block_map(mask: MaskLike, q_len: int, kv_len: int, block: int | tuple[int, int], q_offset: Any = 0) -> BlockMap:
    """Classifies the tiles of a mask as empty, full or partial, without ever forming the matrix.

    Interval analysis of the predicate (see ``maskformer.masks.intervals``): sound, so a tile in no list attends
    nowhere and a full one everywhere; a partial one may be either.

    With concrete arrays this runs on the host, coarse tiles first, and the lists are as long as the mask has
    tiles; the arrays of the map are NumPy's. With traced arrays (under ``jit``) the host search takes them as
    unknown, and the rest is a traced computation on the candidates that it finds: memory follows what the static
    parts of the mask leave, e.g. O(length) under a window.

    Args:
      mask: the mask.
      q_len, kv_len: the number of queries and keys.
      block: the tile size, one int or ``(block_q, block_kv)``.
      q_offset: the position of query 0; an int, or traced.

    Raises:
      ValueError: for sizes below one, or arrays that do not cover the positions.
    """
    sizes = block if isinstance(block, (tuple, list)) else (block, block)
    if len(sizes) != 2:
        raise ValueError(f"block_map: block={shown(block)}, expected an int or (block_q, block_kv)")
    block_q, block_kv = (whole_number("block_map", "block", size, 1) for size in sizes)
    q_len, kv_len = whole_number("block_map", "q_len", q_len, 1), whole_number("block_map", "kv_len", kv_len, 1)
    q_offset = offset("block_map", "q_offset", q_offset)
    mask.check_lengths(q_len, kv_len, q_offset)

    programs = Programs()
    build = _Builder(q_len, kv_len, (block_q, block_kv), q_offset, programs)
    found = build.static(mask) if _is_static(mask, q_offset, programs) else build.traced(mask)
    widened = tuple(sorted(build.widened))
    return BlockMap(*found, q_len, kv_len, block_q, block_kv, widened=widened)


def _is_static(mask: MaskLike, q_offset: Any, programs: Programs) -> bool:
    """Whether every array is known now, those that predicates close over included."""
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves((mask, q_offset))):
        return False
    leaves = mask.select(0, 0).leaves()
    return not any(isinstance(const, jax.core.Tracer) for leaf in leaves for const in programs.of(leaf)[0].consts)


_Tiles = tuple[TileLists, TileLists, TileLists, TileLists, Band | None, Band | None]
"""partial, full, and both transposed; then the band of the rows and that of the columns, where they are known."""


class _Builder:
    def __init__(self, q_len: int, kv_len: int, block: tuple[int, int], q_offset: Any, programs: Programs):
        self.q_len, self.kv_len, self.block, self.programs = q_len, kv_len, block, programs
        self.q_offset = q_offset if isinstance(q_offset, (int, jax.core.Tracer)) else np.asarray(q_offset)
        self.grid = (-(-q_len // block[0]), -(-kv_len // block[1]))
        self.widened: set[str] = set()

    def search(self, mask: MaskLike) -> Found:
        found = search(mask, self.q_len, self.kv_len, self.block, self.programs, self.q_offset)
        self.widened |= found.widened
        return found

    # --- arrays known: all on the host ----------------------------------------------------------------------

    def static(self, mask: MaskLike) -> _Tiles:
        batch, heads = mask.shape
        mask = jax.tree.map(_on_host, mask)
        found = [[self.search(mask.select(b, h).sharpen()) for h in range(heads)] for b in range(batch)]
        kinds = [[[getattr(entry, kind) for entry in row] for row in found] for kind in ("partial", "full")]
        turned = [[[pair[::-1] for pair in row] for row in kind] for kind in kinds]
        partial, full = (listed(kind, self.grid) for kind in kinds)
        partial_t, full_t = (listed(kind, self.grid[::-1]) for kind in turned)
        bands = band([partial, full], self.grid[1]), band([partial_t, full_t], self.grid[0])
        return partial, full, partial_t, full_t, *bands

    # --- arrays traced --------------------------------------------------------------------------------------

    def traced(self, mask: MaskLike) -> _Tiles:
        batch, heads = mask.shape
        if heads > 1 and not mask.has_per_head:
            over_heads = jax.vmap(lambda h: self.over_batch(mask, batch, h), out_axes=1)
            return over_heads(jnp.arange(heads))
        # Heads of different kinds have lists of different sizes.
        partial, full, partial_t, full_t, *_ = zip(*(self.over_batch(mask, batch, h) for h in range(heads)))
        return stacked(partial), stacked(full), stacked(partial_t), stacked(full_t), None, None

    def over_batch(self, mask: MaskLike, batch: int, h: Any) -> _Tiles:
        """The tiles of one head, ``[batch, ...]``."""
        if batch == 1:
            return jax.tree.map(lambda x: jnp.asarray(x)[None], self.one(mask.select(0, h)))
        return jax.vmap(lambda b: self.one(mask.select(b, h)))(jnp.arange(batch))

    def one(self, mask: MaskLike) -> _Tiles:
        """The tiles of a mask of shape ``(1, 1)``: candidates on the host, then their class as traced values."""
        mask = mask.sharpen()
        found = self.search(mask)
        rows, columns = (np.concatenate(both) for both in zip(found.partial, found.full))
        by_row, by_column = listed([[(rows, columns)]], self.grid), listed([[(columns, rows)]], self.grid[::-1])
        pairs = by_row.pairs()
        order = jnp.asarray(np.lexsort(pairs), jnp.int32)
        # One constant each, however often they are read.
        rows, columns = (jnp.asarray(axis, jnp.int32) for axis in pairs)
        whole = 2 * rows.size > self.grid[0] * self.grid[1]
        # Of most of the grid, bounds of whole rows and columns of tiles are cheaper than those of each tile.
        axes = (np.arange(self.grid[0])[:, None], np.arange(self.grid[1])[None, :]) if whole else (rows, columns)
        tiles = tile_set(jnp, (self.q_len, self.kv_len), self.block, *axes)
        result = bounds(mask, Reading(tiles, self.programs, self.widened), self.q_offset)
        shape = np.broadcast_shapes(*(axis.shape for axis in axes))
        low, high = (jnp.broadcast_to(end, shape) for end in (result.lo, result.hi))
        if whole:
            low, high = low[rows, columns], high[rows, columns]
        full = low & self.inside(rows, columns)
        partial = high & ~full
        turned = columns[order], rows[order]
        lists = [compacted(flags, rows, columns, by_row) for flags in (partial, full)]
        lists_t = [compacted(flags[order], *turned, by_column) for flags in (partial, full)]
        return lists[0], lists[1], lists_t[0], lists_t[1], None, None

    def inside(self, rows: Any, columns: Any) -> np.ndarray:
        """Tiles that do not hang over an end."""
        return ((rows + 1) * self.block[0] <= self.q_len) & ((columns + 1) * self.block[1] <= self.kv_len)


def _on_host(array: Any) -> Any:
    """As NumPy's, but for PRNG keys, which have no such form."""
    is_key = isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return array if is_key else np.asarray(array)


def _namespace(block_map: BlockMap) -> Any:
    traced = isinstance(block_map.partial.count, jax.core.Tracer)
    return jnp if traced else np
