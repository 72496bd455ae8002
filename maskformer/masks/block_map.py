"""Which tiles of the attention matrix a mask leaves empty, fills, or cuts through."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.masks.composites import PerHead, Shift
from maskformer.masks.expression import Mask
from maskformer.masks.intervals import BOTH, Analysis
from maskformer.masks.tiles import Found, Programs, bounds, search, tile_set


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileLists:
    """For each row of tiles, the columns to visit, ascending.

    Attributes:
      count: int32 ``[batch | 1, heads | 1, rows]``, how many entries of ``index`` are valid.
      index: int32 ``[batch | 1, heads | 1, rows, width]``, width >= 1; entries past ``count`` repeat the last
        valid one (or are 0), so that a loop over the whole width reads nothing new.
    """

    count: Any
    index: Any


@dataclasses.dataclass(frozen=True)
class BlockMap:
    """The tiles that attention under a mask has to visit, and how.

    Tiles in no list are empty: nothing in them attends. ``full`` tiles attend everywhere and lie wholly inside
    ``q_len x kv_len``, so they need no mask. The rest are ``partial``: evaluate the mask there. A tile that
    hangs over the end of the sequence is never full.

    Attributes:
      partial, full: rows are q-blocks, entries kv-blocks (the forward pass and dQ).
      partial_t, full_t: the same tiles with rows kv-blocks and entries q-blocks (dK and dV).
      q_len, kv_len, block_q, block_kv: static ints.
      q_offset: the position of query 0; static where it was given as an int.
      widened: what the analysis had no rule for, e.g. ``"sort in predicate(fn)"``; such tiles are partial.
    """

    partial: TileLists
    full: TileLists
    partial_t: TileLists
    full_t: TileLists
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    q_offset: Any = 0
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
        widths = np.full(self.grid[1], self.block_kv, np.float64 if xp is np else np.float32)
        widths[-1] = self.kv_len - self.block_kv * (self.grid[1] - 1)
        heights = np.full(self.grid[0], self.block_q, widths.dtype)
        heights[-1] = self.q_len - self.block_q * (self.grid[0] - 1)
        area = 0.0
        for lists in (self.partial, self.full):
            valid = xp.arange(lists.index.shape[-1]) < lists.count[..., None]
            width = xp.where(valid, xp.asarray(widths)[lists.index], 0.0).sum(-1)
            area = area + (width * heights).sum(-1)
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
        for value, lists in ((1, self.partial), (2, self.full)):
            index, count = np.asarray(lists.index), np.asarray(lists.count)
            *where, slot = np.nonzero(np.arange(index.shape[-1]) < count[..., None])
            kinds[(*where, index[(*where, slot)])] = value
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


def _flatten(block_map: BlockMap) -> tuple[Any, Any]:
    # An offset that is traced travels as data, one that is an int stays static.
    static_offset = block_map.q_offset if isinstance(block_map.q_offset, int) else None
    lists = (block_map.partial, block_map.full, block_map.partial_t, block_map.full_t)
    children = lists + (() if static_offset is not None else (block_map.q_offset,))
    sizes = (block_map.q_len, block_map.kv_len, block_map.block_q, block_map.block_kv)
    return children, (sizes, static_offset, block_map.widened)


def _unflatten(static: Any, children: Any) -> BlockMap:
    sizes, offset, widened = static
    return BlockMap(*children[:4], *sizes, q_offset=children[4] if offset is None else offset, widened=widened)


jax.tree_util.register_pytree_node(BlockMap, _flatten, _unflatten)


def block_map(mask: Mask, q_len: int, kv_len: int, block: int | tuple[int, int], q_offset: Any = 0) -> BlockMap:
    """Classifies the tiles of a mask as empty, full or partial, without ever forming the matrix.

    Interval analysis of the predicate (see ``maskformer.masks.intervals``): sound, so a tile in no list attends
    nowhere and a full one everywhere; a partial one may be either.

    With concrete arrays this runs on the host, coarse tiles first, and the lists are as narrow as the mask
    allows; the arrays of the map are NumPy's. With traced arrays (under ``jit``) the host search takes them as
    unknown and bounds the width of the lists, and the rest is a traced computation on those candidates: memory
    follows what the static parts of the mask leave, e.g. O(length) under a window.

    Args:
      mask: the mask.
      q_len, kv_len: the number of queries and keys.
      block: the tile size, one int or ``(block_q, block_kv)``.
      q_offset: the position of query 0; an int, or traced.

    Raises:
      ValueError: for sizes below one, or arrays that do not cover the positions.
    """
    block_q, block_kv = (block, block) if isinstance(block, (int, np.integer)) else block
    for name, value in (("q_len", q_len), ("kv_len", kv_len), ("block_q", block_q), ("block_kv", block_kv)):
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"block_map: {name}={value!r}, expected a positive int")
    q_len, kv_len, block_q, block_kv = map(int, (q_len, kv_len, block_q, block_kv))
    q_offset = int(q_offset) if isinstance(q_offset, (int, np.integer)) else q_offset
    mask.check_lengths(q_len, kv_len, q_offset)
    shifted = mask if isinstance(q_offset, int) and q_offset == 0 else Shift(mask, q_offset, 0)

    programs = Programs()
    build = _Builder(q_len, kv_len, (block_q, block_kv), programs)
    lists = build.static(shifted) if _is_static(shifted, programs) else build.traced(shifted)
    partial, full, partial_t, full_t = lists
    sizes = dict(q_len=q_len, kv_len=kv_len, block_q=block_q, block_kv=block_kv)
    widened = tuple(sorted(build.widened))
    return BlockMap(partial, full, partial_t, full_t, **sizes, q_offset=q_offset, widened=widened)


def _is_static(mask: Mask, programs: Programs) -> bool:
    """Whether every array is known now, those that predicates close over included."""
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(mask)):
        return False
    leaves = mask.select(0, 0).leaves()
    return not any(isinstance(const, jax.core.Tracer) for leaf in leaves for const in programs.of(leaf)[0].consts)


class _Builder:
    def __init__(self, q_len: int, kv_len: int, block: tuple[int, int], programs: Programs):
        self.q_len, self.kv_len, self.block, self.programs = q_len, kv_len, block, programs
        self.grid = (-(-q_len // block[0]), -(-kv_len // block[1]))
        self.widened: set[str] = set()

    def search(self, mask: Mask) -> Found:
        found = search(mask, self.q_len, self.kv_len, self.block, self.programs)
        self.widened |= found.widened
        return found

    # --- arrays known: all on the host ----------------------------------------------------------------------

    def static(self, mask: Mask) -> list[TileLists]:
        batch, heads = mask.shape
        mask = jax.tree.map(np.asarray, mask)
        found = [[self.search(mask.select(b, h).sharpen()) for h in range(heads)] for b in range(batch)]
        lists = []
        for transposed in (False, True):
            for kind in ("partial", "full"):
                pairs = [[getattr(entry, kind) for entry in row] for row in found]
                if transposed:
                    pairs = [[(columns, rows) for rows, columns in row] for row in pairs]
                host = _host_lists(pairs, self.grid[::-1] if transposed else self.grid)
                lists.append(TileLists(host.count, host.index))
        return lists

    # --- arrays traced --------------------------------------------------------------------------------------

    def traced(self, mask: Mask) -> list[TileLists]:
        batch, heads = mask.shape
        if _has_per_head(mask):
            per_head = [self.over_batch(mask, batch, h) for h in range(heads)]
            return [_stack_heads(lists) for lists in zip(*per_head)]
        if heads == 1:
            per_head = [self.over_batch(mask, batch, 0)]
            return [_stack_heads(lists) for lists in zip(*per_head)]
        over_heads = jax.vmap(lambda h: self.over_batch(mask, batch, h), out_axes=1)
        return over_heads(jnp.arange(heads))

    def over_batch(self, mask: Mask, batch: int, h: Any) -> list[TileLists]:
        """``[batch, ...]`` lists of one head."""
        if batch == 1:
            return jax.tree.map(lambda x: x[None], self.one(mask.select(0, h)))
        return jax.vmap(lambda b: self.one(mask.select(b, h)))(jnp.arange(batch))

    def one(self, mask: Mask) -> list[TileLists]:
        """The lists of a mask of shape ``(1, 1)``: candidates on the host, then their class as traced values."""
        mask = mask.sharpen()
        found = self.search(mask)
        rows = np.concatenate([found.partial[0], found.full[0]])
        columns = np.concatenate([found.partial[1], found.full[1]])
        dense = rows.size * 2 > self.grid[0] * self.grid[1]
        if dense:
            shape = np.arange(self.grid[0])[:, None], np.arange(self.grid[1])[None, :]
            wanted = np.zeros(self.grid, bool)
            wanted[rows, columns] = True
        else:
            candidates = _host_lists([[(rows, columns)]], self.grid)
            index, count = candidates.index[0, 0], candidates.count[0, 0]
            shape = np.arange(self.grid[0])[:, None], index
            wanted = np.arange(index.shape[1]) < count[:, None]
        tiles = tile_set(jnp, (self.q_len, self.kv_len), self.block, *shape)
        result = Analysis(tiles).expand(bounds(mask, tiles, self.programs, self.widened), BOTH)
        inside = wanted & self.inside(*shape)
        full = jnp.broadcast_to(result.lo, wanted.shape) & inside
        partial = jnp.broadcast_to(result.hi, wanted.shape) & wanted & ~full
        columns_of = np.broadcast_to(shape[1], wanted.shape).astype(np.int32)
        if dense:
            rows_of = np.broadcast_to(np.arange(self.grid[0], dtype=np.int32)[None, :], self.grid[::-1])
            turned = [partial.T, full.T]
        else:
            # The candidates by column: for each, its row and its slot in that row's list.
            slots = np.broadcast_to(np.arange(wanted.shape[1]), wanted.shape)[wanted]
            row_ids = np.broadcast_to(shape[0], wanted.shape)[wanted]
            turned_lists = _host_lists([[(columns_of[wanted], row_ids)]], self.grid[::-1], extra=slots)
            rows_of, slot_of = turned_lists.index[0, 0], turned_lists.extra[0, 0]
            valid = np.arange(rows_of.shape[1]) < turned_lists.count[0, 0][:, None]
            turned = [flags[rows_of, slot_of] & valid for flags in (partial, full)]
        return [
            _compact(partial, columns_of),
            _compact(full, columns_of),
            _compact(turned[0], rows_of),
            _compact(turned[1], rows_of),
        ]

    def inside(self, rows: Any, columns: Any) -> np.ndarray:
        """Tiles that do not hang over an end."""
        return ((rows + 1) * self.block[0] <= self.q_len) & ((columns + 1) * self.block[1] <= self.kv_len)


@dataclasses.dataclass(frozen=True)
class _HostLists(TileLists):
    extra: Any = None


def _host_lists(pairs: Sequence[Sequence[tuple[Any, Any]]], grid: tuple[int, int], extra: Any = None) -> _HostLists:
    """Padded lists from ``(rows, columns)`` for each batch entry and head; ``extra`` rides along with the columns."""
    counts = np.array([[np.bincount(rows, minlength=grid[0]) for rows, _ in row] for row in pairs], np.int32)
    width = max(1, int(counts.max(initial=0)))
    index = np.zeros(counts.shape + (width,), np.int32)
    riding = np.zeros_like(index) if extra is not None else None
    for b, row in enumerate(pairs):
        for h, (rows, columns) in enumerate(row):
            order = np.argsort(rows.astype(np.int64) * grid[1] + columns)
            rows, columns = rows[order], columns[order]
            count = counts[b, h]
            slot = np.arange(rows.size) - np.repeat(np.cumsum(count) - count, count)
            index[b, h, rows, slot] = columns
            if riding is not None:
                riding[b, h, rows, slot] = extra[order]
    last = np.take_along_axis(index, np.maximum(counts - 1, 0)[..., None], axis=-1)
    index = np.where(np.arange(width) < counts[..., None], index, last)
    return _HostLists(counts, index, riding)


def _compact(flags: jax.Array, values: np.ndarray) -> TileLists:
    """The flagged values of each row, ascending as they come, moved to the front."""
    end = np.int32(np.iinfo(np.int32).max)
    count = flags.sum(-1, dtype=jnp.int32)
    index = jnp.sort(jnp.where(flags, values, end), axis=-1)
    last = jnp.max(jnp.where(flags, values, 0), axis=-1, keepdims=True)
    return TileLists(count, jnp.where(index == end, last, index))


def _stack_heads(lists: Sequence[TileLists]) -> TileLists:
    """``[batch, heads, ...]`` from lists of each head, whose widths may differ."""
    width = max(entry.index.shape[-1] for entry in lists)
    index = [
        jnp.pad(entry.index, [(0, 0), (0, 0), (0, width - entry.index.shape[-1])], mode="edge") for entry in lists
    ]
    return TileLists(jnp.stack([entry.count for entry in lists], axis=1), jnp.stack(index, axis=1))


def _has_per_head(mask: Mask) -> bool:
    return isinstance(mask, PerHead) or any(map(_has_per_head, mask.children()))


def _namespace(block_map: BlockMap) -> Any:
    traced = isinstance(block_map.partial.count, jax.core.Tracer)
    return jnp if traced else np
