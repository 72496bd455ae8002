"""Objectives that change while they train: by the losses of tokens (adaptive masking), and by a swap in mid-run."""

import json
import signal

import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs.swap import swap
from maskformer import data
from maskformer.objectives import Vocabulary
from maskformer.training import (
    Preempted,
    load_config,
    objectives_section,
    program,
    resolve,
    train_and_evaluate,
)
from maskformer.training.config import plain
from maskformer.training.workdir import check_same_run
from tests.training.tiny import metric_lines, tiny_config

SWAP = 5


def adaptive_config(corpus, **overrides):
    config = tiny_config(corpus, train__log_every=2, evaluation__every=0, **overrides)
    config.objective = objectives_section("conditional_mlm", weights="loss", rate=0.2, decay=0.9)
    return config


def token_losses(workdir, step):
    with ocp.PyTreeCheckpointer() as arrays:
        return np.asarray(arrays.restore(workdir / "checkpoints" / str(step) / "state")["task"])


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_running_losses_survive_a_restart_and_are_those_of_eight_devices(corpus, devices, tmp_path, compiled_steps):
    train_and_evaluate(adaptive_config(corpus, train__steps=8), tmp_path / "whole")
    for steps in (4, 8):
        train_and_evaluate(adaptive_config(corpus, train__steps=steps), tmp_path / "cut")
    whole, cut = token_losses(tmp_path / "whole", 8), token_losses(tmp_path / "cut", 8)
    assert whole.tobytes() == cut.tobytes()
    # What was seen moved away from the loss of an even guess, and what was not seen did not.
    untouched = whole == np.float32(np.log(whole.size))
    assert 5 < untouched.sum() < whole.size and untouched[:5].all()
    assert metric_lines(tmp_path / "whole") == metric_lines(tmp_path / "cut")
    devices(8)
    train_and_evaluate(adaptive_config(corpus, train__steps=8, mesh__data=8), tmp_path / "eight")
    np.testing.assert_allclose(token_losses(tmp_path / "eight", 8), whole, rtol=1e-4)
    assert [step._cache_size() for step in compiled_steps] == [1] * 4


def swap_config(corpus, **overrides):
    config = tiny_config(corpus, train__log_every=1, evaluation__every=0, checkpoint__every=SWAP, **overrides)
    parts = swap({"name": "mlm", "rate": 0.2}, {"name": "causal_lm"}, SWAP)
    config.objective = objectives_section("mixture", parts=parts)
    config.evaluation.objective = {"parts": [{"name": "causal_lm"}]}
    return config


def expected_predictions(config, steps):
    """Tokens that each step predicts, counted from the batches: MLM hides a fifth of a row, causal modelling predicts
    every token of a document but its first."""
    experiment = resolve(config)
    dataset = data.load_dataset(experiment.data, "train", data.load_tokenizer(experiment.data))
    batches = dataset.train_batches(experiment.train.batch_size, experiment.seed)
    counts = []
    for step, batch in zip(range(1, steps + 1), batches):
        sizes = (batch["segment_ids"] > 0).sum(1)
        masked = sum(max(1, round(0.2 * int(size))) for size in sizes if size)
        causal = sizes.sum() - sum(len(set(row[row > 0].tolist())) for row in batch["segment_ids"])
        counts.append(masked if step <= SWAP else causal)
    return counts


def test_a_swap_in_mid_run_is_sharp_resumes_where_it_happens_and_compiles_nothing(
    corpus, devices, tmp_path, compiled_steps, monkeypatch
):
    train_and_evaluate(swap_config(corpus, train__steps=8), tmp_path / "whole")
    lines = metric_lines(tmp_path / "whole")
    seen = np.diff([0] + [line["train/tokens_predicted"] for line in lines])
    expected = expected_predictions(swap_config(corpus, train__steps=8), 8)
    assert seen.tolist() == expected and expected[SWAP] > 2 * expected[SWAP - 1]
    to_global, calls = program.sharding.to_global, []

    def interrupting(batch, where):
        calls.append(1)
        if len(calls) == SWAP:
            signal.raise_signal(signal.SIGTERM)
        return to_global(batch, where)

    with monkeypatch.context() as patch, pytest.raises(Preempted) as stop:
        patch.setattr(program.sharding, "to_global", interrupting)
        train_and_evaluate(swap_config(corpus, train__steps=8), tmp_path / "cut")
    assert stop.value.step == SWAP
    train_and_evaluate(swap_config(corpus, train__steps=8), tmp_path / "cut")
    assert metric_lines(tmp_path / "cut") == lines
    assert [step._cache_size() for step in compiled_steps] == [1] * 3


@pytest.mark.parametrize("steps", [30, 7])
def test_the_swap_of_the_recipe_follows_the_length_of_the_run(steps):
    flags = ["--config=configs/swap.py:tiny", f"--config.train.steps={steps}", "--config.optimizer.warmup_steps=1"]
    config, _ = load_config(flags)
    # What is written to config.json describes the same run.
    for written in (config, json.loads(json.dumps(plain(config)))):
        experiment = resolve(written)
        objective = experiment.create_objective(Vocabulary(size=100, pad=0, mask=4))
        firsts = [int(np.argmax(objective.probabilities(step))) for step in range(steps)]
        assert firsts == [0] * (steps // 2) + [1] * (steps - steps // 2)


def test_a_share_that_is_another_step_in_a_longer_run_is_another_objective(corpus, tmp_path):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    halves = {"schedule": "step", "values": {"0": 0.3, "50%": 0.15}}
    config = plain(tiny_config(corpus, objective__rate=halves))
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_same_run(config, tmp_path)
    with pytest.raises(ValueError, match="objective.rate=.*'10'.*: the run in .* has .*'6'"):
        check_same_run(plain(tiny_config(corpus, objective__rate=halves, train__steps=20)), tmp_path)


@pytest.mark.parametrize(
    "rate, said",
    [
        ({"0": 0.3, "12": 0.15}, "objective.rate={.*}: its last value begins at step 12, .* train.steps=12; .*'50%'"),
        ({"0": 0.3, "100%": 0.15}, "its last value begins at step 12"),
        ({"0": 0.3, "150%": 0.15}, "'150%': expected a share of the run"),
        ({"0": 0.3, "half": 0.15}, "'half': expected a number of steps"),
        ({"0": 0.3, "5%": 0.15}, "two values begin at step 0"),
    ],
)
def test_a_step_that_the_run_never_reaches_is_refused(corpus, rate, said):
    with pytest.raises(ValueError, match=said):
        resolve(tiny_config(corpus, objective__rate={"schedule": "step", "values": rate}))


def test_a_weight_that_never_comes_is_named_by_its_part_and_a_long_line_is_not_refused(corpus):
    with pytest.raises(ValueError, match=r"objective.parts\[0\].weight=.* step 500"):
        config = tiny_config(corpus)
        config.objective = objectives_section("mixture", parts=swap({"name": "mlm"}, {"name": "causal_lm"}, 500))
        resolve(config)
    resolve(tiny_config(corpus, objective__rate={"schedule": "linear", "start": 0.3, "end": 0.15, "steps": 500}))
