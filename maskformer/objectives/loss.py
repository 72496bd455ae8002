"""Cross-entropy on predicted positions, as (sum, weight) so that it is divided once, globally."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskformer.objectives.counting import check_fraction


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of cross-entropies, and the sum of the weights.

    Args:
      logits: `[..., vocabulary]`, any float dtype; the reduction is done in float32.
      targets: int `[...]`.
      weights: float `[...]`; a slot of weight 0 adds exactly 0, whatever its logits are, and sends no gradient.
      label_smoothing: share s of the target spread evenly over the vocabulary: the target distribution is
        `(1 - s) * onehot + s / vocabulary` (Szegedy et al. 2016, section 7).

    Returns:
      (loss_sum, weight_sum), float32 scalars, in nats. Divide after summing over devices and microbatches; the
      divisor of an empty batch is 0, so divide by `max(weight_sum, tiny)` where that can happen.

    >>> loss, weight = cross_entropy(jnp.zeros((2, 4)), jnp.array([1, 3]), jnp.array([1.0, 0.0]))
    >>> round(float(loss), 4), float(weight)   # log 4 on the one weighted slot
    (1.3863, 1.0)
    """
    check_fraction("label_smoothing", label_smoothing)
    logits = logits.astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    # A row of NaN or inf in an unused slot would turn 0 * NaN into NaN, also in the gradient.
    logits = jnp.where((weights > 0)[..., None], logits, 0.0)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None].astype(jnp.int32), axis=-1)[..., 0]
    losses = normalizer - picked
    if label_smoothing:
        uniform = normalizer - jnp.mean(logits, axis=-1)
        losses = (1.0 - label_smoothing) * losses + label_smoothing * uniform
    return jnp.sum(losses * weights), jnp.sum(weights)


def suppress(logits: jax.Array, token: int) -> jax.Array:
    """`logits` `[..., vocabulary]` with one token ruled out.

    The most negative finite value gives it exactly zero probability and zero gradient; minus infinity would too, but
    turns a target of weight 0 into inf * 0.
    """
    lowest = jnp.finfo(logits.dtype).min
    return jnp.where(jnp.arange(logits.shape[-1]) == token, lowest, logits)
