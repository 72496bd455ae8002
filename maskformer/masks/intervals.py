"""Interval analysis of a predicate: what it can be on a whole tile, without looking inside.

A leaf's predicate is traced once, on scalar positions, to a jaxpr. The jaxpr is then interpreted over
*intervals*: each value stands for its smallest and largest value over a tile, for many tiles at once. For the
boolean result those two are exactly ``(all, any)``: full tiles have ``all``, empty ones lack ``any``.

Every rule may give an interval that is too wide, never one that is too narrow, so a tile can at worst be
called partial when it is not. A primitive without a rule widens to "anything" and is reported. The same code
runs on NumPy arrays (static masks, while tracing) and on traced arrays.

A value remembers what it depends on (nothing, the query, the key, both), so that what depends on the query
alone is computed once per q-block rather than once per tile.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

NEITHER, QUERY, KEY, BOTH = 0, 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Interval:
    """All values lie in ``[lo, hi]``, elementwise; arrays of shape ``[*tiles, *value.shape]``.

    ``tiles`` is ``()``, ``(q_blocks,)``, ``(kv_blocks,)`` or the shape of the tile set, as ``depends`` says. A
    known constant has ``lo is hi``. For floats a non-finite end means "anything, NaN included". Types without an order
    (complex numbers, random keys) have no ends: both are None.
    """

    lo: Any
    hi: Any
    depends: int = NEITHER

    @property
    def exact(self) -> bool:
        return self.lo is self.hi and self.lo is not None and self.depends == NEITHER


class TilesLike(Protocol):
    """What the analysis needs to know of a set of tiles; see ``tiles.TileSet``."""

    @property
    def xp(self) -> Any:
        """numpy, or jax.numpy where arrays are traced."""

    def expand(self, array: Any, depends: int) -> Any:
        """``[q_blocks, ...]`` or ``[kv_blocks, ...]`` to ``[*tiles, ...]``."""

    def unit(self, depends: int, size: int) -> int:
        """The length of the finest tiles along what an index depends on."""

    @property
    def tables(self) -> dict[Any, Any]:
        """Tables made so far of the arrays read; shared by tile sets of one search."""

    @property
    def finest(self) -> bool:
        """Whether these are the tiles asked for, not coarser ones on the way there."""

    def shape(self, depends: int) -> tuple[int, ...]:
        """The leading tile dimensions of a value."""

    def lead(self, depends: int) -> int:
        """How many those are."""


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers ``rule(analysis, equation, *intervals) -> Interval | None`` (None: no luck, widen)."""

    def register(function: Rule) -> Rule:
        for name in primitives:
            RULES[name] = function
        return function

    return register


def elementwise(*primitives: str) -> Callable[[Rule], Rule]:
    """As ``rule``, for primitives that work element by element; they take a scalar beside an array."""

    def register(function: Rule) -> Rule:
        def grown(analysis: Analysis, equation: Any, *inputs: Interval) -> Any:
            ranks = [variable.aval.ndim for variable in equation.invars]
            inputs = tuple(
                analysis.grow(value, max(ranks)) if rank == 0 and max(ranks) else value
                for value, rank in zip(inputs, ranks)
            )
            return function(analysis, equation, *inputs)

        rule(*primitives)(grown)
        return function

    return register


