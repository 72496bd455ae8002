"""A sweep that is told to stop: its training saves, and the sweep ends with it. In processes without JAX."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from maskformer import cli
from maskformer.cli import EX_USAGE, sweep
from maskformer.training.preemption import EX_INTERRUPTED, EX_TEMPFAIL
from maskformer.training.status import STATES
from tests.training.run_folders import make_run

SWEEP = """
import sys, types
from maskformer import cli, training
from maskformer.cli import sweep
training.recipes = types.SimpleNamespace(
    load_config=lambda flags: ({}, None), load_sweep=lambda recipe, name: [{"seed": 0}, {"seed": 1}]
)
training.resolve, training.sweeps = lambda config: None, types.SimpleNamespace(apply=lambda values, overrides: values)
sys.executable = sys.argv[1]
sys.argv = ["maskformer", "sweep", "--workdir=" + sys.argv[2], *sys.argv[3:]]
sys.exit(cli.main())
"""
# Saving takes longer than the quarter of a second for which Python's own `subprocess.call` waits after a Ctrl-C.
SAVES = """
import signal, time
heard = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: heard.append(number))
print("ready", flush=True)
deadline = time.monotonic() + 20
while not heard and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.6)
print("saved; interrupted", heard.count(signal.SIGINT), flush=True)
sys.exit(130 if signal.SIGINT in heard else 75)
"""


def start(tmp_path, training, *flags):
    """A sweep of two runs, in a process group of its own, with a program in the place of `python`."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\nimport os, sys\n" + textwrap.dedent(training))
    program.chmod(0o755)
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(program), str(tmp_path / "runs"), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0,
    )  # fmt: skip


def finish(sweep):
    try:
        out, _ = sweep.communicate(timeout=30)
    finally:
        sweep.kill()
    return sweep.returncode, out.splitlines()


@pytest.mark.parametrize(
    "send, number, code, interrupts",
    [
        (os.kill, signal.SIGTERM, EX_TEMPFAIL, 0),
        (os.kill, signal.SIGINT, EX_INTERRUPTED, 0),
        (os.killpg, signal.SIGTERM, EX_TEMPFAIL, 0),
        (os.killpg, signal.SIGINT, EX_INTERRUPTED, 1),  # Ctrl-C: twice would mean not to save
    ],
)
def test_a_sweep_that_is_stopped_waits_until_its_training_has_saved(send, number, code, interrupts, tmp_path):
    sweep = start(tmp_path, SAVES)
    assert [sweep.stdout.readline() for _ in range(2)] == ["000  seed=0\n", "ready\n"]
    send(sweep.pid, number)
    assert finish(sweep) == (code, [f"saved; interrupted {interrupts}"])


def test_a_sweep_that_is_stopped_while_a_run_ends_does_not_begin_the_next(tmp_path):
    sweep = start(tmp_path, "os.kill(os.getppid(), 15)\nimport signal\nsignal.signal(15, signal.SIG_IGN)")
    assert finish(sweep) == (EX_TEMPFAIL, ["000  seed=0"])


@pytest.mark.parametrize("code", [EX_TEMPFAIL, EX_INTERRUPTED])
def test_a_run_that_was_told_to_stop_ends_the_sweep_with_its_exit_code(code, tmp_path):
    assert finish(start(tmp_path, f"sys.exit({code})")) == (code, ["000  seed=0"])


@pytest.mark.parametrize(
    "training, code, fix",
    [
        ("sys.exit(1)", 1, "--rerun-failed runs it again"),
        ("sys.exit(2)", EX_USAGE, "mend its config, then run the same command"),
        ("os.kill(os.getpid(), 9)", 137, "--rerun-failed runs it again"),
    ],
)
def test_a_sweep_goes_on_after_a_run_that_fails_and_ends_with_its_exit_code(training, code, fix, tmp_path):
    sweep = start(tmp_path, f"if sys.argv[-1] == '--sweep-index=0': {training}")
    said = [f"1 of 2 runs failed: 000 ({code})", f"000: {fix}"]
    assert finish(sweep) == (code, ["000  seed=0", f"000  failed with exit code {code}", "001  seed=1", *said])


def test_the_runs_of_a_sweep_follow_one_another(tmp_path):
    sweep = start(tmp_path, "print(sys.argv[-1], flush=True)")
    lines = ["000  seed=0", "--sweep-index=0", "001  seed=1", "--sweep-index=1"]
    assert finish(sweep) == (0, lines)


def test_only_runs_that_failed_hung_or_were_lost_are_run_again(tmp_path):
    make_run(tmp_path / "runs" / "000", end=(1, "loss is nan"))
    make_run(tmp_path / "runs" / "001", end=(0, "done"))
    sweep = start(tmp_path, "print(sys.argv[-1], flush=True)", "--rerun-failed")
    lines = ["000  seed=0", "--sweep-index=0", "001  left alone, done: has all of its steps"]
    assert finish(sweep) == (0, lines)


def test_each_state_of_a_run_is_run_again_or_left_alone_with_a_reason():
    assert sorted([*sweep.AGAIN, *sweep.LEFT_ALONE]) == sorted(STATES)


