"""Objectives that change while they train: by the losses of tokens (adaptive masking), and by a swap in mid-run."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs.swap import swap
from maskformer import data
from maskformer.training import loop, objectives_section, resolve, train_and_evaluate
from tests.training.tiny import metric_lines, tiny_config

SWAP = 5


@pytest.fixture
def compiled_steps(monkeypatch):
    """The jitted train steps of all runs in a test."""
    steps, jit = [], jax.jit

    def recording(function, **options):
        compiled = jit(function, **options)
        if getattr(function, "__name__", "") == "train_step":
            steps.append(compiled)
        return compiled

    monkeypatch.setattr(loop.jax, "jit", recording)
    return steps


def adaptive_config(corpus, **overrides):
    config = tiny_config(corpus, train__log_every=2, evaluation__every=0, **overrides)
    config.objective = objectives_section("conditional_mlm", weights="loss", rate=0.2, decay=0.9)
    return config


def token_losses(workdir, step):
    with ocp.PyTreeCheckpointer() as arrays:
        return np.asarray(arrays.restore(workdir / "checkpoints" / str(step) / "state")["token_losses"])


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
    corpus, devices, tmp_path, compiled_steps
):
    train_and_evaluate(swap_config(corpus, train__steps=8), tmp_path / "whole")
    lines = metric_lines(tmp_path / "whole")
    seen = np.diff([0] + [line["train/tokens_predicted"] for line in lines])
    expected = expected_predictions(swap_config(corpus), 8)
    assert seen.tolist() == expected and expected[SWAP] > 2 * expected[SWAP - 1]
    for steps in (SWAP, 8):
        train_and_evaluate(swap_config(corpus, train__steps=steps), tmp_path / "cut")
    assert metric_lines(tmp_path / "cut") == lines
    assert [step._cache_size() for step in compiled_steps] == [1] * 3