class Analysis:
    """Interprets jaxprs over the intervals of one set of tiles."""

    def __init__(self, tiles: TilesLike):
        self.tiles, self.xp = tiles, tiles.xp
        self.widened: set[str] = set()

    def run(self, jaxpr: Any, consts: Sequence[Interval], arguments: Sequence[Interval]) -> list[Interval]:
        values: dict[Any, Interval] = {}
        values.update(zip(jaxpr.constvars, consts))
        values.update(zip(jaxpr.invars, arguments))

        def read(atom: Any) -> Interval:
            if hasattr(atom, "val"):
                return self.constant(np.asarray(atom.val, atom.aval.dtype))
            return values[atom]

        for equation in jaxpr.eqns:
            results = self.equation(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, inputs: list[Interval]) -> list[Interval]:
        name = equation.primitive.name
        inner = _inner_jaxpr(equation)
        if inner is not None:
            idiom = RULES.get(f"jnp.{equation.params.get('name')}")
            if idiom is not None and is_library_function(equation):
                result = idiom(self, equation, *inputs)
                if result is not None:
                    return [result]
            return self.run(inner.jaxpr, [self.constant(const) for const in inner.consts], inputs)
        if inputs and all(value.exact for value in inputs) and not equation.effects:
            return self.fold(equation, inputs)
        found = RULES.get(name)
        result = None
        if found is not None and all(map(has_order, inputs)):
            result = found(self, equation, *inputs)
        if result is None:
            self.widened.add(name)
            return [self.anything(variable.aval) for variable in equation.outvars]
        return list(result) if isinstance(result, (list, tuple)) else [result]

    def fold(self, equation: Any, inputs: list[Interval]) -> list[Interval]:
        """An equation between constants is simply computed."""
        at_once = jax.ensure_compile_time_eval() if self.xp is np else contextlib.nullcontext()
        with at_once:
            results = equation.primitive.bind(*[jnp.asarray(value.lo) for value in inputs], **equation.params)
        return [self.constant(result) for result in (results if equation.primitive.multiple_results else [results])]

    def constant(self, value: Any) -> Interval:
        """A known value, the same on every tile."""
        if isinstance(value, jax.core.Tracer):
            if self.xp is np:
                return self.anything(value.aval)
        elif self.xp is np or np.size(value) == 1:
            if not jnp.issubdtype(getattr(value, "dtype", np.int32), jax.dtypes.extended):
                value = np.asarray(value)
        return Interval(value, value)

    def anything(self, aval: Any) -> Interval:
        """No knowledge at all of a value."""
        ends = _range(aval.dtype)
        if ends is None:
            return Interval(None, None)
        lo, hi = (np.broadcast_to(np.asarray(end, aval.dtype), aval.shape) for end in ends)
        return Interval(lo, hi)

    # --- helpers of the rules -------------------------------------------------------------------------------

    def align(self, *values: Interval) -> tuple[int, list[Interval]]:
        """The values over a common set of tiles, ready for elementwise arithmetic."""
        depends = 0
        for value in values:
            depends |= value.depends
        return depends, [self.expand(value, depends) for value in values]

    def expand(self, value: Interval, depends: int) -> Interval:
        if value.depends in (depends, NEITHER):
            return value
        grow = self.tiles.expand
        return Interval(grow(value.lo, value.depends), grow(value.hi, value.depends), depends)

    def grow(self, value: Interval, rank: int) -> Interval:
        """A scalar as an array of ``rank`` dimensions of size 1."""
        if value.lo is None:
            return value
        lo = self.xp.reshape(value.lo, np.shape(value.lo) + (1,) * rank)
        return Interval(lo, lo if value.exact else self.xp.reshape(value.hi, lo.shape), value.depends)

    def lead(self, value: Interval) -> int:
        return self.tiles.lead(value.depends)

    def settle(self, value: Interval) -> Interval:
        """Restores the rule for floats: an end that is not finite says nothing about the other either."""
        if not jnp.issubdtype(value.lo.dtype, np.floating):
            return value
        xp = self.xp
        with np.errstate(all="ignore"):
            known = xp.isfinite(value.lo) & xp.isfinite(value.hi)
        infinity = np.asarray(np.inf, value.lo.dtype)
        return Interval(xp.where(known, value.lo, -infinity), xp.where(known, value.hi, infinity), value.depends)

    def loosen(self, value: Interval, relative: float = 0.0) -> Interval:
        """Room for rounding: backends may round a float operation differently (fused, or in more bits)."""
        dtype = value.lo.dtype
        info = jnp.finfo(dtype)
        xp, share = self.xp, max(relative, 4 * float(info.eps))
        with np.errstate(all="ignore"):
            room, least = np.asarray(share, dtype), np.asarray(info.tiny, dtype)
            lo, hi = value.lo - (xp.abs(value.lo) * room + least), value.hi + (xp.abs(value.hi) * room + least)
            return self.settle(Interval(lo, hi, value.depends))


def anything_between(analysis: Analysis, dtype: Any, known: Any, lo: Any, hi: Any, depends: int) -> Interval:
    """``[lo, hi]`` where ``known``, else the whole range of the type."""
    ends = _range(dtype)
    assert ends is not None
    low, high = (np.asarray(end, dtype) for end in ends)
    xp = analysis.xp
    return Interval(xp.where(known, lo, low), xp.where(known, hi, high), depends)


def _range(dtype: Any) -> tuple[Any, Any] | None:
    if jnp.issubdtype(dtype, np.bool_):
        return False, True
    if jnp.issubdtype(dtype, np.integer):
        info = jnp.iinfo(dtype)
        return info.min, info.max
    if jnp.issubdtype(dtype, np.floating):
        return -np.inf, np.inf
    return None


def has_order(value: Interval) -> bool:
    """Whether a value has ends to reason about: complex numbers and random keys have none, known or not."""
    return value.lo is not None and _range(value.lo.dtype) is not None


_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


def _inner_jaxpr(equation: Any) -> Any:
    """The closed jaxpr of a call-like equation, or None."""
    parameter = _CALLS.get(equation.primitive.name)
    inner = equation.params.get(parameter) if parameter else None
    if inner is None:
        return None
    if hasattr(inner, "consts"):
        return inner
    return jax.extend.core.ClosedJaxpr(inner, ())


_LIBRARY: dict[tuple[Any, ...], bool] = {}


def is_library_function(equation: Any) -> bool:
    """Whether a nested jit named like a ``jnp`` function really is that function.

    ``//`` and ``%`` trace to a page of primitives whose intervals would be poor; they are recognised by name, and
    the name is believed only if tracing the ``jnp`` function gives the same program.
    """
    inner = equation.params["jaxpr"]
    name = equation.params["name"]
    text = str(inner.jaxpr)
    key = (name, text)
    if key not in _LIBRARY:
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in inner.in_avals]
        reference = jax.make_jaxpr(getattr(jnp, name))(*avals).eqns
        _LIBRARY[key] = any(
            eqn.params.get("name") == name and str(eqn.params["jaxpr"].jaxpr) == text for eqn in reference
        )
    return _LIBRARY[key]
