"""Every token predicted from all the others, of a model that fills in masks."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from maskformer.data import PackedDataset
from maskformer.evaluation.measure import Help, Measurable, Results, builder
from maskformer.evaluation.predictions import objective_with_masks, predictions
from maskformer.evaluation.pseudo import create_pseudo_step, finish_pseudo
from maskformer.evaluation.text_bytes import split_bytes


@builder(shows=("pseudo-perplexity {pseudo_perplexity:.2f}", "pseudo-bits per byte {pseudo_bits_per_byte:.4f}"))
def pseudo_perplexity(
    run: Measurable,
    split: str,
    *,
    every: Annotated[int, Help("score every K-th token", metavar="K")] = 1,
    within_word_l2r: Annotated[bool, "hide later pieces of the word too"] = False,
) -> Results:
    """Every token from all others.

    Each text token is hidden in turn; special tokens never are. Costs as many passes over a row as its longest segment
    has tokens to score.

    Args:
      run: what is evaluated.
      split: "train", "validation" or "test".
      every: score every `every`-th text token only.
      within_word_l2r: hide with a token the later pieces of its word, which would give it away (Kauf & Ivanova 2023).

    Returns:
      `pseudo_nll` (nats per scored token), `pseudo_perplexity`, `pseudo_bits_per_byte`, `scored`, `tokens` (all text
      tokens of the rows), `bytes`.

    Raises:
      ValueError: the model never saw [MASK], or a bad argument.
    """
    objective = objective_with_masks(run, "pseudo_perplexity")
    vocabulary = run.tokenizer.vocabulary
    counted = split_bytes(run.data, split, run.tokenizer)
    step = create_pseudo_step(
        predictions(run.model, objective),
        mask_token=vocabulary.require("mask", objective.name),
        vocabulary_size=vocabulary.size,
        segments=_most_segments(run.dataset(split)),
        visible=vocabulary.marker_ids,
        within_word_l2r=within_word_l2r,
        every=every,
        token_bytes=counted.table,
    )
    return finish_pseudo(run.sums(step, split), counted)


def _most_segments(dataset: PackedDataset) -> int:
    """The most segments that a row of the split has; it is what fixes the shape of a pass."""
    most = 1
    for part in np.array_split(np.arange(len(dataset)), -(-len(dataset) // 1024)):
        most = max(most, int(dataset.rows.read(part)["segment_ids"].max()))
    return most
