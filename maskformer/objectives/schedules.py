"""Rates that change with the step. A schedule is traced, so a new value never compiles anything again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maskformer.objectives.counting import check_fraction


@dataclass(frozen=True, eq=False)
class Schedule:
    """A rate as a function of the step, and the largest value it takes (which sizes the static budget)."""

    function: Callable[[jax.Array], jax.Array]
    maximum: float
    description: str

    def __call__(self, step: jax.Array) -> jax.Array:
        return jnp.clip(jnp.asarray(self.function(step), jnp.float32), 0.0, self.maximum)


def _steps(name: str, steps: Any) -> int:
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ValueError(f"{name} schedule: steps={steps!r}, expected a whole number of at least 1")
    return int(steps)


def linear(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` in a straight line over `steps`, then constant (Ankner et al. 2024: .30 -> .15).

    >>> [round(float(linear(0.3, 0.15, 100)(s)), 4) for s in (0, 50, 100, 1000)]
    [0.3, 0.225, 0.15, 0.15]
    """
    start, end = check_fraction("schedule start", start), check_fraction("schedule end", end)
    steps = _steps("linear", steps)

    def function(step):
        return start + (end - start) * jnp.clip(step / steps, 0.0, 1.0)

    return Schedule(function, max(start, end), f"linear {start:g} -> {end:g} over {steps}")


def cosine(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` along half a cosine over `steps`, then constant.

    >>> [round(float(cosine(0.3, 0.15, 100)(s)), 4) for s in (0, 50, 100)]
    [0.3, 0.225, 0.15]
    """
    start, end = check_fraction("schedule start", start), check_fraction("schedule end", end)
    steps = _steps("cosine", steps)

    def function(step):
        return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(step / steps, 0.0, 1.0)))

    return Schedule(function, max(start, end), f"cosine {start:g} -> {end:g} over {steps}")


def step(values: Mapping[int, float]) -> Schedule:
    """Piecewise constant: `{first_step: rate}`, one entry for step 0.

    >>> [round(float(step({0: 0.3, 10: 0.15})(s)), 2) for s in (0, 9, 10, 99)]
    [0.3, 0.3, 0.15, 0.15]
    """
    pairs = sorted((int(s), check_fraction(f"schedule value at step {s}", v)) for s, v in values.items())
    if not pairs or pairs[0][0] != 0:
        raise ValueError(f"step schedule {dict(values)}: expected an entry for step 0")
    starts = jnp.asarray([s for s, _ in pairs])
    rates = jnp.asarray([v for _, v in pairs], jnp.float32)

    def function(at):
        return rates[jnp.sum(at >= starts) - 1]

    return Schedule(function, max(v for _, v in pairs), f"step {dict(pairs)}")


def optax_schedule(function: Callable[[jax.Array], jax.Array], maximum: float) -> Schedule:
    """Any function of the step, an Optax schedule for one. Values above `maximum` are cut to it.

    >>> float(optax_schedule(lambda s: 0.1 + 0.0 * s, 0.3)(5)) == float(jnp.float32(0.1))
    True
    """
    return Schedule(function, check_fraction("schedule maximum", maximum), "function of the step")


_NAMED = {"linear": linear, "cosine": cosine, "step": step}


def as_rate(name: str, value: Any) -> float | Schedule:
    """A constant rate, a `Schedule`, or a mapping from a config such as `{"schedule": "linear", "start": .3, ...}`."""
    if isinstance(value, Schedule):
        return value
    if isinstance(value, Mapping):
        options = dict(value)
        kind = options.pop("schedule", None)
        if kind not in _NAMED:
            raise ValueError(f"{name}.schedule={kind!r}: expected one of {', '.join(_NAMED)}")
        if kind == "step":
            options = options.get("values", options)
            return step({int(k): v for k, v in options.items()})
        try:
            return _NAMED[kind](**options)
        except TypeError as error:
            raise ValueError(f"{name}: a {kind} schedule takes start, end and steps, got {sorted(options)}") from error
    if callable(value):
        raise ValueError(
            f"{name}: a bare function has no known maximum, which sizes the prediction budget; "
            "wrap it: objectives.schedules.optax_schedule(function, maximum)"
        )
    return check_fraction(name, value)


def maximum(rate: float | Schedule) -> float:
    return rate.maximum if isinstance(rate, Schedule) else rate
