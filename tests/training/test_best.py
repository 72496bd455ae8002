"""The best evaluation and the patience with those that are not."""

import dataclasses
import json
import math

import pytest

from maskformer.training.best import continue_record, out_of_patience, update_best
from maskformer.training.checkpoints import RunRecord
from maskformer.training.sections import EvaluationConfig

NAN, INF = math.nan, math.inf


def follow(values, **config):
    """The record after evaluations of these values, and the index of the one that training stopped at."""
    config = EvaluationConfig(**config)
    record = RunRecord()
    for index, value in enumerate(values):
        update_best(record, {"loss": value}, config)
        if out_of_patience(record, config):
            return record, index
    return record, None


@pytest.mark.parametrize(
    "values, patience, best, stopped",
    [
        ([NAN, 3.0, 2.0, 1.0], 3, 1.0, None),
        ([INF, 3.0, NAN, 1.0], 3, 1.0, None),
        ([3.0, NAN, NAN, NAN], 3, 3.0, 3),
        ([NAN, NAN, NAN], 3, None, 2),
        ([3.0, 4.0, 2.0, 2.0, 2.0], 2, 2.0, 4),
        ([-INF, 3.0, 2.0], 2, 2.0, None),
    ],
)
def test_what_is_not_a_number_is_never_the_best_and_wears_out_patience(values, patience, best, stopped):
    record, index = follow(values, patience=patience)
    assert (record.best, index) == (best, stopped)


def test_the_highest_is_the_best_where_the_config_says_so():
    record, _ = follow([1.0, NAN, 3.0, 2.0], mode="max")
    assert record.best == 3.0 and record.evaluations_since_best == 1


def test_a_change_below_the_least_improvement_is_none():
    record, stopped = follow([3.0, 2.9, 2.8], min_improvement=0.5, patience=2)
    assert record.best == 3.0 and stopped == 2


def test_a_metric_of_nothing_is_left_out_and_is_no_improvement():
    """Precision before anything was said to be replaced; that the name is measured at all, the config has proved."""
    record, config = RunRecord(), EvaluationConfig(metric="discriminator_precision", mode="max")
    assert not update_best(record, {"loss": 1.0}, config) and record.best is None
    assert update_best(record, {"loss": 1.0, "discriminator_precision": 0.1}, config) and record.best == 0.1
    assert not update_best(record, {"loss": 1.0}, config) and record.evaluations_since_best == 1


@pytest.mark.parametrize(
    "patience, steps, stopped", [(2, 12, True), (3, 12, False), (2, 13, False), (2, 11, True), (None, 12, False)]
)
def test_a_run_that_stopped_early_goes_on_with_more_patience_or_more_steps_only(patience, steps, stopped):
    record = RunRecord(best=1.0, evaluations_since_best=2, steps=12)
    config = EvaluationConfig(patience=patience)
    continue_record(record, steps, config)
    assert out_of_patience(record, config) is stopped
    assert record.steps == steps and record.best == 1.0


def test_a_longer_run_that_had_not_stopped_keeps_what_it_has_waited():
    record = RunRecord(best=1.0, evaluations_since_best=1, steps=12)
    continue_record(record, 24, EvaluationConfig(patience=2))
    assert record.evaluations_since_best == 1


@pytest.mark.parametrize(
    "changes",
    [
        dict(metric="accuracy", mode="max"),
        dict(metric="perplexity"),
        dict(mode="max"),
        dict(split="test"),
        dict(objective={"rate": 0.4}),
    ],
)
def test_the_best_by_another_measure_is_none_and_patience_begins_anew(changes):
    before, now = EvaluationConfig(patience=2), EvaluationConfig(patience=2, **changes)
    record = RunRecord()
    continue_record(record, 12, before)
    for _ in range(3):
        update_best(record, {"loss": 3.0}, before)
    assert out_of_patience(record, before)
    record = RunRecord(**json.loads(json.dumps(dataclasses.asdict(record))))
    continue_record(record, 12, now)
    assert record.best is None and not out_of_patience(record, now)
    assert update_best(record, {now.metric: 0.5}, now) and record.best == 0.5


@pytest.mark.parametrize("changes", [{}, dict(patience=9, every=7), dict(objective={"rate": 0.4, "words": (1, 2)})])
def test_the_best_by_the_same_measure_stays(changes):
    config = EvaluationConfig(**changes)
    record = RunRecord()
    continue_record(record, 12, config)
    update_best(record, {"loss": 3.0}, config)
    continue_record(record, 12, EvaluationConfig(**json.loads(json.dumps(changes))))
    assert record.best == 3.0 and not update_best(record, {"loss": 3.5}, config)


def test_the_best_of_a_record_from_before_it_named_its_measure_stays():
    record = RunRecord(best=1.0, steps=12)
    continue_record(record, 12, EvaluationConfig())
    assert record.best == 1.0
