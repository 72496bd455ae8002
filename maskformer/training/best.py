"""Which evaluation was the best, and when there is no use in waiting for a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from maskformer.training.record import RunRecord
from maskformer.training.sections import EvaluationConfig


def update_best(record: RunRecord, results: Mapping[str, float], config: EvaluationConfig) -> bool:
    """Note an evaluation in the record; True when it is the best so far.

    A metric that is not a finite number, or is left out since nothing was asked for it (a precision where nothing was
    said), is no value: it is never the best, and counts as an evaluation without improvement. That the name is one that
    is measured at all is checked before the run, with the rest of its config.
    """
    value = float(results.get(config.metric, math.nan))
    if not math.isfinite(value):
        improved = False
    elif record.best is None:
        improved = True
    else:
        improved = (record.best - value if config.mode == "min" else value - record.best) > config.min_improvement
    if improved:
        record.best, record.evaluations_since_best = value, 0
    else:
        record.evaluations_since_best += 1
    return improved


def out_of_patience(record: RunRecord, config: EvaluationConfig) -> bool:
    """Whether training is to stop early: so says the evidence in the record, under the patience of now."""
    return config.patience is not None and record.evaluations_since_best >= config.patience


def continue_record(record: RunRecord, steps: int, config: EvaluationConfig) -> None:
    """Make the record of a checkpoint (or a fresh one) that of a run of `steps` steps.

    A run that had stopped early and is now to be longer than it was gets its patience anew; the same command again
    leaves it stopped. What was the best by another metric says nothing under this one: best and patience begin anew.
    """
    if record.criterion not in (None, config.criterion):
        record.best, record.evaluations_since_best = None, 0
    record.criterion = config.criterion
    if out_of_patience(record, config) and steps > record.steps:
        record.evaluations_since_best = 0
    record.steps = steps
