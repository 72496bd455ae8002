"""`train.rows_per_device`: the batch stays what it is, and its parts follow the devices at hand."""

import jax
import numpy as np
import pytest

from maskformer.training import Program, resolve, train_and_evaluate
from tests.training.tiny import metric_lines, tiny_config

STILL = dict(mesh__data=-1, model__hidden_dropout=0.0, model__attention_dropout=0.0)


def placed(corpus, devices, count, **changes):
    devices(count)
    return Program.of(tiny_config(corpus, **STILL | changes)).on()


@pytest.mark.parametrize(("count", "rows", "parts"), [(1, 8, 3), (2, 8, 2), (3, 8, 1), (8, 8, 1), (4, 4, 2), (3, 1, 8)])
def test_a_batch_of_24_rows_runs_in_as_few_parts_as_fit(count, rows, parts, corpus, devices):
    changes = dict(train__batch_size=24, train__rows_per_device=rows, evaluation__every=0)
    place = placed(corpus, devices, count, **changes)
    place.check_batch()
    assert place.accumulation_steps == parts
    assert not place.dropped


def test_without_it_the_parts_are_those_of_the_config(corpus, devices):
    assert placed(corpus, devices, 2, train__accumulation_steps=2).accumulation_steps == 2


def test_devices_that_share_rows_count_as_one(corpus, devices):
    place = placed(corpus, devices, 4, mesh__tensor=2, train__batch_size=16, train__rows_per_device=4)
    assert place.accumulation_steps == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__batch_size": 8}, "train.batch_size=8: does not divide over mesh"),
        ({"train__batch_size": 24}, "evaluation.batch_size=8: does not divide over mesh"),
    ],
)
def test_a_batch_that_does_not_divide_is_named_before_the_first_step(changes, message, corpus, devices):
    with pytest.raises(ValueError, match=message):
        placed(corpus, devices, 3, train__rows_per_device=4, **changes).check_batch()


def test_a_batch_that_divides_badly_is_warned_of(corpus, devices):
    place = placed(corpus, devices, 1, train__batch_size=23, train__rows_per_device=8, evaluation__every=0)
    place.check_batch()
    assert place.accumulation_steps == 23
    assert place.dropped[-1].startswith("train.batch_size=23 gives a device 23 rows, which run 1 at a time in 23 parts")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__rows_per_device": 0}, "train.rows_per_device=0: expected"),
        (
            {"train__rows_per_device": 4, "train__accumulation_steps": 2},
            "train.accumulation_steps=2: expected 1 beside train.rows_per_device=4, which decides it",
        ),
    ],
)
def test_what_contradicts_it_is_named(changes, message, corpus):
    with pytest.raises(ValueError, match=message):
        resolve(tiny_config(corpus, **changes))


def test_a_run_goes_on_on_other_devices_and_with_another_limit(corpus, devices, tmp_path):
    changes = STILL | dict(train__batch_size=24, train__log_every=1, evaluation__every=0, checkpoint__every=0)
    devices(1)
    train_and_evaluate(tiny_config(corpus, **changes, train__steps=4), tmp_path / "whole")
    for count, steps, rows in ((3, 2, 4), (2, 4, 6)):
        devices(count)
        train_and_evaluate(
            tiny_config(corpus, **changes, train__steps=steps, train__rows_per_device=rows), tmp_path / "moved"
        )
    names = ("train/loss", "train/grad_norm", "train/tokens_predicted")
    whole, moved = (
        np.array([[line[name] for name in names] for line in metric_lines(tmp_path / run)])
        for run in ("whole", "moved")
    )
    assert jax.process_count() == 1 and len(whole) == 4
    np.testing.assert_allclose(moved, whole, rtol=1e-5)
