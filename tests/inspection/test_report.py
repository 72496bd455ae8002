"""The mask report counts what the objective does; checked against counts made here."""

import dataclasses
import json

import numpy as np
import pytest

from maskformer import models, objectives
from maskformer.inspection import mask_report
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
    return mask_report(objectives.create("mlm", VOCABULARY, LENGTH, rate=0.3), batches())


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
    report = mask_report(objectives.create("t5", VOCABULARY, LENGTH), batches(1))
    assert report.coverage[-3:].tolist() == [1.0, 1.0, 1.0] and report.coverage[0] == 0.0
    assert "always corrupted: positions 17, 18, 19" in report.to_text()
    assert report.target_lengths == (0.0, 0.0, 1.0) and report.span_lengths == (0.0, 0.0, 1.0)


def test_span_histogram_approaches_its_target():
    objective = objectives.create("t5", VOCABULARY, LENGTH, rate=0.4, mean=2.0)
    report = mask_report(objective, batches())
    assert report.target_lengths == objective.expected_spans()
    assert sum(report.target_lengths) == pytest.approx(1.0)
    assert np.dot(report.target_lengths, np.arange(1, 1 + len(report.target_lengths))) == pytest.approx(2.0)
    assert len(report.span_lengths) <= len(report.target_lengths) == 5
    for share, target in zip(report.span_lengths, report.target_lengths):
        assert abs(share - target) < 0.06


def test_span_lengths_of_spanbert_count_words():
    report = mask_report(objectives.create("spanbert", VOCABULARY, LENGTH, rate=0.3, longest=3), batches(1))
    assert report.span_unit == "words"
    assert report.target_lengths == pytest.approx((0.4098, 0.3279, 0.2623), abs=1e-4)


def test_attended_fraction_of_a_causal_mask_is_that_of_its_matrix():
    report = mask_report(objectives.create("causal_lm", VOCABULARY, LENGTH), batches(1, rows=4))
    assert report.attended_fraction == pytest.approx((LENGTH + 1) / (2 * LENGTH))
    assert report.replacement is None


def test_flops_come_from_the_model_and_count_what_is_attended():
    config = models.EncoderConfig(vocab_size=VOCABULARY.size, layers=2, width=16, heads=2, max_length=LENGTH)
    model = models.create(config)
    objective = objectives.create("causal_lm", VOCABULARY, LENGTH)
    report = mask_report(objective, batches(1, rows=4), model=model)
    active = (LENGTH + 1) / 2
    assert report.flops_per_token == pytest.approx(
        (model.flops_per_token(LENGTH), model.flops_per_token(LENGTH, attended=active))
    )
    with pytest.raises(ValueError, match="feeds an encoder-decoder"):
        mask_report(objectives.create("t5", VOCABULARY, LENGTH), batches(1, rows=4), model=model)


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
    report = mask_report(objective, batches(1, rows=2), step=100)
    assert "as at training step 100" in report.to_text() and "as at training step 100" in report.to_html()
    assert report.to_dict()["step"] == 100 and "training step" not in bert.to_text()


def test_text_of_tokens_is_escaped_in_html():
    report = mask_report(
        objectives.create("mlm", VOCABULARY, LENGTH), batches(1, rows=2), decode=lambda token: "<b>&"
    )
    assert "&lt;b&gt;&amp;" in report.to_html() and "<b>&" not in report.to_html()


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="no batches"):
        mask_report(objectives.create("mlm", VOCABULARY, LENGTH), [])


def test_no_token_moves_the_cursor_of_a_terminal():
    hostile = "a\x1b[2J\x9b31m\r\n\u202eb"
    report = mask_report(
        objectives.create("mlm", VOCABULARY, LENGTH), batches(1, rows=2), decode=lambda token: hostile
    )
    for text in (report.to_text(), report.to_html()):
        assert "\x1b" not in text and "\x9b" not in text and "\r" not in text and "\u202e" not in text
        assert r"a\x1b[2J\x9b31m\r\n\u202eb" in text
    assert "\x1b[2J" not in report.to_text(color=True)


@pytest.mark.parametrize("name", ["causal_lm", "fim", "prefix_lm"])
def test_a_text_that_is_shown_whole_has_nothing_hidden(name):
    """Under whatever name it goes: what is still to come is predicted, not corrupted."""
    objective = dataclasses.replace(objectives.create(name, VOCABULARY, LENGTH), name="mine")
    report = mask_report(objective, batches(1, rows=4))
    assert report.corrupted_rate == 0.0 and report.predicted_rate > 0.0


def test_a_prefix_layout_hides_what_only_its_targets_show():
    report = mask_report(objectives.create("t5", VOCABULARY, LENGTH, layout="prefix"), batches(1))
    assert report.corrupted_rate == pytest.approx(3 / 20)
    assert report.coverage[-3:].tolist() == [1.0, 1.0, 1.0] and report.coverage[0] == 0.0
