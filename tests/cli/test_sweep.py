"""A sweep that is told to stop: its training saves, and the sweep ends with it. In processes without JAX."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from maskformer.cli import EX_USAGE
from maskformer.training.preemption import EX_INTERRUPTED, EX_TEMPFAIL

SWEEP = """
import sys, types
from maskformer import cli, training
from maskformer.cli import sweep
training.recipes = types.SimpleNamespace(
    load_config=lambda flags: ({}, None), load_sweep=lambda recipe, name: [{"seed": 0}, {"seed": 1}]
)
training.resolve, training.sweeps = lambda config: None, types.SimpleNamespace(apply=lambda values, overrides: values)
sys.executable = sys.argv[1]
sys.argv = ["maskformer", "sweep", "--workdir=" + sys.argv[2]]
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


def start(tmp_path, training):
    """A sweep of two runs, in a process group of its own, with a program in the place of `python`."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\nimport os, sys\n" + textwrap.dedent(training))
    program.chmod(0o755)
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(program), str(tmp_path / "runs")],
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


@pytest.mark.parametrize(
    "training, code",
    [
        ("sys.exit(1)", 1),
        ("sys.exit(2)", EX_USAGE),
        ("sys.exit(75)", EX_TEMPFAIL),
        ("sys.exit(130)", EX_INTERRUPTED),
        ("os.kill(os.getpid(), 9)", 137),
    ],
)
def test_a_run_that_does_not_end_well_ends_the_sweep_with_its_exit_code(training, code, tmp_path):
    assert finish(start(tmp_path, training)) == (code, ["000  seed=0"])


def test_the_runs_of_a_sweep_follow_one_another(tmp_path):
    sweep = start(tmp_path, "print(sys.argv[-1], flush=True)")
    lines = ["000  seed=0", "--sweep-index=0", "001  seed=1", "--sweep-index=1"]
    assert finish(sweep) == (0, lines)
