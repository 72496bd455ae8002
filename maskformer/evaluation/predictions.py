"""What the likelihood-like measures ask of a run's model and of the objective that it was trained on."""

from __future__ import annotations

import functools
from typing import Any

import jax

from maskformer.evaluation.bound import Predict
from maskformer.evaluation.measure import Measurable
from maskformer.objectives import Corrupted, Objective


def predict(
    model: Any, objective: Objective, params: Any, corrupted: Corrupted, dropout_key: jax.Array | None = None
) -> jax.Array:
    """The model's logits [batch, predicted, vocabulary] at the positions that the objective predicts, under its
    attention; without a dropout key, deterministic.
    """
    return model.apply(params, **corrupted.inputs(objective.attend(corrupted)), dropout_key=dropout_key)


def predict_with_routing(
    model: Any, objective: Objective, params: Any, corrupted: Corrupted, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    """As `predict`, and what the routers of the model's experts did, see `Model.apply_with_routing`."""
    inputs = corrupted.inputs(objective.attend(corrupted))
    return model.apply_with_routing(params, **inputs, dropout_key=dropout_key)


def predictions(model: Any, objective: Objective) -> Predict:
    """`predict` of this model and objective: a function `params, corrupted -> logits`."""
    return functools.partial(predict, model, objective)


def check_predicts_tokens(run: Measurable, measure: str) -> None:
    """ValueError where the run's model answers something else than tokens, as that of a recipe's own task may."""
    if not run.predicts_tokens:
        raise ValueError(f"{measure}: this run's task is one of its recipe, whose model predicts no tokens")


def objective_with_masks(run: Measurable, measure: str) -> Objective:
    """The run's objective, if training under it showed the model [MASK] in place of what it had to predict."""
    check_predicts_tokens(run, measure)
    if not run.objective.shows_mask:
        raise ValueError(
            f"{measure}: this run's objective is {run.objective.name!r}, whose model never saw [MASK]; it is defined "
            "after mlm and its relatives, and after diffusion"
        )
    return run.objective
