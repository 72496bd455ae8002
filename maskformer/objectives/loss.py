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
    weights = weights.astype(jnp.float32)
    losses = token_cross_entropy(logits, targets, weights > 0, label_smoothing)
    return jnp.sum(losses * weights), jnp.sum(weights)


def token_cross_entropy(
    logits: jax.Array, targets: jax.Array, used: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy of each slot, float32 `[...]` in nats, without weights; finite in slots that are not `used`.

    Args:
      logits, targets, label_smoothing: as in `cross_entropy`.
      used: bool `[...]`; the logits of other slots are not looked at.
    """
    check_fraction("label_smoothing", label_smoothing)
    logits = logits.astype(jnp.float32)
    # A row of NaN or inf in an unused slot would turn 0 * NaN into NaN, also in the gradient.
    logits = jnp.where(used[..., None], logits, 0.0)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None].astype(jnp.int32), axis=-1)[..., 0]
    losses = normalizer - picked
    if label_smoothing:
        uniform = normalizer - jnp.mean(logits, axis=-1)
        losses = (1.0 - label_smoothing) * losses + label_smoothing * uniform
    return losses


def update_token_losses(
    table: jax.Array, targets: jax.Array, losses: jax.Array, used: jax.Array, decay: float = 0.99
) -> jax.Array:
    """Running mean loss of every token, the weights of adaptive masking.

    Args:
      table: float `[vocabulary]`, the means so far; `Objective.initial_token_losses` to start from.
      targets: int `[...]`; losses: float `[...]` from `token_cross_entropy`; used: bool `[...]`.
      decay: share of the old mean that stays when a token is seen again. Tokens not in the batch keep theirs.

    >>> table = update_token_losses(jnp.ones(3), jnp.array([1, 1, 2]), jnp.array([2.0, 4.0, 9.0]),
    ...                             jnp.array([True, True, False]), decay=0.5)
    >>> table.tolist()
    [1.0, 2.0, 1.0]
    """
    return move_token_losses(table, *token_loss_sums(targets, losses, used, table.shape[0]), decay)


def token_loss_sums(
    targets: jax.Array, losses: jax.Array, used: jax.Array, vocabulary_size: int
) -> tuple[jax.Array, jax.Array]:
    """(sum of losses, number) of every token, float32 `[vocabulary]` each: what parts of a batch add up.

    Args: as of `update_token_losses`.
    """
    at = jnp.where(used, targets, vocabulary_size).reshape(-1)
    zeros = jnp.zeros(vocabulary_size, jnp.float32)
    total = zeros.at[at].add(losses.reshape(-1).astype(jnp.float32), mode="drop")
    return total, zeros.at[at].add(1.0, mode="drop")


def move_token_losses(table: jax.Array, total: jax.Array, count: jax.Array, decay: float = 0.99) -> jax.Array:
    """`update_token_losses` from the sums of a whole batch."""
    check_fraction("decay", decay)
    return jnp.where(count > 0, decay * table + (1.0 - decay) * total / jnp.maximum(count, 1.0), table)


def suppress(logits: jax.Array, token: int) -> jax.Array:
    """`logits` `[..., vocabulary]` with one token ruled out.

    The most negative finite value gives it exactly zero probability and zero gradient; minus infinity would too, but
    turns a target of weight 0 into inf * 0.
    """
    lowest = jnp.finfo(logits.dtype).min
    return jnp.where(jnp.arange(logits.shape[-1]) == token, lowest, logits)
