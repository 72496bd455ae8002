"""An upper bound on the negative log-likelihood, of a model that fills in masks."""

from __future__ import annotations

from typing import Annotated, Literal

from maskformer.evaluation.bound import create_bound_step, finish_bound
from maskformer.evaluation.measure import Measurable, Results, builder
from maskformer.evaluation.predictions import objective_with_masks, predictions
from maskformer.evaluation.text_bytes import split_bytes


@builder(shows=("nll <= {nll_bound:.4f} ± {nll_bound_stderr:.4f}", "bits per byte <= {bits_per_byte_bound:.4f}"))
def nll_bound(
    run: Measurable,
    split: str,
    *,
    samples: Annotated[int, "maskings of each row, an even number"] = 8,
    estimator: Annotated[Literal["count", "time"], "what is drawn"] = "count",
    markers: Annotated[bool | None, "count special tokens such as [SEP] as text"] = None,
) -> Results:
    """The diffusion bound.

    Args:
      run: what is evaluated.
      split: "train", "validation" or "test".
      samples: maskings of each row, an even number; the standard error falls with its square root.
      estimator: "count" (LLaDA) or "time" (MDLM); see `evaluation.create_bound_step`.
      markers: whether special tokens such as [CLS] and [SEP] are part of the text, hidden and counted. By default as in
        training: they are under `diffusion`, unless it has `keep_markers`, and are not under `mlm`.

    Returns:
      `nll_bound` (nats per counted token), `nll_bound_stderr`, `perplexity_bound`, `bits_per_byte_bound`, `tokens`,
      `bytes`.

    Raises:
      ValueError: the model never saw [MASK], or a bad argument.
    """
    objective = objective_with_masks(run, "nll_bound")
    vocabulary = run.tokenizer.vocabulary
    if markers is None:
        visible = objective.never_hidden
    else:
        visible = vocabulary.ids(("pad",)) if markers else vocabulary.marker_ids
    counted = split_bytes(run.data, split, run.tokenizer)
    step = create_bound_step(
        predictions(run.model, objective),
        mask_token=vocabulary.require("mask", objective.name),
        vocabulary_size=vocabulary.size,
        seed=run.seed,
        samples=samples,
        estimator=estimator,
        visible=visible,
        token_bytes=counted.table,
    )
    return finish_bound(run.sums(step, split), counted)
