"""The experiment cards: each runs from its command line, and its verdicts follow from the numbers alone."""

import json
import math

import jax
import numpy as np
import pytest

from experiments import running
from experiments.card import Claim, Results
from experiments.corruption_prediction import card as corruption_prediction
from experiments.mask_rate import card as mask_rate
from experiments.repeated_data import card as repeated_data
from maskformer import objectives
from maskformer.training.checkpoints import checkpoint_steps
from maskformer.training.sweeps import apply
from tests.training.tiny import tiny_config

VOCABULARY = objectives.Vocabulary(size=64, pad=0, unk=1, cls=2, sep=3, mask=4)


@pytest.mark.parametrize(
    "card", [corruption_prediction, repeated_data, pytest.param(mask_rate, marks=pytest.mark.slow)],
    ids=lambda card: card.__name__.split(".")[1],
)
def test_a_card_trains_measures_and_writes_its_verdicts(card, small, tmp_path, capsys):
    flags = ["--steps=4", "--seeds", "1", f"--workdir={tmp_path / 'runs'}", f"--output={tmp_path / 'out'}"]
    small(card.CARD).main(flags)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["seeds"] == [1]
    assert (tmp_path / "out" / "results.png").stat().st_size > 1000
    text = (tmp_path / "out" / "results.md").read_text()
    claims = card.claims(Results.load(tmp_path / "out" / "results.json"))
    assert text in capsys.readouterr().out
    # One seed decides nothing, and every claim has its line.
    assert text.count("**underpowered**") == len(claims) >= 3
    assert all(np.isfinite(claim.effects).all() for claim in claims)
    runs = [folder for folder in (tmp_path / "runs").iterdir() if folder.name != "xla"]
    assert {checkpoint_steps(folder / "checkpoints")[-1] for folder in runs} == {4}


def test_a_seed_that_the_sweep_lacks_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        mask_rate.CARD.main(["--seeds", "77", f"--workdir={tmp_path}"])
    assert "--seeds: [77]: expected some of [0, 1, 2" in capsys.readouterr().err


def test_the_interval_of_a_claim_is_students():
    # 4.303 is the 97.5% point of t with two degrees of freedom in any printed table.
    low, high = Claim("c", [1.0, 2.0, 3.0], 0.0, "nats").interval()
    assert math.isclose(high - 2.0, 4.303 / math.sqrt(3), rel_tol=1e-3) and math.isclose(low + high, 4.0)


def test_a_run_counts_as_complete_only_as_the_run_it_was(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(running, "train_and_evaluate", lambda config, folder: trained.append(config.seed))
    config = tiny_config(tmp_path)
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    assert not running.is_complete(config, tmp_path), "no record"
    record = json.loads(json.dumps(config.to_dict()))
    del record["data"]["max_rows"]  # as if the key were younger than the run
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert running.is_complete(config, tmp_path)
    assert not running.is_complete(apply(config, {"seed": 1}), tmp_path)
    for seed in (0, 1):
        running.train(apply(config, {"seed": seed}), tmp_path)
    assert trained == [1], "a complete run is not repeated"
    assert not running.is_complete(apply(config, {"optimizer.learning_rate": 0.5}), tmp_path)
    assert not running.is_complete(apply(config, {"train.steps": 20}), tmp_path), "unfinished"


def test_a_run_of_another_task_is_neither_complete_nor_resumed(tmp_path):
    config = tiny_config(tmp_path)
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    record = {key: value for key, value in json.loads(json.dumps(config.to_dict())).items() if key != "task"}
    theirs = apply(config, {"task.name": "theirs"})
    for before in ({}, {"task": {}}, {"task": {"name": None}}):
        (tmp_path / "config.json").write_text(json.dumps({**record, **before}))
        assert running.is_complete(config, tmp_path)
        running.refuse_another(config, tmp_path)
        assert not running.is_complete(theirs, tmp_path)
        with pytest.raises(ValueError, match="holds a run with task.name=None, and the card's has 'theirs'"):
            running.refuse_another(theirs, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**record, "task": {"name": "theirs"}}))
    assert running.is_complete(theirs, tmp_path) and not running.is_complete(config, tmp_path)
    with pytest.raises(ValueError, match="holds a run with task.name='theirs', and the card's has None"):
        running.refuse_another(config, tmp_path)


