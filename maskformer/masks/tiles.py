"""Sets of tiles, and the search for the ones a mask touches: coarse tiles first, then their children."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import shown
from maskformer.masks import interval_rules
from maskformer.masks import interval_shapes as _register_the_other_rules  # noqa: F401
from maskformer.masks.intervals import BOTH, KEY, NEITHER, QUERY, Analysis, Interval

FAN_OUT = 4
"""A tile that is neither empty nor full is searched as 4 x 4 smaller ones."""


@dataclasses.dataclass(frozen=True)
class TileSet:
    """Some tiles of the ``q_blocks x kv_blocks`` grid.

    Attributes:
      xp: numpy, or jax.numpy where arrays are traced.
      q, k: the positions in each block, intervals of shape ``[q_blocks]`` and ``[kv_blocks]``.
      lengths: the number of queries and keys.
      block: the ``(q, kv)`` size of the finest tiles.
      finest: False for the coarse tiles of the search.
      tables: of the arrays read, shared by the levels of a search; their unit comes from the finest tiles.
      rows, columns: index arrays that together give the tiles' shape, e.g. both ``[n]`` for a list of tiles.
    """

    xp: Any
    q: Interval
    k: Interval
    lengths: tuple[int, int]
    block: tuple[int, int]
    finest: bool
    rows: Any
    columns: Any
    tables: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def expand(self, array: Any, depends: int) -> Any:
        """``[q_blocks, ...]`` or ``[kv_blocks, ...]`` to what broadcasts against ``[*tiles, ...]``."""
        if depends == BOTH:
            return array
        chosen = self.rows if depends == QUERY else self.columns
        if np.size(chosen) == array.shape[0] and not isinstance(chosen, jax.core.Tracer) and self._is_range(chosen):
            return self.xp.reshape(array, chosen.shape + array.shape[1:])
        return self.xp.asarray(array)[chosen]

    @staticmethod
    def _is_range(chosen: np.ndarray) -> bool:
        return chosen.ndim > 1 and bool((chosen.ravel() == np.arange(chosen.size)).all())

    def shape(self, depends: int) -> tuple[int, ...]:
        if depends == BOTH:
            return tuple(np.broadcast_shapes(self.rows.shape, self.columns.shape))
        return () if depends == NEITHER else ((self.q if depends == QUERY else self.k).lo.shape[0],)

    def lead(self, depends: int) -> int:
        return len(self.shape(depends))

    def unit(self, depends: int, size: int) -> int:
        """How many neighbours among ``size`` entries the positions of a finest tile read, if they read all in order.

        An array with fewer entries than there are positions has one for each chunk of them.
        """
        sides = {QUERY: [0], KEY: [1]}.get(depends, [0, 1])
        block, length = min(self.block[side] for side in sides), min(self.lengths[side] for side in sides)
        if size >= length:
            return block
        chunks = max(1, block * size // length)
        return 1 << (chunks.bit_length() - 1)


def tile_set(
    xp: Any,
    lengths: tuple[int, int],
    block: tuple[int, int],
    rows: Any,
    columns: Any,
    scale: int = 1,
    tables: dict[Any, Any] | None = None,
) -> TileSet:
    """Tiles of ``scale`` times the block size, clipped to the lengths."""
    ends = []
    for length, base, depends in zip(lengths, block, (QUERY, KEY)):
        size = base * scale
        start = np.arange(0, length, size, dtype=np.int32)
        ends.append(Interval(start, np.minimum(start + (size - 1), length - 1).astype(np.int32), depends))
    return TileSet(xp, ends[0], ends[1], lengths, block, scale == 1, rows, columns, {} if tables is None else tables)


# --- the bounds of a whole expression -----------------------------------------------------------------------


class MaskLike(Protocol):
    """What the analysis needs to know of a mask; see ``expression.Mask``."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(batch, heads)``."""

    @property
    def has_per_head(self) -> bool:
        """Whether heads follow different expressions."""

    def attend(self, q: Any, k: Any) -> Any:
        """The predicate."""

    def tile_bounds(self, reading: Reading) -> Interval:
        """``(all, any)`` on each tile."""

    def select(self, b: Any, h: Any) -> MaskLike:
        """The mask of one entry, of shape ``(1, 1)``."""

    def sharpen(self) -> MaskLike:
        """An equal mask that the analysis sees through better."""

    def leaves(self) -> Iterator[MaskLike]:
        """The masks it is made of that are made of no others."""

    def check_lengths(self, q_len: int, kv_len: int, q_offset: Any) -> None:
        """Raises where an array does not cover the positions."""


class Programs:
    """The jaxprs of the leaves met, each traced once per structure and shapes."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def of(self, leaf: MaskLike) -> tuple[Any, list[Any]]:
        """``(closed jaxpr, arrays)``; the jaxpr takes the leaf's arrays, then scalar positions q and k."""
        arrays, structure = jax.tree.flatten(leaf)
        avals = tuple(jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)) for a in arrays)
        key = (structure, tuple((aval.shape, aval.dtype) for aval in avals))
        if key not in self.known:
            self.known[key] = _trace(structure, avals)
        return self.known[key], arrays


def _trace(structure: Any, avals: tuple[Any, ...]) -> Any:
    position = jax.ShapeDtypeStruct((), np.int32)

    def program(arrays: Any, q: Any, k: Any) -> Any:
        return jnp.asarray(jax.tree.unflatten(structure, arrays).attend(q, k)).astype(bool)

    closed = jax.make_jaxpr(program)(list(avals), position, position)
    (out,) = closed.out_avals
    if out.shape != ():
        raise ValueError(
            f"mask {shown(jax.tree.unflatten(structure, avals))} gives shape {out.shape} for one query and one key: "
            "a predicate works elementwise on positions; give batched arrays as predicate(..., batch_dims=1)"
        )
    return closed


