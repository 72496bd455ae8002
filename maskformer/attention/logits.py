"""What happens to a tile of logits between ``QK^T`` and the softmax. Every pure-JAX backend goes through here."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskformer.attention import dropout
from maskformer.attention.score_mods import Lifted


def transform(
    scores: jax.Array,
    *,
    bias: jax.Array | None,
    score_mod: Lifted | None,
    captured: tuple[jax.Array, ...],
    soft_cap: float | None,
    places: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
) -> jax.Array:
    """``soft_cap * tanh(score_mod(scores + bias) / soft_cap)``.

    Args:
      scores: float32 [batch, heads, q, k], already scaled.
      bias: broadcasts to ``scores``, or None.
      score_mod: lifted score_mod, or None.
      captured: the arrays ``score_mod`` captured.
      soft_cap: positive number, or None.
      places: int32 vectors: batch index, head index, query position, key position of the tile's axes.

    Returns:
      float32 [batch, heads, q, k].
    """
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    if score_mod is not None:
        scores = score_mod.apply(captured, scores, *places)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    return scores


def keep(
    seed: jax.Array, rate: float, places: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
) -> jax.Array:
    """Which attention probabilities survive dropout: bool [batch, heads, q, k].

    A function of global places only, so that any tiling, sharding or chunking of a call drops the same entries.
    """
    batch, head, q, k = places
    rows = dropout.row_state(seed, batch[:, None, None, None], head[:, None, None], q[:, None])
    return dropout.keep(rows, k, rate)
