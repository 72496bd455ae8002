"""Interval rules of the elementwise primitives: arithmetic, comparison, logic, selection, conversion."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.masks.intervals import Analysis, Interval, anything_between, elementwise, rule


def _is(value: Interval, kind: Any) -> bool:
    return jnp.issubdtype(value.lo.dtype, kind)


def _corners(function: Callable[..., Any], *pairs: tuple[Any, Any]) -> tuple[list[Any], list[Any]]:
    corners = [function(a, b) for a in pairs[0] for b in pairs[1]]
    return corners, corners


def _arithmetic(analysis: Analysis, operation: Callable[..., tuple[Any, Any]], *inputs: Interval):
    """Applies ``operation`` to intervals; ``operation(xp, a, b)`` gives candidate ends, in any number type.

    Integers wrap, so the same operation is repeated in wide floats, and where that leaves the type's range (by
    more than its own rounding) nothing is known.
    """
    xp = analysis.xp
    depends, values = analysis.align(*inputs)
    dtype = inputs[0].lo.dtype
    if jnp.issubdtype(dtype, np.floating):
        with np.errstate(all="ignore"):
            lows, highs = operation(xp, *[(v.lo, v.hi) for v in map(analysis.settle, values)])
            result = Interval(functools.reduce(xp.minimum, lows), functools.reduce(xp.maximum, highs), depends)
        return analysis.settle(result) if jnp.finfo(dtype).bits >= 32 else analysis.loosen(result)
    if not jnp.issubdtype(dtype, np.integer):
        return None
    wide = np.float64 if xp is np or jax.config.jax_enable_x64 else np.float32
    info = jnp.iinfo(dtype)
    slack = 0.0 if info.bits + 2 < np.finfo(wide).nmant else float(2.0 ** (info.bits - np.finfo(wide).nmant + 3))
    with np.errstate(all="ignore"):
        lows, highs = operation(xp, *[(xp.asarray(v.lo), xp.asarray(v.hi)) for v in values])
        wide_ends = [(xp.asarray(v.lo).astype(wide), xp.asarray(v.hi).astype(wide)) for v in values]
        wide_lows, wide_highs = operation(xp, *wide_ends)
    lowest = functools.reduce(xp.minimum, wide_lows)
    highest = functools.reduce(xp.maximum, wide_highs)
    # One corner that leaves the range wraps, and then the smallest and largest corner mean nothing.
    known = (lowest >= float(info.min) + slack) & (highest <= float(info.max) - slack)
    lo = functools.reduce(xp.minimum, lows).astype(dtype)
    hi = functools.reduce(xp.maximum, highs).astype(dtype)
    return anything_between(analysis, dtype, known, lo, hi, depends)


@elementwise("add", "add_any")
def add(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    return _arithmetic(analysis, lambda xp, a, b: ([a[0] + b[0]], [a[1] + b[1]]), a, b)


@elementwise("sub")
def _sub(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    return _arithmetic(analysis, lambda xp, a, b: ([a[0] - b[1]], [a[1] - b[0]]), a, b)


@elementwise("neg")
def _neg(analysis: Analysis, equation: Any, a: Interval):
    return _arithmetic(analysis, lambda xp, a: ([-a[1]], [-a[0]]), a)


@elementwise("mul")
def _mul(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    result = _arithmetic(analysis, lambda xp, a, b: _corners(lambda x, y: x * y, a, b), a, b)
    return analysis.loosen(result) if result is not None and _is(result, np.floating) else result


@elementwise("abs")
def _abs(analysis: Analysis, equation: Any, a: Interval):
    def operation(xp: Any, a: Any):
        across = (a[0] <= 0) & (a[1] >= 0)
        ends = [xp.abs(a[0]), xp.abs(a[1])]
        return [xp.where(across, xp.zeros_like(ends[0]), xp.minimum(*ends))], [xp.maximum(*ends)]

    return _arithmetic(analysis, operation, a)


@elementwise("integer_pow", "square")
def _power(analysis: Analysis, equation: Any, a: Interval):
    exponent = equation.params.get("y", 2)
    if exponent < 1:
        return None
    if exponent % 2 == 0:
        a = _abs(analysis, equation, a)
    result = _arithmetic(analysis, lambda xp, a: ([a[0] ** exponent], [a[1] ** exponent]), a)
    return analysis.loosen(result, 1e-6 * exponent) if _is(result, np.floating) else result


@elementwise("max")
def _max(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    return _monotone(analysis, analysis.xp.maximum, a, b)


@elementwise("min")
def _min(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    return _monotone(analysis, analysis.xp.minimum, a, b)


@elementwise("clamp")
def _clamp(analysis: Analysis, equation: Any, low: Interval, value: Interval, high: Interval):
    xp = analysis.xp
    return _monotone(analysis, lambda low, value, high: xp.minimum(xp.maximum(value, low), high), low, value, high)


def _monotone(analysis: Analysis, function: Callable[..., Any], *inputs: Interval) -> Interval:
    """A function that rises, exactly, in each argument."""
    depends, values = analysis.align(*inputs)
    values = [analysis.settle(value) for value in values]
    with np.errstate(all="ignore"):
        result = Interval(function(*[v.lo for v in values]), function(*[v.hi for v in values]), depends)
    return analysis.settle(result)


@elementwise("sign", "floor", "ceil", "round")
def _step(analysis: Analysis, equation: Any, a: Interval):
    xp = analysis.xp
    names = {"sign": xp.sign, "floor": xp.floor, "ceil": xp.ceil}
    if equation.primitive.name == "round":
        # Half away from zero or half to even, as the parameter says: either lies between floor and ceil.
        return analysis.settle(Interval(xp.floor(analysis.settle(a).lo), xp.ceil(analysis.settle(a).hi), a.depends))
    return _monotone(analysis, names[equation.primitive.name], a)


@elementwise("exp", "exp2", "expm1", "log", "log1p", "sqrt", "cbrt", "tanh", "logistic", "atan", "sinh", "asinh")
def _rising(analysis: Analysis, equation: Any, a: Interval):
    """Rising functions; libraries differ in the last bits, so the ends get room."""
    xp = analysis.xp
    names = {"logistic": lambda x: 1 / (1 + xp.exp(-x)), "atan": xp.arctan, "asinh": xp.arcsinh}
    function = names.get(equation.primitive.name) or getattr(xp, equation.primitive.name)
    result = _monotone(analysis, function, a)
    return analysis.loosen(Interval(result.lo, result.hi, a.depends), 1e-5)


@elementwise("sin", "cos", "erf")
def _bounded(analysis: Analysis, equation: Any, a: Interval):
    value = analysis.settle(a)
    one = np.asarray(1.0 + 1e-5, value.lo.dtype)
    known = analysis.xp.isfinite(value.lo)
    return anything_between(analysis, value.lo.dtype, known, -one, one, a.depends)


# --- division -----------------------------------------------------------------------------------------------


def _floor_corners(analysis: Analysis, a: Interval, b: Interval, divide: Callable[[Any, Any], Any]):
    xp = analysis.xp
    depends, (a, b) = analysis.align(a, b)
    positive = b.lo > 0
    low, high = xp.where(positive, b.lo, 1), xp.where(positive, b.hi, 1)
    with np.errstate(all="ignore"):
        corners = [divide(x, y) for x in (a.lo, a.hi) for y in (low, high)]
    lo, hi = functools.reduce(xp.minimum, corners), functools.reduce(xp.maximum, corners)
    dtype = a.lo.dtype
    return anything_between(analysis, dtype, positive, lo.astype(dtype), hi.astype(dtype), depends)


def _truncate(xp: Any) -> Callable[[Any, Any], Any]:
    # The dividend's magnitude is taken one short of overflow: -(-2**31) has no room, and is not exact anyway.
    return lambda x, y: xp.where(x >= 0, x // y, -((-(x + 1)) // y) - ((-(x + 1)) % y == y - 1))


@elementwise("div")
def _div(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    if _is(a, np.integer):
        return _floor_corners(analysis, a, b, _truncate(analysis.xp))
    if not _is(a, np.floating):
        return None
    xp = analysis.xp
    depends, values = analysis.align(a, b)
    a, b = (analysis.settle(value) for value in values)
    nonzero = (b.lo > 0) | (b.hi < 0)
    low, high = xp.where(nonzero, b.lo, 1), xp.where(nonzero, b.hi, 1)
    with np.errstate(all="ignore"):
        corners = [x / y for x in (a.lo, a.hi) for y in (low, high)]
    lo, hi = functools.reduce(xp.minimum, corners), functools.reduce(xp.maximum, corners)
    result = anything_between(analysis, a.lo.dtype, nonzero, lo, hi, depends)
    return analysis.loosen(analysis.settle(result))


@elementwise("rem")
def _rem(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    """The remainder with the dividend's sign."""
    if not _is(a, np.integer):
        return None
    xp = analysis.xp
    depends, (a, b) = analysis.align(a, b)
    positive = b.lo > 0
    n_low, n_high = xp.where(positive, b.lo, 1), xp.where(positive, b.hi, 1)
    largest = n_high - 1
    lo = xp.where(a.lo < 0, xp.maximum(a.lo, -largest), 0)
    hi = xp.where(a.hi > 0, xp.minimum(a.hi, largest), 0)
    # Within one period of a known divisor, and at or above zero, the remainder only shifts.
    same = (n_low == n_high) & (a.lo >= 0) & (a.lo // n_low == a.hi // n_low)
    lo, hi = xp.where(same, a.lo % n_low, lo), xp.where(same, a.hi % n_low, hi)
    dtype = a.lo.dtype
    return anything_between(analysis, dtype, positive, lo.astype(dtype), hi.astype(dtype), depends)


@elementwise("jnp.floor_divide")
def _floor_divide(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    if a.lo is None or not (_is(a, np.signedinteger) and _is(b, np.signedinteger)) or a.lo.dtype != b.lo.dtype:
        return None
    return _floor_corners(analysis, a, b, lambda x, y: x // y)


@elementwise("jnp.remainder")
def _remainder(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    """Python's ``%``: the remainder with the divisor's sign."""
    if a.lo is None or not (_is(a, np.signedinteger) and _is(b, np.signedinteger)) or a.lo.dtype != b.lo.dtype:
        return None
    xp = analysis.xp
    depends, (a, b) = analysis.align(a, b)
    positive = b.lo > 0
    n_low, n_high = xp.where(positive, b.lo, 1), xp.where(positive, b.hi, 1)
    same = (n_low == n_high) & (a.lo // n_low == a.hi // n_low)
    lo = xp.where(same, a.lo % n_low, 0)
    hi = xp.where(same, a.hi % n_low, n_high - 1)
    dtype = a.lo.dtype
    return anything_between(analysis, dtype, positive, lo.astype(dtype), hi.astype(dtype), depends)


# --- comparison ---------------------------------------------------------------------------------------------


def _compare(analysis: Analysis, a: Interval, b: Interval, decide: Callable[[Interval, Interval], tuple[Any, Any]]):
    depends, values = analysis.align(a, b)
    a, b = (analysis.settle(value) for value in values)
    always, ever = decide(a, b)
    if _is(a, np.floating):
        xp = analysis.xp
        known = xp.isfinite(a.lo) & xp.isfinite(b.lo)
        always, ever = always & known, ever | ~known
    return Interval(always, ever, depends)


@elementwise("lt")
def _lt(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    return _compare(analysis, a, b, lambda a, b: (a.hi < b.lo, a.lo < b.hi))


@elementwise("le")
def _le(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    return _compare(analysis, a, b, lambda a, b: (a.hi <= b.lo, a.lo <= b.hi))


@elementwise("gt")
def _gt(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    return _lt(analysis, equation, b, a)


@elementwise("ge")
def _ge(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    return _le(analysis, equation, b, a)


def _equal(a: Interval, b: Interval) -> tuple[Any, Any]:
    return (a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo), (a.lo <= b.hi) & (b.lo <= a.hi)


@elementwise("eq")
def _eq(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    return _compare(analysis, a, b, _equal)


@elementwise("ne")
def _ne(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    def decide(a: Interval, b: Interval) -> tuple[Any, Any]:
        always, ever = _equal(a, b)
        return ~ever, ~always

    return _compare(analysis, a, b, decide)


@elementwise("is_finite")
def _is_finite(analysis: Analysis, equation: Any, a: Interval):
    known = analysis.xp.isfinite(analysis.settle(a).lo)
    return Interval(known, analysis.xp.ones_like(known), a.depends)


# --- logic and selection ------------------------------------------------------------------------------------


def _bits(analysis: Analysis, a: Interval, b: Interval, low: Callable[..., Any], high: Callable[..., Any]):
    """Bitwise on integers that are not negative; else unknown."""
    xp = analysis.xp
    depends, (a, b) = analysis.align(a, b)
    known = (a.lo >= 0) & (b.lo >= 0)
    dtype = a.lo.dtype
    lo, hi = (xp.asarray(end).astype(dtype) for end in (low(a, b), high(a, b)))
    return anything_between(analysis, dtype, known, lo, hi, depends)


def _ones_below(xp: Any, value: Any) -> Any:
    """The smallest ``2**n - 1`` that is not below ``value >= 0``."""
    shift = 1
    while shift < value.dtype.itemsize * 8:
        value = value | (value >> shift)
        shift *= 2
    return value


@elementwise("and")
def _and(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    if _is(a, np.bool_):
        return _monotone(analysis, lambda x, y: x & y, a, b)
    return _bits(analysis, a, b, lambda a, b: a.lo * 0, lambda a, b: analysis.xp.minimum(a.hi, b.hi))


@elementwise("or")
def _or(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    if _is(a, np.bool_):
        return _monotone(analysis, lambda x, y: x | y, a, b)
    xp = analysis.xp
    return _bits(analysis, a, b, lambda a, b: xp.maximum(a.lo, b.lo), lambda a, b: _ones_below(xp, a.hi | b.hi))


@elementwise("xor")
def _xor(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    if _is(a, np.bool_):
        return _ne(analysis, equation, a, b)
    return _bits(analysis, a, b, lambda a, b: a.lo * 0, lambda a, b: _ones_below(analysis.xp, a.hi | b.hi))


@elementwise("not")
def _not(analysis: Analysis, equation: Any, a: Interval):
    return Interval(~a.hi, ~a.lo, a.depends)


@elementwise("shift_right_arithmetic", "shift_right_logical")
def _shift_right(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    xp = analysis.xp
    depends, (a, b) = analysis.align(a, b)
    bits = a.lo.dtype.itemsize * 8
    known = (b.lo == b.hi) & (b.lo >= 0) & (b.lo < bits)
    if equation.primitive.name == "shift_right_logical":
        known = known & (a.lo >= 0)
    amount = xp.where(known, b.lo, 0)
    return anything_between(analysis, a.lo.dtype, known, a.lo >> amount, a.hi >> amount, depends)


@elementwise("shift_left")
def _shift_left(analysis: Analysis, equation: Any, a: Interval, b: Interval):
    if not b.exact or np.ndim(b.lo) or isinstance(b.lo, jax.core.Tracer) or not 0 <= int(b.lo) < 31:
        return None
    factor = np.asarray(2 ** int(b.lo), a.lo.dtype)
    return _mul(analysis, equation, a, Interval(factor, factor))


@elementwise("select_n")
def _select(analysis: Analysis, equation: Any, which: Interval, *cases: Interval):
    depends, (which, *values) = analysis.align(which, *cases)
    first, last = (analysis.xp.asarray(end).astype(np.int32) for end in (which.lo, which.hi))
    return hull_of_cases(analysis, first, last, [analysis.settle(value) for value in values], depends)


def hull_of_cases(analysis: Analysis, first: Any, last: Any, cases: Sequence[Interval], depends: int) -> Interval:
    """What a choice can give whose number lies in ``first .. last``."""
    xp = analysis.xp
    lo, hi, any_yet = cases[0].lo, cases[0].hi, first <= 0
    for number, case in enumerate(cases[1:], start=1):
        possible = (first <= number) & (number <= last)
        joined = xp.minimum(lo, case.lo), xp.maximum(hi, case.hi)
        lo = xp.where(possible, xp.where(any_yet, joined[0], case.lo), lo)
        hi = xp.where(possible, xp.where(any_yet, joined[1], case.hi), hi)
        any_yet = any_yet | possible
    return Interval(lo, hi, depends)


@elementwise("convert_element_type")
def _convert(analysis: Analysis, equation: Any, a: Interval):
    xp, old, new = analysis.xp, a.lo.dtype, equation.params["new_dtype"]
    if jnp.issubdtype(new, np.bool_):
        zero = np.zeros((), old)
        return _ne(analysis, equation, a, Interval(zero, zero))
    if jnp.issubdtype(old, np.bool_) or jnp.issubdtype(new, np.floating):
        if jnp.issubdtype(old, np.floating):
            a = analysis.settle(a)
        with np.errstate(all="ignore"):
            result = Interval(xp.asarray(a.lo).astype(new), xp.asarray(a.hi).astype(new), a.depends)
        return analysis.settle(result)
    if not jnp.issubdtype(new, np.integer):
        return None
    info = jnp.iinfo(new)
    if jnp.issubdtype(old, np.floating):
        a = analysis.settle(a)
        limit = 2.0 ** (info.bits - 1 - (info.min < 0)) if info.bits > 8 else 2.0 ** (info.bits - 1)
        known = (a.lo > (-limit if info.min < 0 else -0.5)) & (a.hi < limit)
        with np.errstate(all="ignore"):
            ends = [xp.where(known, end, 0).astype(new) for end in (a.lo, a.hi)]
        return anything_between(analysis, new, known, *ends, a.depends)
    source = jnp.iinfo(old)
    known = np.asarray(True)
    if source.min < info.min:
        known = known & (a.lo >= np.asarray(max(info.min, source.min), old))
    if source.max > info.max:
        known = known & (a.hi <= np.asarray(info.max, old))
    return anything_between(analysis, new, known, xp.asarray(a.lo).astype(new), xp.asarray(a.hi).astype(new), a.depends)


@rule("copy", "copy_p", "stop_gradient", "optimization_barrier", "pvary")
def _same(analysis: Analysis, equation: Any, *values: Interval):
    return list(values)