def test_the_table_of_a_sweep_says_how_each_run_is_doing(tmp_path, capsys):
    make_run(tmp_path / "000", step=100, end=(0, "done"), seed=0)
    make_run(tmp_path / "001", step=40, end=(1, "loss is nan"), seed=1)
    make_run(tmp_path / "003", step=40, end=(70, "no step for 600 s"), seed=3)
    assert cli.main(["sweep", f"--workdir={tmp_path}", "--status"]) == 0
    head, _, *rows, counts, again = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    loss = "validation/loss=2.5"
    assert cells == [
        ["run", "overrides", "state", "step", "last metric", "why"],
        ["000", "seed=0", "done", "100/100", loss, ""],
        ["001", "seed=1", "failed", "40/100", loss, "exit code 1: loss is nan; saved at step 40"],
        ["003", "seed=3", "hung", "40/100", loss, "exit code 70: no step for 600 s; saved at step 40"],
    ]
    assert counts == "1 done, 1 failed, 1 hung"
    assert again == "to run again: --rerun-failed here, or --array=1,3 with a launcher"


def test_the_table_of_a_recipe_has_the_runs_that_nobody_has_started(tmp_path, capsys):
    (tmp_path / "recipe.py").write_text(
        "from maskformer.training import default_config\n"
        "def get_config(arg=None):\n    return default_config()\n"
        "def sweep():\n    return [{'seed': 0}, {'seed': 1}]\n"
    )
    make_run(tmp_path / "runs" / "001", step=100, end=(0, "done"))
    flags = [f"--config={tmp_path}/recipe.py", f"--workdir={tmp_path}/runs", "--status"]
    assert cli.main(["sweep", *flags]) == 0
    _, _, first, second, counts = capsys.readouterr().out.splitlines()
    assert "waiting" in first and "never started" in first and "done" in second
    assert counts == "1 waiting, 1 done"


@pytest.fixture
def recipe(tmp_path):
    """Of two runs, the second of which cannot be."""
    (tmp_path / "recipe.py").write_text(
        "from maskformer.training import default_config\n"
        "def get_config(arg=None):\n    return default_config()\n"
        "def sweep_lr():\n    return [{'seed': 0}, {'optimizer.learning_rate': -1.0}]\n"
    )
    return [f"--config={tmp_path}/recipe.py", "--sweep=lr", f"--workdir={tmp_path}/runs"]


def test_an_entry_that_cannot_run_is_named_before_any_is_run(recipe, tmp_path, capsys):
    for flags in ([], ["--list"], ["--rerun-failed"]):
        assert cli.main(["sweep", *recipe, *flags]) == EX_USAGE
        out, err = capsys.readouterr()
        assert err.startswith("error: sweep_lr() entry 1: optimizer.learning_rate=-1.0: expected") and not out
    assert not (tmp_path / "runs").exists()


def test_the_table_of_a_sweep_needs_no_entry_that_can_run(recipe, tmp_path, capsys):
    make_run(tmp_path / "runs" / "000", step=100, end=(0, "done"))
    assert cli.main(["sweep", *recipe, "--status"]) == 0
    _, _, first, second, counts = capsys.readouterr().out.splitlines()
    assert "done" in first and "optimizer.learning_rate=-1.0" in second and counts == "1 done, 1 waiting"


def test_a_long_reason_keeps_its_ends_in_whole_words(tmp_path, capsys):
    words = [f"word{index}" for index in range(60)]
    make_run(tmp_path / "000", step=40, end=(1, " ".join(words)))
    assert cli.main(["sweep", f"--workdir={tmp_path}", "--status"]) == 0
    why = capsys.readouterr().out.splitlines()[2].strip("| ").rpartition("| ")[2]
    head, tail = why.removeprefix("exit code 1: ").removesuffix("; saved at step 40").split(" ... ")
    assert set(head.split() + tail.split()) <= set(words) and tail.endswith("word59") and 100 < len(why) <= 120


def test_the_index_of_a_run_is_a_flag_of_train(capsys):
    assert cli.main(["sweep", "--sweep-index=1"]) == EX_USAGE
    said = (
        "error: argument '--sweep-index=1': no such flag here; `maskformer train --sweep-index=INDEX` runs one entry\n"
    )
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--status", "--list"], "--status: not together with --list"),
        (["--rerun-failed", "--status"], "--rerun-failed: not together with --status"),
        (["--status", "--sweep=lr"], "--sweep='lr': is one of a recipe; give its --config too"),
        (["--status", "--workdir=/nowhere"], "--workdir=/nowhere: no runs of a sweep there; expected folders 000,"),
    ],
)
def test_what_cannot_be_shown_is_one_line(flags, message, capsys):
    assert cli.main(["sweep", *flags]) == EX_USAGE
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_table_of_a_sweep_in_a_bucket(bucket, capsys):
    make_run(f"{bucket}/sweep/000", step=100, end=(0, "done"))
    make_run(f"{bucket}/sweep/001", step=40, saved=40, seed=1)
    assert cli.main(["sweep", f"--workdir={bucket}/sweep", "--status"]) == 0
    _, _, first, second, counts, _ = capsys.readouterr().out.splitlines()
    assert "| 000 | seed=0" in first and "| done  | 100/100 | validation/loss=2.5 |" in first
    assert "| 001 | seed=1" in second and "| lost  | 40/100  |" in second and "saved at step 40" in second
    assert counts == "1 done, 1 lost"
