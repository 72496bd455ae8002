"""Everything a training step carries from one update to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maskformer.training.precision import average_start
from maskformer.training.tasks import Task

NEVER = jnp.iinfo(jnp.int32).max

# Counts are two int32 digits of this base: a window may see more tokens than one int32 holds.
COUNT_BASE = 2**30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """Sums since the last log line, kept on the device so that no step waits for the host.

    Every mean is a sum and a weight, divided once when the line is written. Counts are exact integers, `[high, low]` in
    base `COUNT_BASE`. `nonfinite` maps each watched metric, the terms of the loss and the gradient's norm, to the first
    step at which it was NaN or infinite, or `NEVER`.
    """

    sums: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    counts: dict[str, jax.Array]
    nonfinite: dict[str, jax.Array]
    learning_rate: jax.Array  # of the last step

    COUNTS = ("tokens", "predicted")

    @classmethod
    def empty(cls, task: Task) -> Window:
        means = (*task.factors, *task.means, "grad_norm")
        if len(task.factors) > 1:
            means += ("joint_loss",)
        return cls(
            sums={name: jnp.zeros((), jnp.float32) for name in means},
            weights={name: jnp.zeros((), jnp.float32) for name in means},
            counts={name: jnp.zeros(2, jnp.int32) for name in cls.COUNTS},
            nonfinite={name: jnp.full((), NEVER, jnp.int32) for name in (*task.factors, "grad_norm")},
            learning_rate=jnp.zeros((), jnp.float32),
        )

    def add(
        self,
        step: jax.Array,
        means: dict[str, tuple[jax.Array, jax.Array]],
        counts: dict[str, jax.Array],
        learning_rate: jax.Array,
    ) -> Window:
        """One more step's `(sum, weight)` pairs, and counts below `COUNT_BASE`."""

        def first_bad(name: str) -> jax.Array:
            return jnp.minimum(self.nonfinite[name], jnp.where(jnp.isfinite(means[name][0]), NEVER, step + 1))

        def counted(name: str) -> jax.Array:
            high, low = self.counts[name]
            low = low + counts[name]
            return jnp.stack([high + low // COUNT_BASE, low % COUNT_BASE])

        return Window(
            sums={name: sum_ + means[name][0] for name, sum_ in self.sums.items()},
            weights={name: weight + means[name][1] for name, weight in self.weights.items()},
            counts={name: counted(name) for name in self.COUNTS},
            nonfinite={name: first_bad(name) for name in self.nonfinite},
            learning_rate=jnp.asarray(learning_rate, jnp.float32),
        )

    def count(self, name: str) -> int:
        """A count of a window that is on the host."""
        high, low = self.counts[name]
        return int(high) * COUNT_BASE + int(low)

    def means(self) -> dict[str, float]:
        """The means of a window that is on the host. One of weight 0 is left out: it says nothing, least of all 0."""
        return {name: float(total / self.weights[name]) for name, total in self.sums.items() if self.weights[name] > 0}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """`step` counts finished updates. `ema` is None unless the optimizer's config asks for an average.

    `task` is what the task carries (`Task.initial_state`); None for most. The window is part of the state, so that a
    run resumed between two log lines writes the same second line.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema: Any
    window: Window
    task: Any = None

    @property
    def evaluation_params(self) -> Any:
        """The averaged parameters where there are any."""
        return self.params if self.ema is None else self.ema


def create_state(
    key: jax.Array, task: Task, optimizer: optax.GradientTransformation, ema: bool = False
) -> TrainState:
    """A fresh state; call it under `jit` with output shardings, so that each device makes only its own part."""
    params = task.model.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=average_start(params) if ema else None,
        window=Window.empty(task),
        task=task.initial_state(),
    )
