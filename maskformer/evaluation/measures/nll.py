"""The exact likelihood of a model that predicts the next token."""

from __future__ import annotations

from typing import Annotated

from maskformer.evaluation.likelihood import create_nll_step, finish_nll
from maskformer.evaluation.measure import Measurable, Results, builder
from maskformer.evaluation.predictions import predictions
from maskformer.evaluation.text_bytes import split_bytes


@builder(shows=("nll {nll:.4f}", "bits per byte {bits_per_byte:.4f}"))
def nll(
    run: Measurable, split: str, *, markers: Annotated[bool, "count special tokens such as [SEP] as text"] = True
) -> Results:
    """Exact, with bits per byte.

    A model trained with a prefix, or to fill in the middle, is run as a causal one: with a prefix of one token.

    Args:
      run: what is evaluated.
      split: "train", "validation" or "test".
      markers: whether the prediction of special tokens such as [SEP] counts.

    Returns:
      `nll` (nats per predicted token), `perplexity`, `bits_per_byte`, `tokens`, `bytes`.

    Raises:
      ValueError: the model never predicted the next token.
    """
    objective = run.objective.as_causal()
    if objective is None:
        raise ValueError(
            f"nll: this run's objective is {run.objective.name!r}, whose model never predicted the next token; use "
            "nll_bound, or evaluate under objective 'causal_lm'"
        )
    counted = split_bytes(run.data, split, run.tokenizer)
    step = create_nll_step(
        predictions(run.model, objective),
        objective,
        ignored=() if markers else objective.vocabulary.marker_ids,
        token_bytes=counted.table,
    )
    return finish_nll(run.sums(step, split), counted)