@dataclasses.dataclass(frozen=True)
class Reading:
    """Masks read on one set of tiles: what ``Mask.tile_bounds`` is given.

    Attributes:
      tiles: the tiles.
      programs: of the leaves read so far.
      widened: collects the primitives that the analysis has no rule for, and where they were met.
    """

    tiles: TileSet
    programs: Programs
    widened: set[str]

    @property
    def analysis(self) -> Analysis:
        return Analysis(self.tiles)

    def trace(self, leaf: MaskLike) -> Interval:
        """``(all, any)`` of a leaf by the analysis of its predicate."""
        analysis = self.analysis
        closed, arrays = self.programs.of(leaf)
        consts = [analysis.constant(value) for value in closed.consts]
        tiles = self.tiles
        (result,) = analysis.run(closed.jaxpr, consts, [*map(analysis.constant, arrays), tiles.q, tiles.k])
        if analysis.widened:
            self.widened.update(f"{primitive} in {leaf!r}" for primitive in analysis.widened)
        return result

    def combine(self, operation: Callable[[Any, Any], Any], terms: Iterable[MaskLike]) -> Interval:
        """Of terms joined by an operation under which bounds stay bounds: ``&`` or ``|``."""
        depends, bounds = self.analysis.align(*[term.tile_bounds(self) for term in terms])
        lo, hi = bounds[0].lo, bounds[0].hi
        for each in bounds[1:]:
            lo, hi = operation(lo, each.lo), operation(hi, each.hi)
        return Interval(lo, hi, depends)

    def shifted(self, q_offset: Any, k_offset: Any) -> Reading:
        """A reading of the same tiles with positions counted from elsewhere; ints or integer scalars, maybe traced."""
        analysis = self.analysis
        q, k = (
            interval_rules.add(analysis, None, position, analysis.constant(_int32(offset)))
            for position, offset in ((self.tiles.q, q_offset), (self.tiles.k, k_offset))
        )
        return dataclasses.replace(self, tiles=dataclasses.replace(self.tiles, q=q, k=k))


def _int32(offset: Any) -> Any:
    return offset.astype(jnp.int32) if isinstance(offset, jax.core.Tracer) else np.asarray(offset, np.int32)


# --- search -------------------------------------------------------------------------------------------------


def bounds(mask: MaskLike, reading: Reading, q_offset: Any = 0) -> Interval:
    """``(all, any)`` of a mask on each tile, the first query being at ``q_offset``."""
    moves = not (isinstance(q_offset, int) and q_offset == 0)
    return reading.analysis.expand(mask.tile_bounds(reading.shifted(q_offset, 0) if moves else reading), BOTH)


@dataclasses.dataclass
class Found:
    """Tiles of the finest grid that the mask may touch: index arrays ``[n]`` each, in no particular order."""

    partial: tuple[np.ndarray, np.ndarray]
    full: tuple[np.ndarray, np.ndarray]
    widened: set[str]
    examined: int


def search(
    mask: MaskLike, q_len: int, kv_len: int, block: tuple[int, int], programs: Programs, q_offset: Any = 0
) -> Found:
    """Finds the tiles that are full or may be partial, on the host, treating traced arrays as unknown.

    Cost follows the border of the active area (plus its full tiles, which are only listed): a coarse tile that
    is empty or full is not looked into.
    """
    grid = (-(-q_len // block[0]), -(-kv_len // block[1]))
    scale = 1
    while max(grid) > 8 * scale:
        scale *= FAN_OUT
    rows, columns = (g.ravel() for g in np.indices([-(-size // scale) for size in grid], dtype=np.int32))
    widened: set[str] = set()
    full: list[tuple[np.ndarray, np.ndarray]] = []
    tables: dict[Any, Any] = {}
    examined = 0
    while True:
        tiles = tile_set(np, (q_len, kv_len), block, rows, columns, scale, tables)
        result = bounds(mask, Reading(tiles, programs, widened), q_offset)
        always, ever = (np.broadcast_to(end, rows.shape) for end in (result.lo, result.hi))
        examined += rows.size
        full.append(_children(rows[always], columns[always], scale, grid))
        rows, columns = rows[ever & ~always], columns[ever & ~always]
        if scale == 1 or rows.size == 0:
            break
        rows, columns = _children(rows, columns, FAN_OUT, [-(-size // (scale // FAN_OUT)) for size in grid])
        scale //= FAN_OUT
    full_rows, full_columns = (np.concatenate(parts) for parts in zip(*full))
    # A tile that hangs over the end of the sequence always needs its mask.
    over = np.zeros(full_rows.shape, bool)
    if q_len % block[0]:
        over |= full_rows == grid[0] - 1
    if kv_len % block[1]:
        over |= full_columns == grid[1] - 1
    partial = np.concatenate([rows, full_rows[over]]), np.concatenate([columns, full_columns[over]])
    return Found(partial, (full_rows[~over], full_columns[~over]), widened, examined)


def _children(rows: np.ndarray, columns: np.ndarray, factor: int, grid: Any) -> tuple[np.ndarray, np.ndarray]:
    if factor == 1:
        return rows, columns
    inner_rows, inner_columns = (g.ravel().astype(np.int32) for g in np.indices((factor, factor)))
    rows = (rows[:, None] * factor + inner_rows).ravel()
    columns = (columns[:, None] * factor + inner_columns).ravel()
    inside = (rows < grid[0]) & (columns < grid[1])
    return rows[inside], columns[inside]


