"""The mask report counts what the objective does; checked against counts made here."""

import json
import types

import numpy as np
import pytest

from maskformer import objectives
from maskformer.objectives.report import target_span_lengths
from tests.objectives.examples import make_batch
from tests.objectives.test_pairs import VOCABULARY

LENGTH = 20


def batches(count=4, rows=64, **kwargs):
    made = []
    for number in range(count):
        batch = make_batch(rows, LENGTH, size=80, seed=number, **kwargs)
        made.append({**batch, "example_id": batch["example_id"] + rows * number})
    return made


@pytest.fixture(scope="module")
def bert():
    return objectives.mask_report(objectives.create("mlm", VOCABULARY, LENGTH, rate=0.3), batches())


def test_rates_slots_and_predictions_are_those_of_the_convention(bert):
    assert bert.rows == 256 and bert.tokens == 256 * LENGTH
    assert bert.corrupted_rate == bert.predicted_rate == pytest.approx(6 / 20)
    assert bert.predicted_per_batch == (384, 384.0, 384)
    assert (bert.slots, bert.slots_used, bert.slots_full) == (6, 1.0, 1.0)
    assert sum(bert.replacement) == pytest.approx(1.0) and abs(bert.replacement[0] - 0.8) < 0.05
    assert bert.attended_fraction == 1.0


def test_coverage_shows_that_markers_are_never_hidden(bert):
    assert bert.coverage[0] == bert.coverage[-1] == 0.0
    assert np.abs(bert.coverage[1:-1] - 6 / 18).max() < 0.12
    assert "never corrupted: positions 0, 19" in bert.to_text()


def test_coverage_exposes_that_t5_always_hides_the_last_token():
    report = objectives.mask_report(objectives.create("t5", VOCABULARY, LENGTH), batches(1))
    assert report.coverage[-3:].tolist() == [1.0, 1.0, 1.0] and report.coverage[0] == 0.0
    assert "always corrupted: positions 17, 18, 19" in report.to_text()
    assert report.target_lengths == (0.0, 0.0, 1.0) and report.span_lengths == (0.0, 0.0, 1.0)


def test_span_histogram_approaches_its_target():
    objective = objectives.create("t5", VOCABULARY, LENGTH, rate=0.4, mean=2.0)
    report = objectives.mask_report(objective, batches())
    assert report.target_lengths == target_span_lengths(objective)
    assert sum(report.target_lengths) == pytest.approx(1.0)
    assert np.dot(report.target_lengths, np.arange(1, 1 + len(report.target_lengths))) == pytest.approx(2.0)
    assert len(report.span_lengths) <= len(report.target_lengths) == 5
    for share, target in zip(report.span_lengths, report.target_lengths):
        assert abs(share - target) < 0.06


def test_span_lengths_of_spanbert_count_words():
    report = objectives.mask_report(objectives.create("spanbert", VOCABULARY, LENGTH, rate=0.3, longest=3), batches(1))
    assert report.span_unit == "words"
    assert report.target_lengths == pytest.approx((0.4098, 0.3279, 0.2623), abs=1e-4)


def test_attended_fraction_of_a_causal_mask_is_that_of_its_matrix():
    report = objectives.mask_report(objectives.create("causal_lm", VOCABULARY, LENGTH), batches(1, rows=4))
    assert report.attended_fraction == pytest.approx((LENGTH + 1) / (2 * LENGTH))
    assert report.replacement is None


def test_flops_come_from_the_model_and_count_what_is_attended():
    class Model:
        config = types.SimpleNamespace(layers=1, mask_pattern=("everything",))

        @staticmethod
        def flops_per_token(length, predicted, attended=None):
            return 1000.0 * predicted + (length if attended is None else attended)

    report = objectives.mask_report(
        objectives.create("causal_lm", VOCABULARY, LENGTH), batches(1, rows=4), model=Model()
    )
    assert report.flops_per_token == pytest.approx((1020.0, 1010.5))


def test_sample_rows_show_what_is_hidden_and_what_is_asked(bert):
    assert len(bert.samples) == 3
    batch, sample = batches(1)[0], bert.samples[0]
    assert [int(text) for text, _ in sample.original] == batch["tokens"][0].tolist()
    hidden = [text for text, style in sample.original if style == "hidden"]
    assert hidden == [text for text, _ in sample.targets] and len(hidden) == 6
    masked = [text for text, style in sample.inputs if style == "mask"]
    assert set(masked) <= {str(VOCABULARY.mask)}


def test_report_is_written_as_text_html_and_json(bert):
    text, colored, page = bert.to_text(), bert.to_text(color=True), bert.to_html()
    assert "replacement  mask" in text and "\033[" not in text and "\033[" in colored
    assert page.startswith("<!doctype html>") and page.count("<svg") == 2 and "http" not in page
    assert json.loads(json.dumps(bert.to_dict()))["slots"] == 6


def test_a_report_says_at_which_step_it_looked(bert):
    rate = {"schedule": "step", "values": {"0": 0.3, "100": 0.15}}
    objective = objectives.create("mlm", VOCABULARY, LENGTH, rate=rate)
    report = objectives.mask_report(objective, batches(1, rows=2), step=100)
    assert "as at training step 100" in report.to_text() and "as at training step 100" in report.to_html()
    assert report.to_dict()["step"] == 100 and "training step" not in bert.to_text()


def test_text_of_tokens_is_escaped_in_html():
    report = objectives.mask_report(
        objectives.create("mlm", VOCABULARY, LENGTH), batches(1, rows=2), decode=lambda token: "<b>&"
    )
    assert "&lt;b&gt;&amp;" in report.to_html() and "<b>&" not in report.to_html()


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="no batches"):
        objectives.mask_report(objectives.create("mlm", VOCABULARY, LENGTH), [])
