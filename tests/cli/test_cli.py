"""The command line as a user types it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from maskformer import cli
from maskformer.masks import builders
from tests.training.tiny import tiny_config, write_corpus

RECIPE = "configs/bert.py:tiny"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe file of the tiny run, as a researcher would write one."""
    folder = tmp_path_factory.mktemp("recipe")
    corpus = write_corpus(folder / "text")
    (folder / "tiny.py").write_text(
        "from tests.training.tiny import tiny_config\n"
        "from maskformer.training.sweeps import arms\n"
        f"def get_config(arg=None):\n    return tiny_config({str(corpus)!r})\n"
        "def sweep():\n    return arms('objective.rate', [0.15, 0.4])\n"
    )
    assert tiny_config(corpus).train.steps == 12
    return folder / "tiny.py"


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", f"--config={recipe}", "--config.mesh.data=-1", f"--workdir={workdir}"]) == 0
    return workdir


def test_config_prints_what_will_run(capsys):
    assert cli.main(["config", f"--config={RECIPE}", "--config.train.steps=7000"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["train"]["steps"] == 7000 and printed["model"]["layers"] == 2


def test_train_says_where_everything_is(run, recipe, capsys):
    assert cli.main(["train", f"--config={recipe}", "--config.mesh.data=-1", f"--workdir={run}"]) == 0
    out = capsys.readouterr().out
    assert str(run / "checkpoints") in out and "metrics.jsonl" in out and "maskformer report" in out


def test_evaluate_reports_the_test_split_as_json(run, capsys):
    assert cli.main(["evaluate", f"--workdir={run}"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["split"] == "test" and results["loss"] > 0
    assert cli.main(["evaluate", f"--workdir={run}", "--config.evaluation.objective.rate=0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted"] > results["predicted"]


def test_fill_shows_probabilities_for_each_mask(run, capsys):
    assert cli.main(["fill", f"--workdir={run}", "--top=3", "the [MASK] admired the [MASK]."]) == 0
    out = capsys.readouterr().out
    assert out.count("%") == 6 and "[MASK] 2:" in out
    assert cli.main(["fill", f"--workdir={run}", "--examples=2"]) == 0
    assert "[MASK] 1:" in capsys.readouterr().out


def test_report_draws_a_table_and_a_picture(run, tmp_path, capsys):
    assert cli.main(["report", str(run), f"--output={tmp_path / 'curves.png'}"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_lists_its_runs_and_trains_one_by_index(recipe, tmp_path, capsys):
    assert cli.main(["sweep", f"--config={recipe}", "--list"]) == 0
    assert "001  objective.rate=0.4" in capsys.readouterr().out
    flags = [f"--config={recipe}", "--config.train.steps=1", "--config.mesh.data=-1", f"--workdir={tmp_path}"]
    assert cli.main(["train", *flags, "--sweep-index=1"]) == 0
    assert json.loads((tmp_path / "001" / "config.json").read_text())["objective"]["rate"] == 0.4
    assert cli.main(["train", *flags, "--sweep-index=2"]) == 2


def test_a_wrong_argument_of_a_recipe_is_named_alone(capsys):
    assert cli.main(["config", "--config=configs/gpt.py:base"]) == 2
    assert capsys.readouterr().err.startswith("error: config argument 'base': expected one of tiny, ")


def test_what_nobody_reads_to_its_end_ends_without_a_word():
    command = [sys.executable, "-m", "maskformer.cli", "mask", "causal", "--length=4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_mask_draws_text_and_picture(tmp_path, capsys):
    assert cli.main(["mask", "causal & window(2)", "--length=6", f"--png={tmp_path / 'mask.png'}"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 6
    assert (tmp_path / "mask.png").exists()


def test_mask_knows_the_masks_of_a_recipe(tmp_path, capsys, monkeypatch):
    for table in (builders.BUILDERS, builders.NAMES):
        monkeypatch.setitem(table, "checkers", None)  # so that it is forgotten afterwards
        del table["checkers"]
    recipe = tmp_path / "own.py"
    recipe.write_text(
        "from configs.bert import get_config\n"
        "from maskformer import masks\n\n\n"
        "@masks.builder()\n"
        "def checkers(stride: int):\n"
        "    return masks.predicate(lambda q, k: (q - k) % stride == 0)\n"
    )
    assert cli.main(["mask", "checkers(2)", "--length=4"]) == 2
    assert "a mask that a recipe registers needs --config=RECIPE.py" in capsys.readouterr().err
    assert cli.main(["mask", "checkers(2)", "--length=4", f"--config={recipe}"]) == 0
    assert cli.main(["mask", "checkers(2)", "--length=4", f"--config={recipe}"]) == 0  # read twice, registered once


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["train", f"--config={RECIPE}", "--config.objective.rate=1.3", "--workdir={tmp}/run"], "rate=1.3"),
        (["train", f"--config={RECIPE}", "--config.model.heads=3", "--workdir={tmp}/run"], "heads=3"),
        (["train", f"--config={RECIPE}", "--config.train.stepz=3", "--workdir={tmp}/run"], "'steps'"),
        (["train", f"--config={RECIPE}", "--workdir=/dev/null/run"], "cannot be written to"),
        (["train", "--workdir={tmp}/run"], "--config is missing"),
        (["evaluate", "--workdir={tmp}/nothing"], "no config.json there"),
        (["fill", "--workdir={tmp}/nothing", "a [MASK]"], "no config.json there"),
        (["report", "{tmp}/nothing"], "no config.json there"),
        (["mask", "causl"], "causal"),
        (["mask", "causal", "--size=3"], "no such flag"),
        (["mask", "causal", "--config"], "no such flag"),
        (["evaluate", "--workdir={tmp}/nothing", "--split=nope"], "--split='nope': expected one of train, validation"),
        (["evaluate", "--workdir={tmp}/nothing", "--config={tmp}/nothing.py"], "no such file"),
        (["fill", "--workdir={tmp}/nothing", "--top=0"], "--top=0: expected an integer of at least 1"),
        (["fill", "--workdir={tmp}/nothing", "--examples=2", "a [MASK]"], "--examples=2: expected no text"),
        (["check", "--config={tmp}/nothing.py", "--rows=0"], "--rows=0: expected an integer of at least 1"),
        (["mask-report", "--config={tmp}/nothing.py", "--batches=-1"], "--batches=-1: expected an integer"),
        (["mask-report", "--config={tmp}/nothing.py", "--step=-1"], "--step=-1: expected an integer of at least 0"),
        (["train", "--config={tmp}/nothing.py", "--workdir={tmp}/run", "--sweep=seeds"], "needs --sweep-index"),
        (["train", "--config={tmp}/nothing.py", "--workdir="], "--workdir: '': expected a folder"),
        (["evaluate", "--workdir", "{tmp}/nothing", ""], "--workdir: '': expected a folder"),
        (["sweep", "--config={tmp}/nothing.py", "--workdir=gz://bucket/run"], "unknown address; did you mean 'gs://'?"),
        (["fill", "--workdir=gs:///run"], "expected gs://BUCKET/FOLDER"),
        (["report", "gs://bucket/"], "'gs://bucket/': expected gs://BUCKET/FOLDER"),
        (["fill", "--workdir=s3://bucket/run"], "checkpoints are kept in gs:// or on a file system, and not in s3://"),
        (["report", ""], "'': expected a folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, said, tmp_path, capsys):
    assert cli.main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and said in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--workdir={tmp}/nothing", "--json={file}"],
        ["mask-report", "--config={tmp}/nothing.py", "--html={file}"],
        ["report", "{tmp}/nothing", "--output={file}"],
        ["mask", "causl", "--png={file}"],
    ],
)
@pytest.mark.parametrize(
    "file, said",
    [
        ("{tmp}/no/such.file", "there is no folder"),
        ("{tmp}", "this is a folder"),
        ("", "expected the path of a file"),
        ("/dev/null/such.file", "there is no folder '/dev/null'"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_else_is_looked_at(
    arguments, file, said, tmp_path, capsys
):
    file = file.format(tmp=tmp_path)
    assert cli.main([argument.format(tmp=tmp_path, file=file) for argument in arguments]) == 2
    message = capsys.readouterr().err
    flag = arguments[-1].partition("=")[0]
    assert message.startswith(f"error: {flag}={file!r}: expected ") and message.count("\n") == 1 and said in message


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device without space")
def test_a_disk_that_is_full_is_one_line(capsys):
    assert cli.main(["mask", "causal", "--length=4", "--png=/dev/full"]) == 2
    assert capsys.readouterr().err == "error: --png='/dev/full': cannot be written (No space left on device)\n"


def test_what_a_token_or_a_text_would_make_a_terminal_do_is_written_out(monkeypatch, capsys):
    from maskformer import evaluation
    from maskformer.training import runs

    guesses = [[evaluation.Guess("\x1b[31mred", 0.5), evaluation.Guess("\x9b2J\u202e", 0.25)]]
    monkeypatch.setattr(runs, "load", lambda *_, **__: None)
    monkeypatch.setattr(evaluation, "fill_text", lambda *_: guesses)
    assert cli.main(["fill", "--workdir=run", "a\x1b]0;title\x07\n[MASK] naïve"]) == 0
    out = capsys.readouterr().out
    assert out == (
        "a\\x1b]0;title\\x07\n[MASK] naïve\n  [MASK] 1: \\x1b[31mred 50.0%   \\x9b2J\\u202e 25.0%\n"
    )
    assert cli.main(["mask", "causal & \x1b[31mwindw(2)\n", "--length=4"]) == 2
    message = capsys.readouterr().err
    assert "\x1b" not in message and message.count("\n") == 1


def test_a_mistake_is_told_before_any_device_starts(tmp_path):
    """With a platform that does not exist, touching a device would raise something else."""
    command = [sys.executable, "-m", "maskformer.cli", "train", f"--config={RECIPE}", "--config.objective.rate=1.3"]
    environment = {**os.environ, "JAX_PLATFORMS": "nonesuch"}
    result = subprocess.run([*command, f"--workdir={tmp_path}"], env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "rate=1.3" in result.stderr
