"""What the likelihood-like measures ask of a run's model and of the objective that it was trained on."""

from __future__ import annotations

from typing import Any

import jax

from maskformer.evaluation.bound import Predict
from maskformer.evaluation.measure import Measurable
from maskformer.objectives import Corrupted, Objective, Vocabulary


def predictions(model: Any, objective: Objective) -> Predict:
    """A function `params, corrupted -> logits` [batch, predicted, vocabulary] under the objective's attention."""

    def predict(params: Any, corrupted: Corrupted) -> jax.Array:
        return model.apply(params, **corrupted.inputs(objective.attend(corrupted)))

    return predict


def objective_with_masks(run: Measurable, measure: str) -> Objective:
    """The run's objective, if training under it showed the model [MASK] in place of what it had to predict."""
    if not run.objective.shows_mask:
        raise ValueError(
            f"{measure}: this run's objective is {run.objective.name!r}, whose model never saw [MASK]; it is defined "
            "after mlm and its relatives, and after diffusion"
        )
    return run.objective


def markers_of(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Ids that stand for no text. An unknown word is text."""
    return vocabulary.ids(("pad", "mask", "cls", "sep", "bos", "eos", "sentinels", "special"))
