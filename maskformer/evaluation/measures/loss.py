"""The loss that training minimises, and accuracies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from maskformer.evaluation.measure import Help, Measurable, Results, builder


@builder(shows=("loss {loss:.4f}", "accuracy {accuracy:.2%}"))
def loss(
    run: Measurable,
    split: str,
    *,
    objective: Annotated[
        str | None, Help("evaluate under this objective (default: the run's own)", metavar="NAME", names_column=True)
    ] = None,
    rate: Annotated[float | None, Help("evaluate at each corruption rate", metavar="RATE", each=True)] = None,
    changes: Mapping[str, Any] | None = None,
) -> Results:
    """The objective's own, and accuracies.

    Masks are fixed, and attention is the objective's.

    Args:
      run: what is evaluated.
      split: "train", "validation" or "test".
      objective: another one, by name, with its own defaults.
      rate: its corruption rate.
      changes: to its other parameters, such as `{"shift": "right"}`, beyond those of `evaluation.objective`.

    Raises:
      ValueError: the objective is not defined for this run: its tokenizer lacks a token, its model positions.
    """
    given = {name: value for name, value in (("name", objective), ("rate", rate)) if value is not None}
    return run.metrics(split, {**(changes or {}), **given})
