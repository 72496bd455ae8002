"""An upper bound on the negative log-likelihood of a model that fills in masks: the diffusion, or any-order, bound.

A model of p(token | visible tokens) is a model of text once an order of uncovering is drawn at random. For a row of n
tokens the negative evidence lower bound is, in two equal forms,

    -log p(x) <= E_{l ~ U{1..n}} E_{M: |M| = l}  n / l  sum_{i in M} -log p(x_i | x outside M)     (Nie et al. 2025)
               = E_{t ~ U(0, 1)} E_{M: each with t}  1 / t  sum_{i in M} -log p(x_i | x outside M)  (Sahoo et al. 2024)

Segments of a packed row do not see each other, so the row's bound is the sum of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.evaluation.metrics import Sums
from maskformer.evaluation.text_bytes import SplitBytes, bits_per_byte, bytes_of_tokens
from maskformer.objectives import Corrupted, randomness
from maskformer.objectives.loss import suppress, token_cross_entropy
from maskformer.objectives.vocabulary import is_any_of

Batch = Mapping[str, jax.Array]
# params, corrupted -> logits [batch, predicted, vocabulary].
Predict = Callable[[Any, Corrupted], jax.Array]

ESTIMATORS = ("count", "time")
# The masking probability of "time" stays above this, as in MDLM: at 0 the weight 1 / t has no bound.
SMALLEST_TIME = 1e-3
# Stages of the row key: the offset of each half's strata, then the order in which each sample uncovers.
_OFFSET, _ORDER = 200, 1000


def hide(batch: Batch, hidden: jax.Array, mask_token: int, predict_positions: jax.Array | None = None) -> Corrupted:
    """What a bidirectional model reads when the positions `hidden` [batch, length] show the mask token.

    Args:
      batch: `tokens segment_ids positions`, int [batch, length].
      predict_positions: int [batch, predicted] where the head runs; None for every position.
    """
    tokens, valid = batch["tokens"], batch["segment_ids"] > 0
    here = tokens if predict_positions is None else jnp.take_along_axis(tokens, predict_positions, axis=1)
    asked = hidden if predict_positions is None else jnp.take_along_axis(hidden, predict_positions, axis=1)
    return Corrupted(
        input_tokens=jnp.where(hidden, mask_token, tokens),
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        predict_positions=predict_positions,
        target_tokens=here,
        loss_weights=asked.astype(jnp.float32),
        bidirectional=valid,
        selected=hidden,
    )


def create_bound_step(
    predict: Predict,
    *,
    mask_token: int,
    vocabulary_size: int,
    seed: int = 0,
    samples: int = 8,
    estimator: str = "count",
    visible: tuple[int, ...] = (),
    token_bytes: np.ndarray | None = None,
) -> Callable[[Any, Batch], Sums]:
    """A function `params, batch -> sums` that estimates the bound on one batch; jit it, add up, `finish_bound`.

    Every row is masked `samples` times, in two independent halves. Within a half the numbers of hidden tokens are
    evenly spread behind one random offset, so that each is uniform and together they cover the range; the difference
    of the halves measures the Monte-Carlo error without bias. Masks depend on `seed` and `example_id` only: two models
    see the same ones.

    Args:
      predict: `params, corrupted -> logits` [batch, length, vocabulary], under the model's own attention mask.
      mask_token: its id; the model is not allowed to answer it.
      vocabulary_size: number of ids.
      seed: of the masks.
      samples: maskings of each row, an even number.
      estimator: "count" draws the number of hidden tokens (Nie et al. 2025; unbiased, and the lower variance);
        "time" draws a probability t in [0.001, 1] for every token (Sahoo et al. 2024), which leaves out the last
        thousandth of the integral.
      visible: ids that are never hidden and not counted: the likelihood is then that of the other tokens given these.
      token_bytes: from `evaluation.token_bytes`, to count the bytes behind the tokens too; None leaves them out.

    Raises:
      ValueError: `samples` is odd or below 2, or an unknown estimator.
    """
    if isinstance(samples, bool) or samples != int(samples) or samples < 2 or samples % 2:
        raise ValueError(f"samples={samples!r}: expected an even number of at least 2, for two halves to compare")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: expected one of {', '.join(ESTIMATORS)}")
    strata = samples // 2
    key = jax.random.key(seed)

    def bound_step(params: Any, batch: Batch) -> Sums:
        tokens = batch["tokens"]
        counted = (batch["segment_ids"] > 0) & ~is_any_of(tokens, visible, vocabulary_size)
        size = jnp.sum(counted, axis=1, dtype=jnp.int32)
        keys = randomness.row_keys(key, jnp.zeros_like(batch["example_id"]), batch["example_id"])
        offsets = jax.vmap(lambda k: randomness.uniform(k, _OFFSET, (2,)))(keys)

        def one_sample(total: jax.Array, sample: jax.Array) -> tuple[jax.Array, None]:
            half, stratum = sample // strata, sample % strata
            time = (offsets[:, half] + stratum) / strata
            bits = jax.vmap(lambda k: randomness.bits(k, _ORDER + sample, tokens.shape[1:]))(keys)
            if estimator == "count":
                number = jnp.minimum(1 + jnp.floor(time * size).astype(jnp.int32), size)
                hidden = (_ranks(bits, counted) < number[:, None]) & counted
                weight = size / jnp.maximum(number, 1)
            else:
                time = SMALLEST_TIME + (1.0 - SMALLEST_TIME) * time
                hidden = counted & randomness.below(bits, time[:, None])
                weight = 1.0 / time
            logits = suppress(predict(params, hide(batch, hidden, mask_token)), mask_token)
            losses = jnp.where(hidden, token_cross_entropy(logits, tokens, hidden), 0.0)
            return total.at[half].add(weight * jnp.sum(losses, axis=1) / strata), None

        halves, _ = jax.lax.scan(one_sample, jnp.zeros((2, tokens.shape[0])), jnp.arange(samples))
        tokens_counted = jnp.sum(size).astype(jnp.float32)
        sums = {
            "nats": jnp.stack([jnp.sum(halves) / 2, tokens_counted]),
            # The variance of the mean of two independent estimates, itself estimated from their difference.
            "variance": jnp.stack([jnp.sum((halves[0] - halves[1]) ** 2) / 4, tokens_counted]),
        }
        if token_bytes is not None:
            size_in_bytes = bytes_of_tokens(jnp.asarray(token_bytes), tokens, batch["segment_ids"], batch["positions"])
            sums["decoded_bytes"] = jnp.stack([jnp.sum(size_in_bytes * counted).astype(jnp.float32), tokens_counted])
        return sums

    return bound_step


def _ranks(bits: jax.Array, member: jax.Array) -> jax.Array:
    """int32 [batch, length]: each member's place in a random order of its row's members; others come after."""
    order = jnp.argsort(jnp.where(member, randomness.sortable(bits), jnp.inf), axis=1)
    return jnp.argsort(order, axis=1).astype(jnp.int32)


def finish_bound(sums: Mapping[str, np.ndarray], split: SplitBytes | None = None) -> dict[str, float]:
    """The bound from merged sums, all of it marked as one.

    Args:
      split: the bytes of the split, when the step counted bytes.

    Returns:
      `nll_bound`: nats per counted token, an upper bound in expectation. `nll_bound_stderr`: the standard error that
      the sampling of masks leaves in it; the choice of texts is not in it. `perplexity_bound`: its exponential.
      `bits_per_byte_bound`: all nats over the bytes that the counted tokens stand for. `tokens`, `bytes`: how many.

    Raises:
      ValueError: nothing was counted.
    """
    nats, tokens = (float(value) for value in sums["nats"])
    if not tokens > 0:
        raise ValueError("the bound counted no token: the split is empty, or every token of it is left visible")
    bound = nats / tokens
    results = {
        "nll_bound": bound,
        "nll_bound_stderr": math.sqrt(float(sums["variance"][0])) / tokens,
        "perplexity_bound": math.exp(min(bound, 700.0)),
        "tokens": tokens,
    }
    if split is not None:
        results |= bits_per_byte("bits_per_byte_bound", nats, sums, split)
    return results
