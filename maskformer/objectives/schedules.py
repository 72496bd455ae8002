"""Rates that change with the step. A schedule is traced, so a new value never compiles anything again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer import checks
from maskformer.checks import shown
from maskformer.objectives.counting import MOST, check_fraction, check_rate


@dataclass(frozen=True, eq=False)
class Schedule:
    """A rate as a function of the step, the largest value it takes (which sizes the static budget), and its first one
    (None where only a call would tell)."""

    function: Callable[[jax.Array], jax.Array]
    maximum: float
    description: str
    start: float | None = None

    def __call__(self, step: jax.Array) -> jax.Array:
        return jnp.clip(jnp.asarray(self.function(step), jnp.float32), 0.0, self.maximum)


def _steps(name: str, steps: Any) -> int:
    steps = _whole(f"{name} schedule: steps", steps)
    whole = isinstance(steps, float) and steps.is_integer()
    return checks.integer(f"{name} schedule: steps", int(steps) if whole else steps, 1, MOST)


def linear(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` in a straight line over `steps`, then constant (Ankner et al. 2024: .30 -> .15).

    >>> [round(float(linear(0.3, 0.15, 100)(s)), 4) for s in (0, 50, 100, 1000)]
    [0.3, 0.225, 0.15, 0.15]
    """
    start, end = check_fraction("schedule start", start), check_fraction("schedule end", end)
    steps = _steps("linear", steps)

    def function(step):
        return start + (end - start) * jnp.clip(step / steps, 0.0, 1.0)

    return Schedule(function, max(start, end), f"linear {start:g} -> {end:g} over {steps}", start)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` along half a cosine over `steps`, then constant.

    >>> [round(float(cosine(0.3, 0.15, 100)(s)), 4) for s in (0, 50, 100)]
    [0.3, 0.225, 0.15]
    """
    start, end = check_fraction("schedule start", start), check_fraction("schedule end", end)
    steps = _steps("cosine", steps)

    def function(step):
        return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(step / steps, 0.0, 1.0)))

    return Schedule(function, max(start, end), f"cosine {start:g} -> {end:g} over {steps}", start)


def step(values: Mapping[int, float]) -> Schedule:
    """Piecewise constant: `{first_step: rate}`, one entry for step 0.

    >>> [round(float(step({0: 0.3, 10: 0.15})(s)), 2) for s in (0, 9, 10, 99)]
    [0.3, 0.3, 0.15, 0.15]
    """
    expected = "a mapping such as {0: 0.3, 1000: 0.15}"
    checks.require(isinstance(values, Mapping), "step schedule: values", values, expected)
    firsts = {first: _whole("step schedule: first step", first) for first in values}
    for first in firsts.values():
        checks.integer("step schedule: first step", first, 0, MOST)
    pairs = sorted((firsts[s], check_fraction(f"schedule value at step {firsts[s]}", v)) for s, v in values.items())
    if not pairs or pairs[0][0] != 0:
        raise ValueError(f"step schedule {shown(dict(values))}: expected an entry for step 0")
    starts = np.asarray([s for s, _ in pairs], np.int32)
    rates = np.asarray([v for _, v in pairs], np.float32)

    def function(at):
        return jnp.asarray(rates)[jnp.sum(at >= jnp.asarray(starts)) - 1]

    return Schedule(function, max(v for _, v in pairs), f"step {dict(pairs)}", pairs[0][1])


def optax_schedule(function: Callable[[jax.Array], jax.Array], maximum: float) -> Schedule:
    """Any function of the step, an Optax schedule for one. Values above `maximum` are cut to it.

    >>> float(optax_schedule(lambda s: 0.1 + 0.0 * s, 0.3)(5)) == float(jnp.float32(0.1))
    True
    """
    return Schedule(function, check_fraction("schedule maximum", maximum), "function of the step")


def in_steps(params: Any, steps: int) -> Any:
    """The parameters of an objective with the shares of a run that its schedules name, such as "50%", as steps.

    A share may stand where a schedule has a step: as a key of a step schedule's `values`, or as `steps`. Training
    configs are read through this, so that a schedule follows the run's length.

    Args:
      params: mappings and lists as in a config.
      steps: updates of the run; a share of them is rounded down.

    Raises:
      ValueError: not a share, or two values that begin at the same step.

    >>> in_steps({"name": "mlm", "rate": {"schedule": "step", "values": {"0": 0.3, "50%": 0.15}}}, 1000)["rate"]
    {'schedule': 'step', 'values': {'0': 0.3, '500': 0.15}}
    >>> in_steps({"rate": {"schedule": "linear", "start": 0.3, "end": 0.15, "steps": "100%"}}, 1000)["rate"]["steps"]
    1000
    """
    if isinstance(params, list | tuple):
        return type(params)(in_steps(value, steps) for value in params)
    if not isinstance(params, Mapping):
        return params
    # An objective has a name; a `schedule` among its parameters is a mistake, which whoever makes it names.
    if "name" in params:
        return {key: in_steps(value, steps) for key, value in params.items()}
    if params.get("schedule") == "step":
        values = step_values(params)
        if not isinstance(values, Mapping):
            return dict(params)  # `step` says what is wrong with it
        counted: dict[Any, Any] = {}
        for key, value in values.items():
            first = str(_share(key, steps)) if _is_share(key) else key
            if first in counted:
                raise ValueError(
                    f"step schedule {shown(dict(values))}: two values begin at step {first} of {steps} steps"
                )
            counted[first] = value
        return {"schedule": "step", "values": counted}
    if "schedule" in params and _is_share(params.get("steps")):
        return {**params, "steps": max(_share(params["steps"], steps), 1)}
    return {key: in_steps(value, steps) for key, value in params.items()}


def step_values(params: Mapping[str, Any]) -> Mapping[Any, Any]:
    """The `{first_step: rate}` of a step schedule in a config."""
    return params.get("values", {key: value for key, value in params.items() if key != "schedule"})


def _is_share(value: Any) -> bool:
    return isinstance(value, str) and value.endswith("%")


def _share(text: str, steps: int) -> int:
    try:
        share = Fraction(text[:-1].strip()) / 100
    except (ValueError, ZeroDivisionError):
        share = Fraction(-1)
    if not 0 <= share <= 1:
        raise ValueError(f"schedule at {shown(text)}: expected a share of the run such as '50%'")
    return int(share * steps)


def _whole(name: str, value: Any) -> Any:
    """`value`, or the whole number that it spells."""
    if _is_share(value):
        raise ValueError(
            f"{name}={shown(value)} is a share of a run, whose length only a training config knows; give a number of "
            "steps, or read the parameters through schedules.in_steps(params, steps)"
        )
    if not isinstance(value, str):
        return value
    # Longer than any number of steps, and Python refuses to read thousands of digits.
    spelt = value.isdecimal() and len(value) < 20
    checks.require(spelt, name, value, "a number of steps, or a share of the run such as '50%'")
    return int(value)


_NAMED = {"linear": linear, "cosine": cosine, "step": step}


def as_rate(name: str, value: Any) -> float | Schedule:
    """A constant rate, a `Schedule`, or a mapping from a config such as `{"schedule": "linear", "start": .3, ...}`.

    A schedule may begin or end at 0; a rate that is always 0 predicts nothing.

    Raises:
      ValueError: names `name`, the value and what was expected.

    >>> as_rate("rate", {"schedule": "step", "values": {"0": 0.3, "500": 0.15}}).description
    'step {0: 0.3, 500: 0.15}'
    """
    if isinstance(value, Mapping):
        value = from_mapping(name, value)
    if isinstance(value, Schedule):
        if not value.maximum > 0:
            raise ValueError(f"{name}: {value.description} is 0 at every step, so nothing is hidden or predicted")
        return value
    if callable(value):
        raise ValueError(
            f"{name}: a bare function has no known maximum, which sizes the prediction budget; "
            "wrap it: objectives.schedules.optax_schedule(function, maximum)"
        )
    return check_rate(name, value)


def from_mapping(name: str, params: Mapping[str, Any]) -> Schedule:
    """The schedule that a config writes as `params`.

    Raises:
      ValueError: names `name`, the value and what was expected.
    """
    options = dict(params)
    kind = options.pop("schedule", None)
    checks.choose(f"{name}.schedule", kind, tuple(_NAMED))
    try:
        if kind == "step":
            return step(step_values(options))
        return _NAMED[kind](**options)
    except TypeError as error:
        got = shown(sorted(options))
        raise ValueError(f"{name}: a {kind} schedule takes start, end and steps, got {got}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def maximum(rate: float | Schedule) -> float:
    return rate.maximum if isinstance(rate, Schedule) else rate


def starts_at_zero(rate: float | Schedule) -> bool:
    """Whether a rate that changes with the step begins at 0."""
    return isinstance(rate, Schedule) and rate.start == 0.0
