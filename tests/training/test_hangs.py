"""A run that gets nowhere ends with its stacks and code 70, whatever it hangs in; one that was only stopped goes on."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from maskformer.training import default_config, hangs, resolve
from maskformer.training.events import read_events
from maskformer.training.phases import Phases
from maskformer.training.sections import WatchdogConfig

ROOT = pathlib.Path(__file__).parents[2]

# One process for each way to hang; `hang_here` is what the stacks are to show.
SCRIPT = """
import ctypes, os, pathlib, sys, threading, time
from maskformer.training import hangs
from maskformer.training.phases import Phases
from maskformer.training.sections import WatchdogConfig

way, workdir = sys.argv[1], pathlib.Path(sys.argv[2])
hangs.GRACE, hangs.LAST_WORDS = 0.5 if way == "c++ with the lock" else 60.0, 1.5
limits = WatchdogConfig(first_step=0.0, step=1.0, evaluation=1.0, checkpoint=1.0)


def hang_here():
    if way == "python":
        yield time.sleep(60)
    elif way == "c++":
        ctypes.CDLL(None).sleep(60)
    elif way == "c++ with the lock":
        ctypes.PyDLL(None).sleep(60)
    elif way == "nobody reads stderr":
        threading.Event().wait()
    elif way == "stopped":
        print("stop me", flush=True)
        deadline = time.monotonic() + 60
        while not (workdir / "continued").exists() and time.monotonic() < deadline:
            phases.beats += 1
            time.sleep(0.05)
        yield 1


class Ready:
    def is_ready(self):
        return True


phases = Phases()
with phases, hangs.Watchdog(phases, limits, workdir):
    phases.record(workdir, {})
    for step in phases.steps(1, 3):
        if step == 1:
            time.sleep(1.5)  # the first step has no limit
        elif step == 2:
            time.sleep(0.6)  # for the thread to see which phase this is
        elif step == 3:
            phases.batch(hang_here(), Ready())
"""
WAYS = ("python", "c++", "c++ with the lock", "nobody reads stderr", "stopped")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Way to hang -> exit code, stderr, workdir; all at once, since most of the time is the import of JAX."""
    folder = tmp_path_factory.mktemp("hangs")
    (folder / "script.py").write_text(SCRIPT)
    runs = {}
    for way in WAYS:
        (folder / way).mkdir()
        stderr, full = subprocess.PIPE, None
        if way == "nobody reads stderr":
            full, stderr = os.pipe()
            os.set_blocking(stderr, False)
            try:
                while True:
                    os.write(stderr, b"x" * 4096)
            except BlockingIOError:
                os.set_blocking(stderr, True)
        command = [sys.executable, str(folder / "script.py"), way, str(folder / way)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
        # Without the warnings of libraries, which would wait for a reader too.
        command[1:1] = ["-W", "ignore"]
        runs[way] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True), full
    try:
        process = runs["stopped"][0]
        assert process.stdout.readline() == "stop me\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        (folder / "stopped" / "continued").touch()
        process.send_signal(signal.SIGCONT)
        return {
            way: (process.wait(60), process.stderr.read() if process.stderr else "", folder / way)
            for way, (process, _) in runs.items()
        }
    finally:
        for process, _ in runs.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize("way", ["python", "c++"])
def test_a_hang_is_ended_with_its_stacks_and_one_line(ended, way):
    code, errors, workdir = ended[way]
    assert code == hangs.EX_HUNG == 70
    written = (workdir / "hung-0.txt").read_text()
    for text in (errors, written):
        assert "hung: no progress for 1 s in steps after step 2, waiting for a batch (process 0 on " in text
        assert "in hang_here" in text and "in batch" in text
    (end,) = [line for line in read_events(workdir) if line["event"] == "end"]
    assert end["code"] == 70 and end["step"] == 2 and end["reason"].startswith("hung: no progress")
    assert read_events(workdir)[-1] == end


def test_a_hang_that_holds_pythons_lock_is_ended_too(ended):
    code, errors, _ = ended["c++ with the lock"]
    assert code == 1 and "in hang_here" in errors and "Timeout" in errors


def test_last_words_that_nobody_reads_do_not_keep_the_process(ended):
    assert ended["nobody reads stderr"][0] == 70


def test_a_process_that_was_stopped_as_a_whole_goes_on(ended):
    code, errors, workdir = ended["stopped"]
    assert (code, errors) == (0, "") and not (workdir / "hung-0.txt").exists()


def test_no_limit_starts_no_thread_and_progress_ends_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(hangs.os, "_exit", lambda code: pytest.fail("ended"))
    none = WatchdogConfig(first_step=0.0, step=0.0, evaluation=0.0, checkpoint=0.0)
    with hangs.Watchdog(Phases(), none, tmp_path) as watchdog:
        assert watchdog._thread is None
    phases = Phases()
    with hangs.Watchdog(phases, WatchdogConfig(step=0.2), tmp_path) as watchdog:
        for _ in phases.steps(1, 30):
            time.sleep(0.02)
    assert not watchdog._thread.is_alive()


def test_each_phase_has_its_own_limit_and_preparing_the_text_has_none(tmp_path):
    watchdog = hangs.Watchdog(Phases(), WatchdogConfig(1.0, 2.0, 3.0, 4.0), tmp_path)
    assert watchdog._limits == {"compile": 1.0, "steps": 2.0, "evaluation": 3.0, "checkpoint": 4.0, "restore": 4.0}


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e9, "soon", True])
def test_a_limit_that_is_none_is_one_line(value):
    with pytest.raises(ValueError, match=r"watchdog\.step=.*: expected") as refusal:
        WatchdogConfig(step=value)
    assert "\n" not in str(refusal.value)


def test_limits_are_a_section_of_every_recipe_and_older_runs_have_the_usual_ones():
    config = default_config()
    config.watchdog.step = 0.0
    assert resolve(config).watchdog == WatchdogConfig(step=0.0)
    del config["watchdog"]
    assert resolve(config).watchdog == WatchdogConfig()
