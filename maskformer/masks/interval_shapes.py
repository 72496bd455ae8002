"""Interval rules that move, reduce or look up: shapes, reductions, branches, and reads of captured arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.masks.interval_rules import hull_of_cases
from maskformer.masks.intervals import BOTH, NEITHER, Analysis, Interval, has_order, rule

# --- shapes -------------------------------------------------------------------------------------------------


def _reshape(analysis: Analysis, value: Interval, change: Any) -> Interval:
    """Applies ``change(array, number of leading tile dimensions)`` to both ends."""
    lead = analysis.lead(value)
    return Interval(change(value.lo, lead), change(value.hi, lead), value.depends)


@rule("reshape", "squeeze", "expand_dims")
def _to_shape(analysis: Analysis, equation: Any, value: Interval, *dynamic: Interval):
    shape = equation.outvars[0].aval.shape
    return _reshape(analysis, value, lambda x, lead: analysis.xp.reshape(x, x.shape[:lead] + shape))


@rule("broadcast_in_dim")
def _broadcast(analysis: Analysis, equation: Any, value: Interval, *dynamic: Interval):
    shape, dimensions = equation.params["shape"], equation.params["broadcast_dimensions"]
    inner = [1] * len(shape)
    for size, dimension in zip(equation.invars[0].aval.shape, dimensions):
        inner[dimension] = size

    def change(x: Any, lead: int) -> Any:
        tiles = x.shape[:lead]
        return analysis.xp.broadcast_to(analysis.xp.reshape(x, tiles + tuple(inner)), tiles + tuple(shape))

    return _reshape(analysis, value, change)


@rule("transpose")
def _transpose(analysis: Analysis, equation: Any, value: Interval):
    order = equation.params["permutation"]
    return _reshape(
        analysis,
        value,
        lambda x, lead: analysis.xp.transpose(x, (*range(lead), *[lead + axis for axis in order])),
    )


@rule("slice")
def _slice(analysis: Analysis, equation: Any, value: Interval):
    params = equation.params
    strides = params["strides"] or (1,) * len(params["start_indices"])
    window = tuple(map(slice, params["start_indices"], params["limit_indices"], strides))
    return _reshape(analysis, value, lambda x, lead: x[(slice(None),) * lead + window])


@rule("rev")
def _reverse(analysis: Analysis, equation: Any, value: Interval):
    dimensions = equation.params["dimensions"]
    return _reshape(
        analysis, value, lambda x, lead: analysis.xp.flip(x, tuple(lead + axis for axis in dimensions))
    )


@rule("concatenate")
def _concatenate(analysis: Analysis, equation: Any, *values: Interval):
    return _join(analysis, values, equation.params["dimension"])


def _join(analysis: Analysis, values: Any, axis: int) -> Interval:
    xp = analysis.xp
    depends, values = analysis.align(*values)
    axis += analysis.tiles.lead(depends)
    ends = [(_with_tiles(analysis, v, depends, v.lo), _with_tiles(analysis, v, depends, v.hi)) for v in values]
    lo, hi = (xp.concatenate(pieces, axis=axis) for pieces in zip(*ends))
    return Interval(lo, hi, depends)


@rule("stack")
def _stack(analysis: Analysis, equation: Any, *values: Interval):
    axis = equation.params["axis"]
    grown = [
        _reshape(analysis, value, lambda x, lead: analysis.xp.expand_dims(x, lead + axis)) for value in values
    ]
    return _join(analysis, grown, axis)


def _with_tiles(analysis: Analysis, value: Interval, depends: int, end: Any) -> Any:
    """An end of an interval with all leading tile dimensions written out."""
    own = np.shape(end)[analysis.lead(value) :]
    return analysis.xp.broadcast_to(end, analysis.tiles.shape(depends) + own)


# --- reductions ---------------------------------------------------------------------------------------------


@rule("reduce_max", "reduce_min", "reduce_or", "reduce_and")
def _reduce(analysis: Analysis, equation: Any, value: Interval):
    name = equation.primitive.name
    axes = equation.params["axes"]
    xp = analysis.xp
    if name in ("reduce_or", "reduce_and") and not jnp.issubdtype(value.lo.dtype, np.bool_):
        return None
    function = {"reduce_max": xp.max, "reduce_min": xp.min, "reduce_or": xp.any, "reduce_and": xp.all}[name]
    if 0 in [equation.invars[0].aval.shape[axis] for axis in axes]:
        return None
    value = analysis.settle(value)
    result = _reshape(analysis, value, lambda x, lead: function(x, axis=tuple(lead + axis for axis in axes)))
    return analysis.settle(result)


@rule("reduce_sum")
def _sum(analysis: Analysis, equation: Any, value: Interval):
    axes, shape, dtype = equation.params["axes"], equation.invars[0].aval.shape, value.lo.dtype
    if not jnp.issubdtype(dtype, np.signedinteger):
        return None
    count = int(np.prod([shape[axis] for axis in axes]))
    bound = jnp.iinfo(dtype).max // max(count, 1)
    xp = analysis.xp
    lead = analysis.lead(value)
    where = tuple(lead + axis for axis in axes)
    fits = xp.all((value.lo >= -bound) & (value.hi <= bound), axis=where)
    info = jnp.iinfo(dtype)
    lo, hi = (xp.sum(end, axis=where, dtype=dtype) for end in (value.lo, value.hi))
    low, high = np.asarray(info.min, dtype), np.asarray(info.max, dtype)
    return Interval(xp.where(fits, lo, low), xp.where(fits, hi, high), value.depends)


# --- branches -----------------------------------------------------------------------------------------------


@rule("cond")
def _cond(analysis: Analysis, equation: Any, index: Interval, *operands: Interval):
    """The hull of the branches that the index can choose."""
    branches = equation.params["branches"]
    outputs = [
        analysis.run(branch.jaxpr, [analysis.constant(const) for const in branch.consts], list(operands))
        for branch in branches
    ]
    results = []
    for position, variable in enumerate(equation.outvars):
        values = [analysis.settle(output[position]) for output in outputs if has_order(output[position])]
        if len(values) < len(branches):
            results.append(analysis.anything(variable.aval))
            continue
        depends, (which, *values) = analysis.align(index, *values)
        grow = (1,) * len(variable.aval.shape)
        w_lo, w_hi = (analysis.xp.reshape(end, np.shape(end) + grow) for end in (which.lo, which.hi))
        last = len(branches) - 1
        w_lo, w_hi = (analysis.xp.clip(analysis.xp.asarray(end).astype(np.int32), 0, last) for end in (w_lo, w_hi))
        results.append(hull_of_cases(analysis, w_lo, w_hi, values, depends))
    return results


# --- reads of captured arrays ---------------------------------------------------------------------------------


@rule("iota")
def _iota(analysis: Analysis, equation: Any):
    params = equation.params
    shape = [1] * len(params["shape"])
    shape[params["dimension"]] = params["shape"][params["dimension"]]
    line = np.arange(shape[params["dimension"]]).astype(params["dtype"]).reshape(shape)
    return analysis.constant(np.broadcast_to(line, params["shape"]))


@rule("dynamic_slice")
def _dynamic_slice(analysis: Analysis, equation: Any, operand: Interval, *starts: Interval):
    sizes = equation.params["slice_sizes"]
    shape = equation.invars[0].aval.shape
    if len(starts) != len(shape):
        return None
    axes = [axis for axis in range(len(shape)) if sizes[axis] != shape[axis]]
    if any(sizes[axis] != 1 for axis in axes):
        return _hull(analysis, operand, equation.outvars[0].aval.shape)
    # XLA clamps the start, so an index out of bounds reads the nearest entry.
    indices = {axis: _clip(analysis, starts[axis], shape[axis]) for axis in axes}
    result = read(analysis, operand, indices, shape)
    out_shape = equation.outvars[0].aval.shape
    return _reshape(analysis, result, lambda x, lead: analysis.xp.reshape(x, x.shape[:lead] + out_shape))


@rule("gather")
def _gather(analysis: Analysis, equation: Any, operand: Interval, indices: Interval):
    """``array[i, j, ...]`` with index arrays of one shape; entries out of bounds clamp, or make it unknown."""
    numbers, sizes, mode = (equation.params[key] for key in ("dimension_numbers", "slice_sizes", "mode"))
    shape, out = equation.invars[0].aval.shape, equation.outvars[0].aval
    axes = numbers.start_index_map
    batch_rank = equation.invars[1].aval.ndim - 1
    plain = (
        tuple(numbers.collapsed_slice_dims) == tuple(sorted(axes))
        and not numbers.operand_batching_dims
        and all(sizes[axis] == (1 if axis in axes else shape[axis]) for axis in range(len(shape)))
        and tuple(numbers.offset_dims) == tuple(range(batch_rank, out.ndim))
    )
    if not plain or 0 in shape:
        return _hull(analysis, operand, out.shape) if mode == jax.lax.GatherScatterMode.CLIP else None
    xp = analysis.xp
    found, inside = {}, []
    for position, axis in enumerate(axes):
        index = Interval(indices.lo[..., position], indices.hi[..., position], indices.depends)
        if indices.exact:
            index = Interval(index.lo, index.lo)
        within = (index.lo >= 0) & (index.hi < shape[axis])
        inside.append(Interval(within, within, index.depends))
        found[axis] = _clip(analysis, index, shape[axis])
    result = read(analysis, operand, found, shape)
    if mode == jax.lax.GatherScatterMode.CLIP:
        return result
    top = analysis.anything(jax.ShapeDtypeStruct((), operand.lo.dtype))
    rest = out.ndim - batch_rank
    for within in inside:
        known = xp.reshape(within.lo, np.shape(within.lo) + (1,) * rest)
        depends, (result, within) = analysis.align(result, Interval(known, known, within.depends))
        result = Interval(
            xp.where(within.lo, result.lo, top.lo), xp.where(within.lo, result.hi, top.hi), depends
        )
    return result


def _clip(analysis: Analysis, index: Interval, size: int) -> Interval:
    lo, hi = (analysis.xp.clip(end, 0, size - 1) for end in (index.lo, index.hi))
    return Interval(lo, lo if index.exact else hi, index.depends)


def _hull(analysis: Analysis, operand: Interval, shape: tuple[int, ...]) -> Interval:
    """The smallest and largest entry of the whole array, for every element read from it."""
    xp = analysis.xp
    operand = analysis.settle(operand)
    lead = analysis.lead(operand)
    axes = tuple(range(lead, operand.lo.ndim))
    lo, hi = xp.min(operand.lo, axis=axes), xp.max(operand.hi, axis=axes)
    grow = lo.shape + (1,) * len(shape)
    lo, hi = (xp.broadcast_to(xp.reshape(end, grow), lo.shape + shape) for end in (lo, hi))
    return analysis.settle(Interval(lo, hi, operand.depends))


def read(analysis: Analysis, operand: Interval, indices: dict[int, Interval], shape: tuple[int, ...]) -> Interval:
    """Range of ``operand`` over index ranges (within bounds) along some axes; those axes go, the index shape leads.

    Axes are read one at a time: first those with a known index, then the one whose answer is exact from a
    table of block minima, and what is left by its hull.
    """
    xp = analysis.xp
    operand = analysis.settle(operand)
    if not indices:
        return operand
    remaining = list(range(len(shape)))
    for axis, index in sorted(indices.items(), key=lambda item: not item[1].exact):
        place = remaining.index(axis)
        if index.exact and np.ndim(index.lo) == 0:
            lead = analysis.lead(operand)
            ends = [xp.take(end, index.lo, axis=lead + place) for end in (operand.lo, operand.hi)]
            operand = Interval(*ends, operand.depends)
            remaining.pop(place)
    left = [axis for axis in indices if axis in remaining]
    if not left:
        return operand
    if operand.depends == NEITHER and len(left) == 1:
        place = remaining.index(left[0])
        index = indices[left[0]]
        return analysis.settle(_table(analysis, operand, place, index.depends).query(xp, index))
    if operand.depends == NEITHER and len(left) == 2 and np.ndim(indices[left[0]].lo) <= 1 and analysis.tiles.finest:
        places = [remaining.index(axis) for axis in left]
        ends = [xp.moveaxis(end, places, (0, 1)) for end in (operand.lo, operand.hi)]
        pair = (indices[left[0]], indices[left[1]])
        if {pair[0].depends, pair[1].depends} == {1, 2}:
            return analysis.settle(_read_pair(analysis, *ends, *pair))
    # What is left has no table: the hull over those axes, spread over the shape of the index.
    batch = _batch_shape(analysis, indices[left[0]])
    lead = analysis.lead(operand)
    places = tuple(lead + remaining.index(axis) for axis in left)
    lo, hi = xp.min(operand.lo, axis=places), xp.max(operand.hi, axis=places)
    tiles, rest = lo.shape[:lead], lo.shape[lead:]
    lo, hi = (
        xp.broadcast_to(xp.reshape(end, tiles + (1,) * len(batch) + rest), tiles + batch + rest) for end in (lo, hi)
    )
    return analysis.settle(Interval(lo, hi, operand.depends))


def _batch_shape(analysis: Analysis, index: Interval) -> tuple[int, ...]:
    return tuple(np.shape(index.lo)[analysis.lead(index) :])


def _table(analysis: Analysis, operand: Interval, axis: int, depends: int) -> RangeTable:
    """The table of an array along an axis; a captured array's is made once for all levels of a search."""
    tables, size = analysis.tiles.tables, operand.lo.shape[axis]
    unit = _unit(analysis.tiles.unit(depends, size), size)
    key = (id(operand.lo), axis, unit)
    if not operand.exact or key not in tables:
        xp = analysis.xp
        table = RangeTable(xp, xp.moveaxis(operand.lo, axis, 0), xp.moveaxis(operand.hi, axis, 0), unit)
        if not operand.exact:
            return table
        # The array is kept beside its table, so that its id stays its own.
        tables[key] = operand.lo, table
    return tables[key][1]


