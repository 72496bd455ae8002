"""Everything a training step carries from one update to the next."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from maskformer.objectives import Objective
from maskformer.training.losses import mean_names

NEVER = jnp.iinfo(jnp.int32).max


@struct.dataclass
class Window:
    """Sums since the last log line, kept on the device so that no step waits for the host.

    Every mean is a sum and a weight, divided once when the line is written. Counts are exact integers.
    `nonfinite` maps each watched metric to the first step at which it was NaN or infinite, or `NEVER`.
    Which means there are depends on what is trained (`losses.mean_names`).
    """

    sums: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    counts: dict[str, jax.Array]
    nonfinite: dict[str, jax.Array]
    learning_rate: jax.Array  # of the last step

    COUNTS = ("tokens", "predicted")
    WATCHED = ("loss", "grad_norm")

    @classmethod
    def empty(cls, means: tuple[str, ...]) -> Window:
        return cls(
            sums={name: jnp.zeros((), jnp.float32) for name in means},
            weights={name: jnp.zeros((), jnp.float32) for name in means},
            counts={name: jnp.zeros((), jnp.int32) for name in cls.COUNTS},
            nonfinite={name: jnp.full((), NEVER, jnp.int32) for name in cls.WATCHED},
            learning_rate=jnp.zeros((), jnp.float32),
        )

    def add(
        self,
        step: jax.Array,
        means: dict[str, tuple[jax.Array, jax.Array]],
        counts: dict[str, jax.Array],
        learning_rate: jax.Array,
    ) -> Window:
        """One more step's `(sum, weight)` pairs and counts."""

        def first_bad(name: str) -> jax.Array:
            return jnp.minimum(self.nonfinite[name], jnp.where(jnp.isfinite(means[name][0]), NEVER, step + 1))

        return Window(
            sums={name: sum_ + means[name][0] for name, sum_ in self.sums.items()},
            weights={name: weight + means[name][1] for name, weight in self.weights.items()},
            counts={name: self.counts[name] + counts[name] for name in self.COUNTS},
            nonfinite={name: first_bad(name) for name in self.WATCHED},
            learning_rate=jnp.asarray(learning_rate, jnp.float32),
        )


@struct.dataclass
class TrainState:
    """`step` counts finished updates. `ema` is None unless the optimizer's config asks for an average.

    `token_losses`, float32 [vocabulary], are the running losses that adaptive masking selects by; None without it.
    The window is part of the state, so that a run resumed between two log lines writes the same second line.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema: Any
    window: Window
    token_losses: jax.Array | None = None

    @property
    def evaluation_params(self) -> Any:
        """The averaged parameters where there are any."""
        return self.params if self.ema is None else self.ema


def create_state(
    key: jax.Array, init: Any, optimizer: optax.GradientTransformation, objective: Objective, ema: bool = False
) -> TrainState:
    """A fresh state; call it under `jit` with output shardings, so that each device makes only its own part."""
    params = init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        # A copy: the step donates its state, and two leaves may not share one buffer.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        window=Window.empty(mean_names(objective)),
        token_losses=objective.initial_token_losses(),
    )
