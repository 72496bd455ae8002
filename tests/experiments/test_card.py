"""What a card does for its author: runs, stored numbers, verdicts, the README's block; and how a new one begins."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from experiments import card as cards
from experiments import running, trained
from experiments.card import Card, Claim, Results, Trained
from experiments.corruption_prediction.card import CARD as CORRUPTION_PREDICTION
from experiments.mask_rate.card import CARD as MASK_RATE
from experiments.repeated_data.card import CARD as REPEATED_DATA
from maskformer import cli
from maskformer.training import Preempted, recipes
from maskformer.training.checkpoints import CheckpointError
from maskformer.training.lock import LockError
from maskformer.training.workdir import RunError
from tests.training.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
SAVED = "the checkpoint is saved, run the same command to resume"
DOCUMENT = (ROOT / "docs" / "experiments.md").read_text()


@pytest.fixture
def folder(tmp_path):
    """A folder for cards."""
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "card.py", tmp_path / "experiments")
    return tmp_path / "experiments"


@pytest.fixture
def skeleton(folder, monkeypatch):
    """A new card, as `maskformer card new` leaves it."""
    monkeypatch.chdir(folder.parent)
    assert cli.main(["card", "new", "higher_rate"]) == 0
    return load(folder / "higher_rate" / "card.py")


def load(file):
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_card", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CARD


def run(card, *flags):
    card.main(["--workdir=runs", *flags])
    return Results.load(card.home / "results.json")


def refusal(capsys, card, *flags):
    with pytest.raises(SystemExit) as exit:
        card.main(flags)
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


@pytest.mark.parametrize(
    "card, verdicts, line",
    [
        (
            MASK_RATE, ["underpowered", "observed", "observed"],
            "| 15% | ppl 97.8 (loss ±0.157), accuracy 24.9% | ppl 135.6 (loss ±0.112), accuracy 21.7% | "
            "ppl 249.2 (loss ±0.043), accuracy 16.1% |",
        ),
        (
            CORRUPTION_PREDICTION, ["observed"] * 6,
            "| 40% / 20% | loss 4.547 ±0.440, ppl 94.3, accuracy 20.4% | "
            "loss 4.745 ±0.319, ppl 115.0, accuracy 18.8% |",
        ),
        (
            REPEATED_DATA, ["observed"] * 4 + ["not observed"],
            "| diffusion | 144, 150, 150, 150, 150 | <= 4.139 ±0.024 | <= 4.138 ±0.024 |",
        ),
    ],
    ids=lambda value: value.home.name if isinstance(value, Card) else "",
)
def test_stored_results_give_the_table_and_the_verdicts_that_the_readme_shows(card, verdicts, line):
    text = card.render(Results.load(card.home / "results.json"))
    readme = card.home / "README.md"
    assert line in text.splitlines()
    assert re.findall(r"\*\*(.*)\*\* \|$", text, re.M) == verdicts
    assert cards.replace_block(readme, text) == readme.read_text(), "run the card with --write"


def test_the_document_shows_the_skeleton_in_under_sixty_lines(skeleton, folder):
    shown = re.search(r"```python\n(.*?)```", DOCUMENT, re.S)[1]
    assert shown == (folder / "higher_rate" / "card.py").read_text()
    assert len(shown.splitlines()) < 60


def test_a_new_card_runs_once_and_renders_its_stored_results(skeleton, trainings, capsys):
    results = run(skeleton)
    assert len(trainings) == len(set(trainings)) == 10 and "objective.rate=0.4,seed=3" in trainings
    np.testing.assert_allclose(results["loss", "40%"], [2.6, 2.64, 2.76, 2.96, 3.24])
    readme = (skeleton.home / "README.md").read_text()
    assert "| 15% | 2.940 ±0.099 | 0.340 ±0.011 |" in readme
    assert "| training at 40% is better than at 15% | +0.100 [-0.105, +0.305] nats | > 0.02 | **underp" in readme
    assert readme.endswith("**Pitfalls.**\n") and (skeleton.home / "results.png").stat().st_size > 1000
    capsys.readouterr()

    run(skeleton)
    assert len(trainings) == 10 and capsys.readouterr().out.count(": complete") == 10
    assert (skeleton.home / "README.md").read_text() == readme

    (skeleton.home / "results.png").unlink()
    dataclasses.replace(skeleton, measure=None).main(["--write"])
    assert (skeleton.home / "README.md").read_text() == readme and (skeleton.home / "results.png").is_file()


@pytest.mark.slow
def test_a_new_card_trains(skeleton, small):
    card = small(skeleton)
    card.main(["--steps=4", "--seeds", "0", "1", "--workdir=runs"])
    results = Results.load(pathlib.Path("runs/results/results.json"))
    assert results.array("loss").shape == (2, 2)
    assert "| > 0.02 | **" in pathlib.Path("runs/results/results.md").read_text()


def test_the_python_of_the_document_runs(folder, trainings, monkeypatch):
    monkeypatch.chdir(folder.parent)
    names = {"__file__": str(folder / "higher_rate" / "card.py"), "__name__": "higher_rate"}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.S):
        exec(block, names)
    names["CARD"].main(["--seeds", "0", "1", "--workdir=runs"])
    text = pathlib.Path("runs/results/results.md").read_text()
    assert len(trainings) == 4
    assert "| 40% | 13.7 (loss ±0.028) |" in text
    assert text.count("**observed**") == 2 and "| > -0.02 and < 0.02 | **not observed** |" in text


def test_a_trial_leaves_the_card_alone(skeleton, trainings, monkeypatch):
    run(skeleton)
    before = {file.name: file.read_bytes() for file in skeleton.home.iterdir() if file.is_file()}
    skeleton.main(["--steps=20", "--seeds", "0"])
    skeleton.main(["--seeds", "1", "--workdir=runs"])
    assert {file.name: file.read_bytes() for file in skeleton.home.iterdir() if file.is_file()} == before
    assert len(trainings) == 12, "two short runs; the long ones are complete"
    assert pathlib.Path("runs/higher_rate-20-steps/results/results.md").is_file()


def test_a_trial_is_not_continued_as_the_card(skeleton, trainings, capsys):
    skeleton.main(["--steps=20", "--seeds", "0", "--workdir=runs"])
    assert refusal(capsys, skeleton, "--workdir=runs") == (
        "runs/objective.rate=0.15,seed=0: holds a run with train.steps=20, and the card's has 600; choose another "
        "--workdir, or delete this folder"
    )
    assert len(trainings) == 2


@pytest.mark.parametrize(
    "error, code, said",
    [
        (Preempted(7), 75, f"stopped by SIGTERM at step 7; {SAVED}"),
        (Preempted(7, 130), 130, f"stopped by SIGINT at step 7; {SAVED}"),
        (RunError("no space"), 1, "error: no space"),
        (LockError("it is another's"), 2, "error: it is another's"),
        (CheckpointError("none is whole"), 2, "error: none is whole"),
        (ValueError("data.name='x': none"), 2, "error: data.name='x': none"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_card_that_cannot_train_ends_as_maskformer_train_does(skeleton, monkeypatch, capsys, error, code, said):
    def stop(config, folder):
        raise error

    monkeypatch.setattr(running, "train_and_evaluate", stop)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    with pytest.raises(SystemExit) as exit:
        skeleton.main([])
    assert (exit.value.code, capsys.readouterr().err) == (code, f"{said}\n")
    assert not (skeleton.home / "results.json").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_card_told_to_stop_while_it_measures_ends_after_the_run_at_hand(skeleton, trainings, capsys, number, code):
    measured = []

    def measure(run):
        measured.append(run.arm)
        os.kill(os.getpid(), number)
        return skeleton.measure(run)

    with pytest.raises(SystemExit) as exit:
        dataclasses.replace(skeleton, measure=measure).main([])
    assert exit.value.code == code and len(measured) == 1 and len(trainings) == 10
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert not (skeleton.home / "results.json").exists()


def test_a_checkpoint_that_cannot_be_measured_is_one_line(skeleton, trainings, monkeypatch, capsys):
    def load(folder, checkpoint):
        raise CheckpointError("none is whole")

    monkeypatch.setattr(trained.runs, "load", load)
    assert refusal(capsys, skeleton) == "none is whole"


def test_a_damaged_record_of_a_run_is_one_line(skeleton, trainings, capsys):
    run(skeleton)
    pathlib.Path("runs/objective.rate=0.4,seed=3/config.json").write_text("{")
    said = refusal(capsys, skeleton, "--workdir=runs")
    assert said.startswith("runs/objective.rate=0.4,seed=3/config.json: line 1 column 2 is not JSON")


def test_runs_are_checked_before_the_first_is_trained(skeleton, trainings, capsys):
    arms = {**skeleton.arms, "150%": {"objective.rate": 1.5}}
    said = refusal(capsys, dataclasses.replace(skeleton, arms=arms), "--workdir=runs")
    assert said.startswith("arm '150%': objective.rate=1.5: expected a fraction")
    readme = skeleton.home / "README.md"
    readme.write_text(readme.read_text().replace("<!-- end of results -->", ""))
    assert "README.md: expected one line '<!-- results -->' and below it" in refusal(capsys, skeleton, "--workdir=runs")
    assert refusal(capsys, skeleton, "--write", "--steps=3").startswith("--steps: has no meaning with --write")
    assert refusal(capsys, skeleton, "--steps=0") == "--steps: 0: expected at least 1"
    assert trainings == []


def test_results_of_other_arms_are_refused(skeleton, trainings, capsys):
    assert "results.json: no such file; run the card first" in refusal(capsys, skeleton, "--write")
    run(skeleton)
    arms = {"15%": {"objective.rate": 0.15}, "40%": {"objective.rate": 0.45}}
    assert refusal(capsys, dataclasses.replace(skeleton, arms=arms), "--write") == (
        "results: arm '40%': expected {'objective.rate': 0.45}, measured was {'objective.rate': 0.4}; "
        "run the card again"
    )


def test_results_are_stored_to_the_bit(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 2, 4)).tolist()
    results = Results({"a": {"x": 1}, "b": "b"}, (0, 5), {"one": {"a": [0.1, 1 / 3], "b": [1e-300, 2.0]},
                                                         "curve": {"a": values[0], "b": values[1]}})  # fmt: skip
    results.save(tmp_path / "results.json")
    again = Results.load(tmp_path / "results.json")
    assert again.measured == results.measured and dict(again.arms) == results.arms and again.seeds == [0, 5]
    assert again.numbers() == ["one"] and again.array("curve").shape == (2, 2, 4)
    with pytest.raises(ValueError, match="measured='on': expected one of one, curve; did you mean 'one'"):
        again["on", "a"]


@pytest.mark.parametrize(
    "damage",
    [
        "", "[]", "{}",
        '{"arms": {"a": {}}, "seeds": [0], "measured": {"loss": {"a": [NaN]}}}',
        '{"arms": {"a": {}}, "seeds": [0, 1], "measured": {"loss": {"a": [1.0]}}}',
        '{"arms": {"a": {}}, "seeds": 3, "measured": {"loss": 1}}',
    ],
)
def test_a_damaged_file_of_results_is_named(tmp_path, damage):
    (tmp_path / "results.json").write_text(damage)
    with pytest.raises(ValueError, match=r"results.json: not the results of a card .*; run the card again"):
        Results.load(tmp_path / "results.json")


def test_numbers_that_decide_nothing_are_refused(skeleton, trainings):
    with pytest.raises(ValueError, match="'loss' of arm '40%', seed 1=nan: expected finite numbers"):
        Results(skeleton.arms, (0, 1), {"loss": {"15%": [1.0, 2.0], "40%": [1.0, float("nan")]}})
    with pytest.raises(ValueError, match="expected a finite number for each seed"):
        Claim("c", [1.0, float("inf")], 0.0, "nats")
    uneven = dataclasses.replace(skeleton, measure=lambda run: {run.arm: 1.0})
    with pytest.raises(ValueError, match="names of arm '40%', seed 0"):
        run(uneven)
    other = dataclasses.replace(skeleton, claims=lambda results: [Claim("c", [1.0], 0.0, "nats")])
    with pytest.raises(ValueError, match="claim 'c': effects=1: expected 5, one for each seed"):
        run(other)


def test_a_claim_of_no_difference_needs_its_interval_within_the_margin():
    def verdict(*effects):
        return Claim("the same", effects, -0.1, "nats", ceiling=0.1).verdict

    assert verdict(0.01, -0.01, 0.02, 0.0) == "observed"
    assert verdict(0.5, 0.51, 0.49, 0.5) == verdict(-0.5, -0.51, -0.49, -0.5) == "not observed"
    assert verdict(0.3, -0.3, 0.2, -0.2) == verdict(0.0) == "underpowered"
    with pytest.raises(ValueError, match="ceiling=-0.1: expected a number above the threshold 0.1"):
        Claim("the same", [0.0], 0.1, "nats", ceiling=-0.1)


def test_arms_that_would_share_a_folder_are_refused(skeleton):
    for arms in ({}, {"a": {"objective.rate": 0.2}, "b": {"objective.rate": 0.2}}):
        with pytest.raises(ValueError, match=r"^card.arms="):
            dataclasses.replace(skeleton, arms=arms)
    with pytest.raises(ValueError, match=r"card.arms\['a'\]={'seed': 1}: expected no seed"):
        dataclasses.replace(skeleton, arms={"a": {"seed": 1}}, seeds=(0,))
    with pytest.raises(ValueError, match=r"^card.seeds=\(0, 0\)"):
        dataclasses.replace(skeleton, seeds=(0, 0))
    risky = dataclasses.replace(skeleton, arms={"a": {"data.name": "/my/../text"}})
    assert risky.folder("a", 0) == "data.name=_my_.._text,seed=0"


def test_a_curve_is_read_as_the_run_ended_up(tmp_path):
    lines = [{"step": 1, "v": 5.0}, {"step": 2, "v": 4.0}, {"step": 3, "t": 1.0}, {"step": 2, "v": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    finished = Trained(tmp_path, "a", 0, tiny_config(tmp_path))
    steps, values = finished.curve("v")
    assert steps.tolist() == [1, 2] and values.tolist() == [5.0, 3.0]
    with pytest.raises(ValueError, match="metrics.jsonl has no 'w'"):
        finished.curve("w")


def test_a_card_is_a_recipe_and_its_sweep_are_its_runs():
    for card, count in ((MASK_RATE, 15), (CORRUPTION_PREDICTION, 20), (REPEATED_DATA, 5)):
        config, recipe = recipes.load_config([f"--config={card.file}"])
        assert config.writers.progress and len(recipes.load_sweep(recipe)) == count
        assert not card.run_config(next(iter(card.arms)), 0).writers.progress
    loud = dataclasses.replace(MASK_RATE, arms={"loud": {"writers.progress": True}})
    assert loud.run_config("loud", 0).writers.progress, "what an arm says is what it gets"


@pytest.mark.parametrize(
    "name, said",
    [
        ("Rates", "card='Rates': expected a name of lower-case letters"),
        ("in", "card='in': expected a name of lower-case letters"),
        ("../x", "card='../x': expected a name of lower-case letters"),
        ("card", "card='card': expected a new name; there is one in 'experiments' already"),
        ("higher_rate", "card='higher_rate': expected a new name"),
    ],
)
def test_a_name_that_no_card_can_have_is_refused(skeleton, folder, capsys, name, said):
    before = sorted(folder.rglob("*"))
    assert cli.main(["card", "new", name]) == 2
    assert said in capsys.readouterr().err and sorted(folder.rglob("*")) == before


def test_a_card_is_begun_where_cards_are(tmp_path, capsys):
    assert cli.main(["card", "new", "mine", f"--folder={tmp_path}"]) == 2
    assert "which has card.py" in capsys.readouterr().err and not list(tmp_path.iterdir())