def test_corruption_and_prediction_arms_are_paired_token_by_token():
    length = 60
    tokens = np.random.default_rng(0).integers(5, 64, (6, length)).astype(np.int32)
    batch = {
        "tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": np.tile(np.arange(length), (6, 1)),
        "example_id": np.arange(6), "epoch": np.zeros(6, np.int32),
    }

    def predicted(corrupt, predict):
        objective = objectives.create("mlm", VOCABULARY, length, rate=corrupt, predict_rate=predict)
        out = objective(jax.random.key(0), batch)
        used = np.asarray(out.loss_weights) > 0
        rows = np.repeat(np.arange(6), len(used) // 6)
        places = np.broadcast_to(rows[:, None] * length + np.asarray(out.predict_positions), used.shape)
        return set(places[used].tolist()), used.sum()

    sets = {arm: predicted(*arm) for arm in corruption_prediction.ARMS.values()}
    assert {arm: total for arm, (_, total) in sets.items()} == {
        (0.4, 0.4): 144, (0.4, 0.2): 72, (0.2, 0.2): 72, (0.2, 0.4): 144
    }
    assert sets[0.2, 0.4] == sets[0.4, 0.4], "the two copies predict what 40% corruption predicts at once"
    assert sets[0.2, 0.2][0] < sets[0.4, 0.4][0] and sets[0.4, 0.2][0] < sets[0.4, 0.4][0]


def stored(card, arrays):
    """Results of [seed, arm, ...] arrays."""
    measured = {
        name: {arm: array[:, a].tolist() for a, arm in enumerate(card.arms)} for name, array in arrays.items()
    }
    return Results(card.arms, range(len(next(iter(arrays.values())))), measured)


def test_corruption_and_prediction_claims_compare_the_arms_they_name():
    # Losses in the order 40/40, 40/20, 20/20, 20/40: every claim but the last holds.
    base = np.array([4.0, 4.5, 3.9, 3.5])
    loss = np.stack([base + 0.001 * seed for seed in range(4)])[:, :, None].repeat(2, axis=2)
    loss += np.random.default_rng(0).normal(0, 1e-3, loss.shape)
    claims = corruption_prediction.claims(
        stored(corruption_prediction.CARD, {f"loss at {rate}": loss[:, :, e] for e, rate in enumerate(("15%", "40%"))})
    )
    assert [round(float(np.mean(claim.effects)), 1) for claim in claims] == [0.5, 0.4, 0.5, 0.5, 0.6, -0.1]
    assert [claim.verdict for claim in claims] == ["observed"] * 5 + ["not observed"]


def test_repeated_data_claims_read_the_curves():
    noise = np.random.default_rng(0).normal(0, 1e-3, (3, 1))
    causal, diffusion = np.array([4.5, 4.0, 4.2, 5.5]) + noise, np.array([5.0, 4.9, 4.4, 4.1]) + noise[::-1]
    epochs = np.tile([3.0, 12.5, 50.0, 150.0], (3, 2, 1))
    results = stored(repeated_data.CARD, {
        "epochs": epochs, "validation": np.stack([causal, diffusion], axis=1),
        "test_best": np.stack([causal.min(1), diffusion.min(1)], axis=1),
        "test_last": np.stack([causal[:, -1], diffusion[:, -1]], axis=1),
    })  # fmt: skip
    claims = repeated_data.claims(results)
    assert [round(float(np.mean(claim.effects)), 1) for claim in claims] == [0.9, 1.5, 0.0, 1.4, -0.1]
    assert [claim.verdict for claim in claims] == ["observed"] * 4 + ["not observed"]


def test_the_two_arms_of_repeated_data_differ_in_the_objective_alone():
    causal, diffusion = (repeated_data.get_config(name).to_dict() for name in repeated_data.OBJECTIVES)
    assert [key for key in causal if causal[key] != diffusion[key]] == ["objective"]
