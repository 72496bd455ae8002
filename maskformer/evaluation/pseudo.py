"""Pseudo-log-likelihood: every token predicted from all the others (Salazar et al. 2020).

Each token is hidden alone, by [MASK], and its log-probability added up. It is no likelihood, since the conditionals of
a masked model need not belong to one distribution, but it ranks sentences. A later piece of a word gives away the
piece before it; `within_word_l2r` hides those later pieces too (Kauf & Ivanova 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.evaluation.bound import Batch, Predict, hide
from maskformer.evaluation.metrics import Sums
from maskformer.evaluation.text_bytes import SplitBytes, bits_per_byte, bytes_of_tokens
from maskformer.objectives.counting import slots
from maskformer.objectives.loss import token_cross_entropy
from maskformer.objectives.vocabulary import is_any_of


def create_pseudo_step(
    predict: Predict,
    *,
    mask_token: int,
    vocabulary_size: int,
    segments: int,
    visible: tuple[int, ...] = (),
    within_word_l2r: bool = False,
    every: int = 1,
    token_bytes: np.ndarray | None = None,
) -> Callable[[Any, Batch], Sums]:
    """A function `params, batch -> sums` that hides the text tokens of a batch one after another.

    Segments of a packed row do not see each other, so one token of each is hidden at a time: a batch takes as many
    passes of the model as its longest segment has tokens to score. One compilation serves all batches.

    Args:
      predict: `params, corrupted -> logits` [batch, predicted, vocabulary] under a mask that keeps segments apart.
      mask_token: its id. It keeps its place in the softmax, as in published figures.
      vocabulary_size: number of ids.
      segments: the most segments that a row has.
      visible: ids that are never hidden nor scored, such as [CLS] and [SEP].
      within_word_l2r: hide with a token the later pieces of its word.
      every: score every `every`-th text token of a row, each row with another offset; 1 scores all.
      token_bytes: from `evaluation.token_bytes`; None leaves bytes out.

    Raises:
      ValueError: `every` or `segments` below 1.
    """
    for name, value in (("every", every), ("segments", segments)):
        if isinstance(value, bool) or value != int(value) or value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer of at least 1")

    def pseudo_step(params: Any, batch: Batch) -> Sums:
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        text = (segment_ids > 0) & ~is_any_of(tokens, visible, vocabulary_size)
        place = jnp.cumsum(text, axis=1) - 1
        scored = text & (place % every == jnp.mod(batch["example_id"], every)[:, None])
        turn = _turns(scored, batch["positions"])
        word = _words(text, batch)

        def hidden_at(number: jax.Array) -> tuple[jax.Array, jax.Array]:
            chosen = scored & (turn == number)
            if not within_word_l2r:
                return chosen, chosen
            # The word of the latest chosen position at or before each position.
            latest = jax.lax.cummax(jnp.where(chosen, word, -1), axis=1)
            return chosen, chosen | (text & (word == latest))

        def one_pass(number: jax.Array, nats: jax.Array) -> jax.Array:
            chosen, hidden = hidden_at(number)
            positions, used = jax.vmap(lambda row: slots(row, min(segments, tokens.shape[1])))(chosen)
            corrupted = hide(batch, hidden, mask_token, positions)
            losses = token_cross_entropy(predict(params, corrupted), corrupted.target_tokens, used)
            return nats + jnp.sum(jnp.where(used, losses, 0.0), axis=1)

        passes = jnp.max(jnp.where(scored, turn + 1, 0))
        nats = jax.lax.fori_loop(0, passes, one_pass, jnp.zeros(tokens.shape[0]))
        number = jnp.sum(scored).astype(jnp.float32)
        sums = {
            "nats": jnp.stack([jnp.sum(nats), number]),
            "text": jnp.stack([jnp.sum(text).astype(jnp.float32), number]),
        }
        if token_bytes is not None:
            sizes = bytes_of_tokens(jnp.asarray(token_bytes), tokens, segment_ids, batch["positions"])
            sums["decoded_bytes"] = jnp.stack([jnp.sum(sizes * scored).astype(jnp.float32), number])
        return sums

    return pseudo_step


def _turns(scored: jax.Array, positions: jax.Array) -> jax.Array:
    """int32 [batch, length]: how many scored tokens of the same segment come before each."""
    earlier = jnp.cumsum(scored, axis=1) - scored
    begin = jax.lax.cummax(jnp.where(positions == 0, jnp.arange(positions.shape[1]), 0), axis=1)
    return earlier - jnp.take_along_axis(earlier, begin, axis=1)


def _words(text: jax.Array, batch: Batch) -> jax.Array:
    """int32 [batch, length]: each text token's word, counted along the row; a special token or a segment ends one."""
    previous = jnp.concatenate([jnp.zeros_like(text[:, :1]), text[:, :-1]], axis=1)
    starts = text & (batch["word_starts"] | ~previous | (batch["positions"] == 0))
    return jnp.cumsum(starts, axis=1)


def finish_pseudo(sums: Mapping[str, np.ndarray], split: SplitBytes | None = None) -> dict[str, float]:
    """Results from merged sums.

    Returns:
      `pseudo_nll`: nats per scored token. `pseudo_perplexity`: its exponential. `pseudo_bits_per_byte`. `scored`,
      `tokens`, `bytes`: tokens scored, text tokens in the rows that were read, bytes behind the scored ones.

    Raises:
      ValueError: nothing was scored.
    """
    nats, scored = (float(value) for value in sums["nats"])
    if not scored > 0:
        raise ValueError(
            "pseudo-perplexity scored no token: the split is empty, or every=... passes over its few tokens"
        )
    results = {
        "pseudo_nll": nats / scored,
        "pseudo_perplexity": math.exp(min(nats / scored, 700.0)),
        "scored": scored,
        "tokens": float(sums["text"][0]),
    }
    if split is not None:
        results |= bits_per_byte("pseudo_bits_per_byte", nats, sums, split)
    return results
