"""Runs that train ELECTRA's two networks: on several devices, cut in two, learning, and evaluated afterwards."""

import numpy as np
import pytest

from maskformer import evaluation
from maskformer.training import generator_section, objectives_section, resolve, runs, train_and_evaluate
from tests.training.tiny import metric_lines, tiny_config

WEIGHT = 50.0
def electra_config(corpus, **overrides):
    config = tiny_config(corpus, **overrides)
    config.objective = objectives_section("electra", rate=0.2)
    config.model.generator = generator_section(width=0.5, heads=2)
    config.evaluation.metric = "discriminator_loss"
    return config


@pytest.fixture(scope="module")
def reference(corpus, first_device, tmp_path_factory):
    """A run of two halves on one device: the second half resumes from the checkpoint of the first."""
    workdir = tmp_path_factory.mktemp("reference")
    with first_device():
        for steps in (24, 48):
            train_and_evaluate(electra_config(corpus, **LEARNING, train__steps=steps), workdir)
    return workdir


LEARNING = dict(
    optimizer__learning_rate=3e-3, model__hidden_dropout=0.0, model__attention_dropout=0.0, evaluation__every=12,
    train__log_every=6, checkpoint__every=12,
)


def test_the_discriminator_comes_to_beat_the_answer_that_all_tokens_are_original(reference):
    lines = metric_lines(reference)
    first, *_, last = [line for line in lines if "validation/loss" in line]
    assert first["step"] == 12 and last["step"] == 48
    share = last["validation/replaced"]
    ignorant = -share * np.log(share) - (1 - share) * np.log(1 - share)
    # It says less of surprise than the share of replacements alone does, and is right more often than "original" is.
    assert last["validation/discriminator_loss"] < ignorant
    assert last["validation/discriminator_accuracy"] > 1 - share
    assert last["validation/loss"] < first["validation/loss"]
    trained = [line for line in lines if "train/loss" in line]
    for line in trained:
        joint = line["train/loss"] + WEIGHT * line["train/discriminator_loss"]
        # The joint loss is a mean over steps, the others over all tokens of the window.
        assert line["train/joint_loss"] == pytest.approx(joint, rel=0.05)


def test_eight_devices_in_two_parts_give_the_numbers_of_one(reference, corpus, devices, tmp_path, capfd):
    devices(8)
    mesh = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, train__accumulation_steps=2)
    train_and_evaluate(electra_config(corpus, **LEARNING, **mesh, train__steps=12), tmp_path)
    expected = [line for line in metric_lines(reference) if line["step"] <= 12]
    ours = metric_lines(tmp_path)
    assert [line.keys() for line in ours] == [line.keys() for line in expected]
    for line, other in zip(ours, expected):
        for name in line:
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), (line["step"], name)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_a_run_goes_on_as_if_it_had_not_stopped_and_compiles_once(
    reference, corpus, devices, tmp_path, compiled_steps
):
    train_and_evaluate(electra_config(corpus, **LEARNING, train__steps=36), tmp_path)
    assert [step._cache_size() for step in compiled_steps] == [1]
    # The shorter run evaluates at its last step too, which is one that both evaluate at anyway.
    assert metric_lines(tmp_path) == [line for line in metric_lines(reference) if line["step"] <= 36]


def test_a_loaded_run_evaluates_both_networks_and_fills_with_the_generator(reference, devices):
    run = runs.load(reference)
    results = run.measure("loss", "validation")
    best = min(
        (line for line in metric_lines(reference) if "validation/loss" in line),
        key=lambda line: line["validation/discriminator_loss"],
    )
    assert run.step == best["step"]
    for name in ("loss", "accuracy", "discriminator_loss", "discriminator_accuracy", "replaced"):
        assert results[name] == pytest.approx(best[f"validation/{name}"], rel=1e-6), name
    (guesses,) = evaluation.fill_text(run, "the lady admired [MASK] garden.", top=3)
    assert len(guesses) == 3 and guesses[0].probability > guesses[2].probability > 0


@pytest.mark.parametrize(
    "section, values, message",
    [
        ("generator", {}, "model.generator is empty: objective.name='electra' trains"),
        ("generator", generator_section(width=3.0), "model.generator.width=3.0: expected a share"),
        ("generator", generator_section(heads=3), "model.generator: model.heads=3: does not divide"),
        ("generator", {"wdth": 0.5}, "config.model.generator.wdth: no such key; did you mean 'width'"),
        ("objective", objectives_section("mlm"), "model.generator=.* objective.name='mlm' trains no generator"),
        (
            "objective", objectives_section("mixture", parts=[{"name": "electra"}]),
            "mixture: 'electra' trains two networks",
        ),
    ],
)
def test_a_generator_that_is_missing_idle_or_misshapen_is_refused(section, values, message, tmp_path):
    config = electra_config(tmp_path)
    where = config.model if section == "generator" else config
    with config.unlocked():
        where[section] = values
    with pytest.raises(ValueError, match=message):
        resolve(config)


def test_a_metric_of_another_task_than_the_one_that_evaluates_is_refused(tmp_path):
    config = electra_config(tmp_path)
    with config.unlocked():
        config.evaluation.objective = {"name": "mlm"}
    with pytest.raises(ValueError, match="evaluation.metric='discriminator_loss': expected what objective.name='mlm' "):
        resolve(config)
