"""Metrics of predicted tokens as (sum, weight) pairs, merged over batches and devices and divided once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.objectives import Corrupted, Objective
from maskformer.objectives.loss import token_cross_entropy

# metric name -> float32 [2]: sum, weight.
Sums = dict[str, jax.Array]

# What stood at a predicted position in the input; the indices are those of `Corrupted.kinds`.
KINDS = ("mask", "random", "keep")


def prediction_sums(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    kinds: jax.Array | None = None,
    *,
    unigram: jax.Array | None = None,
) -> Sums:
    """Sums of loss (nats), top-1 and top-5 accuracy, over all predicted positions and by kind of replacement.

    Args:
      logits: [batch, predicted, vocabulary].
      targets: int [batch, predicted].
      weights: [batch, predicted]; 0 where a slot is unused.
      kinds: int [batch, predicted], index into `KINDS`; None leaves the split out.
      unigram: log-probabilities [vocabulary] of a model that ignores the context; its loss and accuracy are added
        for comparison. None leaves them out.

    Returns:
      For each metric its sum and its weight, float32 [2].
    """
    weights = weights.astype(jnp.float32)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    target_log_probs = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)
    loss = -target_log_probs[..., 0]
    # The target's rank by counting better tokens: no sort. Ties count against the target's later competitors.
    better = jnp.sum(log_probs > target_log_probs, axis=-1)
    top1, top5 = better == 0, better < 5

    def pair(values: jax.Array, where: jax.Array) -> jax.Array:
        # An unused slot may hold any logits; its loss must not turn the sum into NaN.
        return jnp.stack([jnp.sum(jnp.where(where > 0, values, 0.0) * where), jnp.sum(where)])

    sums = {"loss": pair(loss, weights), "accuracy": pair(top1, weights), "accuracy_top5": pair(top5, weights)}
    if kinds is not None:
        for index, kind in enumerate(KINDS):
            of_kind = weights * (kinds == index)
            sums[f"loss_{kind}"] = pair(loss, of_kind)
            sums[f"accuracy_{kind}"] = pair(top1, of_kind)
    if unigram is not None:
        sums["unigram_loss"] = pair(-unigram[targets], weights)
        sums["unigram_accuracy"] = pair(targets == jnp.argmax(unigram), weights)
    return sums


def objective_sums(
    objective: Objective, logits: jax.Array, corrupted: Corrupted, *, unigram: jax.Array | None = None
) -> Sums:
    """`prediction_sums` with the loss as the objective itself defines it.

    For most that is the mean over predicted tokens. Diffusion weighs its predictions by their rate and divides by all
    tokens: `loss` is then that, as in training, and `token_loss` the plain mean over predicted tokens, in the place of
    a perplexity. `unigram_loss` is weighted and divided as `loss` is; the accuracies are means over predictions under
    their weights. All are of the logits as the objective has them (`Objective.transform_logits`).

    Args:
      logits: [batch, predicted, vocabulary], of the model that read `corrupted`.
      unigram: as in `prediction_sums`.
    """
    logits = objective.transform_logits(logits, corrupted)
    targets, weights = corrupted.target_tokens, corrupted.loss_weights
    if objective.loss_is_mean:
        return prediction_sums(logits, targets, weights, corrupted.kinds, unigram=unigram)
    sums = prediction_sums(logits, targets, weights, unigram=unigram)
    used = weights > 0
    loss, denominator = objective.loss(logits, corrupted)
    sums["loss"] = jnp.stack([loss, denominator])
    sums["token_loss"] = jnp.stack(
        [jnp.sum(jnp.where(used, token_cross_entropy(logits, targets, used), 0.0)), jnp.sum(used).astype(jnp.float32)]
    )
    if unigram is not None:
        sums["unigram_loss"] = sums["unigram_loss"].at[1].set(denominator)
    return sums


def finish(sums: Mapping[str, np.ndarray | jax.Array]) -> dict[str, float]:
    """Means from merged sums; a metric of zero weight (no token of that kind) is left out.

    `perplexity` is the exponential of the mean loss over predicted tokens; where the loss is something else
    (`objective_sums`) there is none.

    Raises:
      ValueError: nothing was predicted at all.
    """
    pairs = {name: np.asarray(pair, np.float64) for name, pair in sums.items()}
    predicted = float(pairs.get("token_loss", pairs["loss"])[1])
    if not predicted > 0:
        raise ValueError("evaluation predicted no token: the split is empty, or the objective's rate is too low")
    means = {name: float(total / weight) for name, (total, weight) in pairs.items() if weight > 0}
    if "token_loss" not in pairs:
        means["perplexity"] = math.exp(min(means["loss"], 700.0))
    means["predicted"] = predicted
    return means
