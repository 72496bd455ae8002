"""The exact negative log-likelihood of a model that predicts the next token, per token and in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.evaluation.bound import Batch, Predict
from maskformer.evaluation.metrics import Sums
from maskformer.evaluation.text_bytes import SplitBytes, bits_per_byte, bytes_of_tokens
from maskformer.objectives.loss import token_cross_entropy
from maskformer.objectives.sequence import CausalLM
from maskformer.objectives.vocabulary import is_any_of


def create_nll_step(
    predict: Predict,
    objective: CausalLM,
    *,
    ignored: tuple[int, ...] = (),
    token_bytes: np.ndarray | None = None,
) -> Callable[[Any, Batch], Sums]:
    """A function `params, batch -> sums` of what each token costs given those before it; jit it, add up, `finish_nll`.

    Args:
      predict: `params, corrupted -> logits` [batch, length, vocabulary], under a causal mask.
      objective: from `objectives.causal_lm`. With `shift="next"` the first token of a segment is not predicted, and
        neither it nor its bytes are counted.
      ignored: ids of targets that are not counted, such as [SEP]; they are read all the same.
      token_bytes: from `evaluation.token_bytes`; None leaves bytes out.
    """
    if objective.as_causal() is not objective:
        raise TypeError(f"create_nll_step: expected the objective 'causal_lm', got {objective.name!r}")
    key = jax.random.key(0)  # nothing is drawn

    def nll_step(params: Any, batch: Batch) -> Sums:
        corrupted = objective(key, batch)
        targets = corrupted.target_tokens
        counted = (corrupted.loss_weights > 0) & ~is_any_of(targets, ignored, objective.vocabulary.size)
        losses = jnp.where(counted, token_cross_entropy(predict(params, corrupted), targets, counted), 0.0)
        # Rows first: a sum over the whole batch at once would round off more.
        nats, number = jnp.sum(jnp.sum(losses, axis=1)), jnp.sum(counted).astype(jnp.float32)
        sums = {"nats": jnp.stack([nats, number])}
        if token_bytes is not None:
            sizes = bytes_of_tokens(jnp.asarray(token_bytes), batch["tokens"], batch["segment_ids"], batch["positions"])
            if objective.shift == "next":  # the position before a token predicts it
                sizes = jnp.concatenate([sizes[:, 1:], jnp.zeros_like(sizes[:, :1])], axis=1)
            sums["decoded_bytes"] = jnp.stack([jnp.sum(sizes * counted).astype(jnp.float32), number])
        return sums

    return nll_step


def finish_nll(sums: Mapping[str, np.ndarray], split: SplitBytes | None = None) -> dict[str, float]:
    """Results from merged sums.

    Args:
      split: the bytes of the split, when the step counted bytes.

    Returns:
      `nll` (nats per counted token), `perplexity`, `tokens`, and `bits_per_byte` and `bytes`.

    Raises:
      ValueError: nothing was counted.
    """
    nats, tokens = (float(value) for value in sums["nats"])
    if not tokens > 0:
        raise ValueError("the likelihood counted no token: the split is empty, or its segments have one token each")
    results = {"nll": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700.0)), "tokens": tokens}
    if split is not None:
        results |= bits_per_byte("bits_per_byte", nats, sums, split)
    return results
