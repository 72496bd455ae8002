"""A run's status, from folders that are written by hand."""

import os
import subprocess
import sys
import time

import pytest

from maskformer.training import lock
from maskformer.training.status import RunStatus, run_status
from tests.training.run_folders import make_run

ELSEWHERE = {"host": "other", "pid": 1, "boot": "x", "namespace": "y", "born": "z", "started": 1.0, "token": "t"}


def state(folder):
    status = run_status(folder)
    return status.state, status.why


def test_a_folder_that_nobody_has_trained_in_waits(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        assert run_status(tmp_path / name) == RunStatus("waiting", why="never started")


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (0, "done", ("done", "")),
        (0, "no better for 3 evaluations", ("done", "no better for 3 evaluations")),
        (75, "SIGTERM", ("preempted", "exit code 75: SIGTERM")),
        (130, "SIGINT", ("preempted", "exit code 130: SIGINT")),
        (70, "no step for 600 s", ("hung", "exit code 70: no step for 600 s; saved at step 40")),
        (1, "loss is nan", ("failed", "exit code 1: loss is nan; saved at step 40")),
        (2, "bad \x1b[31m", ("failed", "exit code 2: bad \\x1b[31m; saved at step 40")),
    ],
)
def test_the_last_end_says_what_became_of_a_run(code, reason, expected, tmp_path):
    folder = make_run(tmp_path / "run", step=42, saved=40, end=(code, reason))
    status = run_status(folder)
    assert (status.state, status.why) == expected
    assert (status.step, status.steps, status.metric) == (42, 100, ("validation/loss", 2.5))


def test_a_run_without_an_end_is_lost(tmp_path):
    folder = make_run(tmp_path / "run", step=42, saved=40)
    assert state(folder) == ("lost", "it ended 16 min ago without saying why; saved at step 40")


def test_a_lock_that_shows_life_is_a_run_that_runs_whatever_ended_before(tmp_path):
    folder = make_run(tmp_path / "run", step=42, end=(75, "SIGTERM"), lock=ELSEWHERE)
    assert state(folder) == ("running", "on other, last sign of life 0 s ago")
    past = time.time() - lock.STALE_AFTER - 10
    os.utime(folder / "lock.json", (past, past))
    assert state(folder) == ("preempted", "exit code 75: SIGTERM"), "its lock is of before that end"


def test_a_start_that_died_before_its_first_step_is_lost_though_the_one_before_had_saved(tmp_path):
    folder = make_run(tmp_path / "run", step=42, end=(75, "SIGTERM"), lock={**ELSEWHERE, "started": time.time() - 300})
    past = time.time() - 200
    os.utime(folder / "lock.json", (past, past))
    assert state(folder) == ("lost", "no sign of life of other for 3 min; saved at step 42")


def test_a_process_of_this_machine_that_is_gone_is_known_at_once(tmp_path):
    script = f"""
import os, pathlib
from maskformer.training.lock import Lock
Lock(pathlib.Path({str(tmp_path / "run")!r})).__enter__()
os.kill(os.getpid(), 9)
"""
    folder = make_run(tmp_path / "run", step=42)
    subprocess.run([sys.executable, "-c", script])
    assert state(folder)[0] == "lost"
    with lock.Lock(tmp_path / "run", steal=True):
        assert state(folder)[0] == "running"


def test_a_run_of_a_version_without_events_is_done_when_it_has_its_steps(tmp_path):
    assert state(make_run(tmp_path / "done", step=100, events=False)) == ("done", "")
    assert state(make_run(tmp_path / "cut", step=99, events=False))[0] == "lost"


def test_a_damaged_config_is_said_and_hides_no_other_run(tmp_path):
    folder = make_run(tmp_path / "run", step=42, end=(0, "done"))
    (folder / "config.json").write_text("{")
    status = run_status(folder)
    assert (status.state, status.steps) == ("failed", None)
    assert "config.json: line 1 column 2 is not JSON" in status.why


def test_a_run_in_a_bucket_has_a_status_too(tmp_path):
    folder = make_run("memory://status/run", step=42, saved=40, end=(1, "loss is nan"))
    status = run_status("memory://status/run")
    assert (status.state, status.step, status.metric) == ("failed", 42, ("validation/loss", 2.5))
    folder.rmtree()
    assert run_status("memory://status/run").state == "waiting"
