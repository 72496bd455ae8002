"""What a run remembers beside its arrays."""

from __future__ import annotations

import dataclasses
import math

from maskformer.checks import shown
from maskformer.paths import AnyPath
from maskformer.training.checksums import FIX, DamageError
from maskformer.training.workdir import read_object


@dataclasses.dataclass
class RunRecord:
    """What a run remembers beside its arrays; everything in it is JSON.

    Attributes:
      next_example: global index of the first example that no finished step has used. It names a place in the
        stream of epochs, independent of batch size and number of processes.
      tokens, predicted: seen and predicted so far, padding not counted.
      best: best evaluation so far by `criterion`; None before the first.
      criterion: `EvaluationConfig.criterion`; None in a record from before there was one.
      evaluations_since_best: for early stopping.
      steps: the length that the run was to have.
      evaluation_due: the evaluation of this step was stopped by a signal and is still to be made.
    """

    next_example: int = 0
    tokens: int = 0
    predicted: int = 0
    best: float | None = None
    criterion: str | None = None
    evaluations_since_best: int = 0
    steps: int = 0
    evaluation_due: bool = False


def read_record(path: AnyPath, step: int) -> RunRecord:
    """The record of the checkpoint of `step`.

    Raises:
      ValueError: the file is no JSON object.
      DamageError: it is no record, or that of another step.
    """
    values = read_object(path, FIX)
    if values.get("step", step) != step:
        raise DamageError(f"{path}: is the record of step {shown(values['step'])}")
    for name in ("next_example", "tokens", "predicted"):
        if name not in values:
            raise DamageError(f"{path}: has no {name!r}")
    best = values.get("best")
    if best is not None and type(best) not in (int, float):
        raise DamageError(f"{path}: best={shown(best)}, expected a number")
    criterion = values.get("criterion")
    if criterion is not None and type(criterion) is not str:
        raise DamageError(f"{path}: criterion={shown(criterion)}, expected a string")
    due = values.get("evaluation_due", False)
    if type(due) is not bool:
        raise DamageError(f"{path}: evaluation_due={shown(due)}, expected true or false")
    counts = {}
    for field in dataclasses.fields(RunRecord):
        if field.name not in ("best", "criterion", "evaluation_due") and field.name in values:
            value = values[field.name]
            if type(value) is not int or value < 0:
                raise DamageError(f"{path}: {field.name}={shown(value)}, expected a whole number of at least 0")
            counts[field.name] = value
    # NaN is no value, and was written as one.
    finite = best if best is not None and math.isfinite(best) else None
    return RunRecord(best=finite, criterion=criterion, evaluation_due=due, **counts)
