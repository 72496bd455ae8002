"""Ragged lists of tiles: one array for all rows, as long as the tiles there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileLists:
    """For each row of tiles, the columns to visit, ascending: ``index[start[row] : start[row] + count[row]]``.

    The rows lie end to end in ``index``, so that one row that sees everything (a global token) costs its own tiles
    and does not widen the others. What lies between them is 0 and means nothing.

    Attributes:
      start: int32 ``[batch | 1, heads | 1, rows]``, where each row begins in ``index``.
      count: int32 ``[batch | 1, heads | 1, rows]``, how many columns it has.
      index: int32 ``[batch | 1, heads | 1, size]``, size >= 1.
      width: static; no row has more columns. Like the size of ``index`` it may differ from one packing to the next: to
        share a compilation between packings, pass the mask into ``jit`` and make the map inside.
    """

    start: Any
    count: Any
    index: Any
    width: int = dataclasses.field(metadata={"static": True})

    def padded(self) -> Any:
        """int32 ``[batch | 1, heads | 1, rows, max(width, 1)]``; past ``count`` a row repeats its last column, or 0."""
        xp = jnp if any(isinstance(x, jax.core.Tracer) for x in (self.count, self.index)) else np
        start, count, index = (xp.asarray(x) for x in (self.start, self.count, self.index))
        slot = xp.minimum(np.arange(max(self.width, 1), dtype=np.int32), xp.maximum(count - 1, 0)[..., None])
        place = xp.minimum(start[..., None] + slot, index.shape[-1] - 1)
        columns = xp.take_along_axis(index, place.reshape(*place.shape[:2], -1), axis=-1).reshape(place.shape)
        return xp.where(count[..., None] > 0, columns, 0)

    def pairs(self, batch: int = 0, head: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The ``(rows, columns)`` of one entry's tiles, row by row. For concrete lists."""
        start, count, index = (np.asarray(x)[batch, head] for x in (self.start, self.count, self.index))
        return np.repeat(np.arange(count.size), count), index[_ranges(start, count)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Band:
    """Where a row's tiles lie, full and partial, in a map of known arrays: among ``reach`` consecutive columns.

    Attributes:
      first: int32 ``[batch | 1, heads | 1, rows]``, the first of those columns; the last is inside the grid.
      reach: static, 1 or more; the same for all rows.
      every_row: static; whether every row has a tile.
    """

    first: Any
    reach: int = dataclasses.field(metadata={"static": True})
    every_row: bool = dataclasses.field(metadata={"static": True})


def listed(pairs: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], grid: tuple[int, int]) -> TileLists:
    """The lists of ``(rows, columns)`` in any order, for each batch entry and head."""
    count = np.array([[np.bincount(rows, minlength=grid[0]) for rows, _ in row] for row in pairs], np.int32)
    start = np.cumsum(count, axis=-1, dtype=np.int32) - count
    index = np.zeros((*count.shape[:2], max(1, int(count.sum(-1).max(initial=0)))), np.int32)
    for b, row in enumerate(pairs):
        for h, (rows, columns) in enumerate(row):
            index[b, h, : rows.size] = columns[np.lexsort((columns, rows))]
    return TileLists(start, count, index, int(count.max(initial=0)))


def band(lists: Sequence[TileLists], columns: int) -> Band:
    """The band of the union of concrete lists."""
    low, high = np.int32(columns), np.int32(-1)
    for entry in lists:
        last = np.minimum(entry.start + np.maximum(entry.count - 1, 0), entry.index.shape[-1] - 1)
        begin = np.minimum(entry.start, last)
        ends = (np.take_along_axis(entry.index, place, axis=-1) for place in (begin, last))
        for_low, for_high = (np.where(entry.count > 0, end, rest) for end, rest in zip(ends, (columns, -1)))
        low, high = np.minimum(low, for_low), np.maximum(high, for_high)
    reach = max(1, int((high - low).max(initial=0)) + 1)
    return Band(np.minimum(low, columns - reach).astype(np.int32), reach, bool((high >= 0).all()))


def compacted(flags: jax.Array, rows: jax.Array, columns: jax.Array, candidates: TileLists) -> TileLists:
    """Of one entry's concrete candidates ``(rows, columns)``, in their order, those flagged: bool ``[size]``.

    The lists come without the leading axes.
    """
    start, count = jnp.asarray(candidates.start[0, 0]), candidates.count[0, 0]
    size = candidates.index.shape[-1]
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(flags, dtype=jnp.int32)])
    first = before[start]
    # A flagged candidate moves to its row's start, past the flagged ones before it in the row; the others fall off.
    place = jnp.where(flags, start[rows] + before[:-1] - first[rows], size)
    kept = jnp.zeros(size, jnp.int32).at[place].set(columns, mode="drop")
    return TileLists(start, before[start + count] - first, kept, candidates.width)


def stacked(entries: Sequence[TileLists]) -> TileLists:
    """``[batch, heads, ...]`` from the ``[batch, ...]`` lists of each head."""
    size = max(entry.index.shape[-1] for entry in entries)
    index = [jnp.pad(entry.index, ((0, 0), (0, size - entry.index.shape[-1]))) for entry in entries]
    return TileLists(
        jnp.stack([entry.start for entry in entries], axis=1),
        jnp.stack([entry.count for entry in entries], axis=1),
        jnp.stack(index, axis=1),
        max(entry.width for entry in entries),
    )


def _ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """``start[0], start[0] + 1, ...`` for ``count[0]`` numbers, then those of the next row."""
    return np.arange(count.sum()) + np.repeat(start - (np.cumsum(count) - count), count)
