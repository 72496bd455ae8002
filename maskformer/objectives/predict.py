"""Which corrupted positions are predicted, and with what weight: `predict(key, row, selection) -> float32 [length]`."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maskformer.objectives import randomness
from maskformer.objectives.counting import Count, top_n
from maskformer.objectives.rows import Row, Selection

# Stage of the row key.
SUBSET = 30


@dataclass(frozen=True)
class PredictCorrupted:
    """Every corrupted position, with weight 1."""

    def __call__(self, key: jax.Array, row: Row, selection: Selection) -> jax.Array:
        return selection.chosen.astype(jnp.float32)


@dataclass(frozen=True, eq=False)
class PredictSome:
    """`count` of the corrupted positions, uniformly: a prediction rate below the corruption rate.

    Wettig et al. 2022, section 4, separate the two: more corruption makes each prediction harder, more predictions
    give more signal per row.
    """

    count: Count

    def __call__(self, key: jax.Array, row: Row, selection: Selection) -> jax.Array:
        draw = randomness.bits(key, SUBSET, selection.chosen.shape)
        count = self.count(key, row.size)
        return top_n(draw, selection.chosen, count, self.count.largest()).astype(jnp.float32)
