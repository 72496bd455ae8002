"""What a masked language model puts in the place of [MASK]."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from maskformer import masks
from maskformer.data import Tokenizer
from maskformer.evaluation.measure import Measurable
from maskformer.evaluation.predictions import check_predicts_tokens


@dataclasses.dataclass(frozen=True)
class Guess:
    """One prediction for one [MASK]: a piece of the vocabulary and its probability."""

    token: str
    probability: float


class Fillable(Measurable, Protocol):
    """A run whose model can be asked for a few words, without a split."""

    @property
    def params(self) -> Any: ...


def fill_text(run: Fillable, text: str, top: int = 5) -> list[list[Guess]]:
    """Guesses for each [MASK] in `text`, by the generator where there are two networks.

    Raises:
      ValueError: the model never saw [MASK]; or as `fill_masks`.
    """
    check_predicts_tokens(run, "fill")
    if not run.objective.shows_mask:
        raise ValueError(
            f"fill: this run's objective is {run.objective.name!r}, which never saw [MASK]; fill works after mlm and "
            "its relatives, and after diffusion"
        )
    tokens, _ = run.tokenizer.encode(text, start_token=run.data.start_token, end_token=run.data.end_token)
    return fill_masks(run.model, run.params, run.tokenizer, tokens, top)


def example_texts(run: Measurable, count: int, seed: int = 0) -> list[str]:
    """Passages of the test split with one whole word of each masked."""
    dataset, tokenizer = run.dataset("test"), run.tokenizer
    vocabulary = tokenizer.vocabulary
    generator = np.random.default_rng(seed)
    texts = []
    for row in generator.permutation(len(dataset))[:count]:
        example = dataset.rows.read(np.array([row]))
        tokens, words = np.array(example["tokens"][0]), np.flatnonzero(example["word_starts"][0])
        # A word of one piece, with text on both sides, is a fair question.
        whole = [w for w in words[4:24] if w + 1 in words and tokenizer.token(tokens[w]).isalpha()]
        if not whole:
            continue
        place = int(generator.choice(whole))
        tokens[place] = vocabulary.require("mask", "fill")
        # From the beginning of a word.
        first, last = int(words[words >= max(place - 16, 1)][0]), place + 12
        frame = (vocabulary.cls, vocabulary.sep, vocabulary.pad)
        texts.append(tokenizer.decode([t for t in tokens[first:last] if t not in frame], skip_special=False))
    return texts


def fill_masks(
    model: Any, params: Any, tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray, top: int = 5
) -> list[list[Guess]]:
    """The `top` most probable pieces at each mask token of one sequence, most probable first.

    Special tokens are not guessed: they were never targets.

    Args:
      model, params: a masked language model and its parameters; of two networks, the one that predicts tokens.
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
    logits = np.array(_logits(model, params, padded, np.array([len(tokens)], np.int32), predict), np.float64)
    logits = logits[0, : len(places)]
    logits[:, list(vocabulary.special_ids)] = -np.inf
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    best = np.argsort(-probabilities, axis=-1)[:, :top]
    return [
        [Guess(tokenizer.token(token), float(row[token])) for token in ids]
        for row, ids in zip(probabilities, best, strict=True)
    ]


# One function for all calls, so that a model's program is compiled once and not for each text.
@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Any, params: Any, tokens: jax.Array, lengths: jax.Array, predict: jax.Array) -> jax.Array:
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
