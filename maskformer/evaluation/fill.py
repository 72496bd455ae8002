"""What a masked language model puts in the place of [MASK]."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer import masks
from maskformer.data import Tokenizer


@dataclasses.dataclass(frozen=True)
class Guess:
    """One prediction for one [MASK]: a piece of the vocabulary and its probability."""

    token: str
    probability: float


def fill_masks(
    model: Any, params: Any, tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray, top: int = 5
) -> list[list[Guess]]:
    """The `top` most probable pieces at each mask token of one sequence, most probable first.

    Special tokens are not guessed: they were never targets.

    Args:
      model, params: a masked language model and its parameters; of a pair of networks, the generator is asked.
      tokenizer: whose ids the tokens are.
      tokens: [length], with the mask token where a guess is wanted.

    Raises:
      ValueError: no mask token, or more tokens than the model has positions.
    """
    tokens = np.asarray(tokens, np.int32)
    vocabulary = tokenizer.vocabulary
    mask_id = vocabulary.require("mask", "fill")
    places = np.flatnonzero(tokens == mask_id)
    if not len(places):
        raise ValueError("the text has no [MASK]: write it where a word is to be guessed")
    length = model.config.max_length
    if len(tokens) > length:
        raise ValueError(f"the text has {len(tokens)} tokens and the model reads {length}; shorten it")
    # Padded to the training length: every text runs the same compiled function.
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(tokens)] = tokens
    predict = np.zeros((1, length), np.int32)
    predict[0, : len(places)] = places
    logits = _predict(model, params, padded, np.array([len(tokens)], np.int32), predict)
    logits = np.array(logits[0, : len(places)], np.float64)
    logits[:, list(vocabulary.special_ids)] = -np.inf
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    best = np.argsort(-probabilities, axis=-1)[:, :top]
    return [
        [Guess(tokenizer.token(token), float(row[token])) for token in ids]
        for row, ids in zip(probabilities, best, strict=True)
    ]


def _predict(
    model: Any, params: Any, tokens: np.ndarray, lengths: np.ndarray, predict: np.ndarray
) -> jax.Array:
    def logits(params: Any, tokens: jax.Array, lengths: jax.Array, predict: jax.Array) -> jax.Array:
        # One sequence is one segment, and its padding belongs to none, as in a packed row.
        inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
        return model.apply(
            params,
            tokens,
            positions=jnp.where(inside, jnp.arange(tokens.shape[1]), 0),
            mask=masks.segments(inside.astype(jnp.int32)),
            predict_positions=predict,
            segment_ids=inside.astype(jnp.int32),
        )

    return jax.jit(logits)(params, tokens, lengths, predict)
