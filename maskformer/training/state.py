"""Everything a training step carries from one update to the next."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

NEVER = jnp.iinfo(jnp.int32).max


@struct.dataclass
class Window:
    """Sums since the last log line, kept on the device so that no step waits for the host.

    Every mean is a sum and a weight, divided once when the line is written. Counts are exact integers.
    `nonfinite` maps each watched metric to the first step at which it was NaN or infinite, or `NEVER`.
    """

    sums: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    counts: dict[str, jax.Array]
    nonfinite: dict[str, jax.Array]
    learning_rate: jax.Array  # of the last step

    MEANS = ("loss", "accuracy", "grad_norm")
    COUNTS = ("tokens", "predicted", "steps")
    WATCHED = ("loss", "grad_norm")

    @classmethod
    def empty(cls) -> Window:
        return cls(
            sums={name: jnp.zeros((), jnp.float32) for name in cls.MEANS},
            weights={name: jnp.zeros((), jnp.float32) for name in cls.MEANS},
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
            sums={name: self.sums[name] + means[name][0] for name in self.MEANS},
            weights={name: self.weights[name] + means[name][1] for name in self.MEANS},
            counts={name: self.counts[name] + counts[name] for name in self.COUNTS},
            nonfinite={name: first_bad(name) for name in self.WATCHED},
            learning_rate=jnp.asarray(learning_rate, jnp.float32),
        )


@struct.dataclass
class TrainState:
    """`step` counts finished updates. `ema` is None unless the optimizer's config asks for an average.

    The window is part of the state, so that a run resumed between two log lines writes the same second line.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema: Any
    window: Window

    @property
    def evaluation_params(self) -> Any:
        """The averaged parameters where there are any."""
        return self.params if self.ema is None else self.ema


def create_state(key: jax.Array, init: Any, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    """A fresh state; call it under `jit` with output shardings, so that each device makes only its own part."""
    params = init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        # A copy: the step donates its state, and two leaves may not share one buffer.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        window=Window.empty(),
    )