class RangeTable:
    """Smallest and largest entry of any range of an array's first axis, in two reads.

    The axis is cut into short units; for each power of two there is a table of the minimum over that many
    units from each one on. A range is rounded out to whole units: wider, never narrower.
    """

    def __init__(self, xp: Any, lo: Any, hi: Any, unit: int):
        self.unit, self.count = unit, -(-lo.shape[0] // unit)
        self.low = self._levels(xp, _by_unit(xp, lo, unit, self.count, xp.min), xp.minimum)
        self.high = self._levels(xp, _by_unit(xp, hi, unit, self.count, xp.max), xp.maximum)

    def _levels(self, xp: Any, base: Any, join: Any) -> Any:
        levels, step = [base], 1
        while 2 * step <= self.count:
            last = levels[-1]
            # Past the end the window is cut short, which repeats entries and changes no minimum.
            shifted = xp.concatenate([last[step:], xp.broadcast_to(last[-1:], (step,) + last.shape[1:])], axis=0)
            levels.append(join(last, shifted))
            step *= 2
        return xp.concatenate(levels, axis=0)

    def query(self, xp: Any, index: Interval) -> Interval:
        first, last = (xp.asarray(end) // self.unit for end in (index.lo, index.hi))
        length = last - first + 1
        level = xp.zeros_like(length)
        step = 2
        while step <= self.count:
            level = level + xp.asarray(length >= step).astype(level.dtype)
            step *= 2
        span = xp.left_shift(xp.ones_like(level), level)
        begin = level * self.count
        at = [begin + first, begin + last + 1 - span]
        lo = xp.minimum(self.low[at[0]], self.low[at[1]])
        hi = xp.maximum(self.high[at[0]], self.high[at[1]])
        return Interval(lo, hi, index.depends)


def _unit(tile: int, size: int) -> int:
    """Units shorter than the tile keep ranges that are not aligned to tiles sharp."""
    unit = tile
    while unit % 2 == 0 and tile // unit < 8:
        unit //= 2
    return max(1, min(unit, size))


def _by_unit(xp: Any, array: Any, unit: int, count: int, reduce: Any) -> Any:
    short = count * unit - array.shape[0]
    if short:
        array = xp.concatenate([array, xp.broadcast_to(array[-1:], (short,) + array.shape[1:])], axis=0)
    return reduce(xp.reshape(array, (count, unit) + array.shape[1:]), axis=1)


def _read_pair(analysis: Analysis, lo: Any, hi: Any, first: Interval, second: Interval) -> Interval:
    """``matrix[i, j]`` with one index from the query and one from the key: minima of the matrix's own blocks."""
    xp = analysis.xp
    units = [min(analysis.tiles.unit(i.depends, size), size) for i, size in zip((first, second), lo.shape)]
    counts = [-(-size // unit) for size, unit in zip(lo.shape, units)]

    def reduce(array: Any, function: Any) -> Any:
        array = _by_unit(xp, array, units[0], counts[0], function)
        array = xp.moveaxis(array, 1, 0)
        return xp.moveaxis(_by_unit(xp, array, units[1], counts[1], function), 1, 0)

    low, high = reduce(lo, xp.min), reduce(hi, xp.max)
    _, (first, second) = analysis.align(first, second)
    i = [xp.asarray(end) // units[0] for end in (first.lo, first.hi)]
    j = [xp.asarray(end) // units[1] for end in (second.lo, second.hi)]
    near = (i[1] - i[0] <= 1) & (j[1] - j[0] <= 1)
    near = xp.reshape(near, near.shape + (1,) * (low.ndim - 2))
    corners = [(a, b) for a in i for b in j]
    is_bool = low.dtype == bool
    smaller, larger = (xp.logical_and, xp.logical_or) if is_bool else (xp.minimum, xp.maximum)
    best_low, best_high = low[corners[0]], high[corners[0]]
    for corner in corners[1:]:
        best_low, best_high = smaller(best_low, low[corner]), larger(best_high, high[corner])
    whole_low, whole_high = xp.min(low, axis=(0, 1)), xp.max(high, axis=(0, 1))
    return Interval(xp.where(near, best_low, whole_low), xp.where(near, best_high, whole_high), BOTH)
