"""Which corrupted positions are predicted, and with what weight: `predict(key, selection) -> float32 [length]`."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maskformer.objectives.rows import Selection


@dataclass(frozen=True)
class PredictCorrupted:
    """Every corrupted position, with weight 1."""

    def __call__(self, key: jax.Array, selection: Selection) -> jax.Array:
        return selection.chosen.astype(jnp.float32)
