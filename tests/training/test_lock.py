"""One training at a time in a workdir: refused in one line, recognised when dead, taken over when asked for."""

import contextlib
import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from maskformer.training import lock
from maskformer.training.lock import Lock, LockError, LockLostError
from maskformer.training.workdir import RunError


@pytest.fixture
def quick(monkeypatch):
    """Signs of life and patience in fractions of a second."""
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    monkeypatch.setattr(lock, "STALE_AFTER", 0.3)


def held_by(workdir, **changes):
    """A lock as another process would have left it."""
    path = workdir / lock.LOCK
    path.write_text(json.dumps({**lock._machine(), "started": time.time(), "token": "theirs", **changes}))
    return path


def dead_pid():
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_a_second_training_is_refused_in_one_line_that_names_the_first(tmp_path):
    with Lock(tmp_path), pytest.raises(LockError) as refusal, Lock(tmp_path):
        pass
    message = str(refusal.value)
    assert isinstance(refusal.value, ValueError) and "\n" not in message
    named = f"process {os.getpid()} on {lock.socket.gethostname()} (last sign of life "
    assert message.startswith(f"workdir {tmp_path}: {named}")
    assert message.endswith("wait for it or stop it, or take the workdir over with --steal")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_the_lock_goes_with_every_way_out(tmp_path, stop):
    with pytest.raises(stop), Lock(tmp_path):
        assert (tmp_path / lock.LOCK).exists()
        raise stop
    assert list(tmp_path.iterdir()) == []
    with Lock(tmp_path):
        pass


HOLD = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[2])
from maskformer.training.lock import Lock
with Lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_training_leaves_behind_does_not_stand_in_the_way(tmp_path, caplog):
    root = pathlib.Path(lock.__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), str(root)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(LockError, match=f"process {child.pid} on "), Lock(tmp_path):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (tmp_path / lock.LOCK).exists()
    began = time.monotonic()
    with Lock(tmp_path):
        assert time.monotonic() - began < 5
    assert f"taken over from process {child.pid}" in caplog.text and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        dict(pid="dead"),
        dict(born="1"),  # the number was given to another process since
        dict(pid=-1),
        dict(pid=None),
    ],
    ids=str,
)
def test_a_holder_on_this_machine_that_is_gone_is_recognised_at_once(tmp_path, changes, monkeypatch):
    if changes.get("pid") == "dead":
        changes = dict(pid=dead_pid())
    held_by(tmp_path, **changes)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: pytest.fail("waited"))
    with Lock(tmp_path) as ours:
        assert json.loads(ours.path.read_text())["pid"] == os.getpid()


def test_a_holder_that_ended_and_that_nobody_has_waited_for_is_gone(tmp_path, monkeypatch):
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    held_by(tmp_path, pid=child.pid, born=lock._born(child.pid))
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: pytest.fail("waited"))
    with Lock(tmp_path) as ours:
        assert json.loads(ours.path.read_text())["pid"] == os.getpid()
    child.wait()


# Machines that are all named localhost differ in their boot alone; so does one machine before and after.
@pytest.mark.parametrize(
    "elsewhere", [dict(host="node-7"), dict(namespace="pid:[1]"), dict(boot="another"), dict(boot="")], ids=str
)
def test_a_silent_holder_elsewhere_is_waited_for_and_then_replaced(tmp_path, quick, elsewhere, caplog):
    # A pid of that machine says nothing here, even where this machine has one like it.
    held_by(tmp_path, **elsewhere)
    began = time.monotonic()
    with Lock(tmp_path):
        assert time.monotonic() - began >= 0.3
    assert "waiting up to" in caplog.text and "taken over from process" in caplog.text


def test_a_holder_elsewhere_that_shows_life_is_refused_as_soon_as_it_does(tmp_path, quick, monkeypatch):
    path = held_by(tmp_path, host="node-7", pid=123)
    monkeypatch.setattr(lock, "STALE_AFTER", 60.0)
    # Another host's clock, an hour behind.
    os.utime(path, (time.time(), time.time() - 3600))
    timer = threading.Timer(0.1, lambda: os.utime(path, (time.time(), time.time() - 3590)))
    timer.start()
    began = time.monotonic()
    with pytest.raises(LockError, match="process 123 on node-7"), Lock(tmp_path):
        pass
    assert time.monotonic() - began < 30 and json.loads(path.read_text())["token"] == "theirs"


def test_a_lock_is_alive_for_as_long_as_it_is_held(tmp_path, quick):
    with Lock(tmp_path) as ours:
        os.utime(ours.path, (0, 0))
        deadline = time.monotonic() + 10
        while ours.path.stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - ours.path.stat().st_mtime < 60
        # Whoever cleans up by hand does not end a run.
        ours.path.unlink()
        while not ours.path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(LockError), Lock(tmp_path):
            pass
        ours.check()


def test_a_stolen_lock_stops_the_run_that_had_it_and_stays_with_the_thief(tmp_path, quick):
    with Lock(tmp_path) as first:
        with Lock(tmp_path, steal=True) as second:
            deadline = time.monotonic() + 10
            with pytest.raises(LockLostError, match=f"was taken over by process {os.getpid()}") as lost:
                while time.monotonic() < deadline:
                    first.check()
                    time.sleep(0.01)
            assert isinstance(lost.value, RunError)
            first.__exit__(None, None, None)
            assert second.path.exists()
            second.check()
    assert not list(tmp_path.iterdir())


def test_a_run_that_lost_its_workdir_does_not_claim_to_have_saved_nothing(tmp_path):
    lost = Lock(tmp_path)
    lost._lost = "process 5 on node-7"
    with pytest.raises(LockLostError) as error:
        lost.check()
    message = str(error.value)
    assert "saved nothing" not in message and "\n" not in message
    assert f"may have saved in the {lock.HEARTBEAT:.0f} s before" in message


@contextlib.contextmanager
def full_disk():
    """No file may grow, as on a full disk: it can be made, and not written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("before", ["nobody", "a dead one"])
def test_a_lock_that_does_not_fit_on_the_disk_is_one_line_and_leaves_nothing_new(tmp_path, before):
    if before == "a dead one":
        held_by(tmp_path, pid=dead_pid())
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(LockError, match=r"lock.json: cannot be written \(File too large\)") as error:
        with full_disk(), Lock(tmp_path):
            pass
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == left
    with Lock(tmp_path):
        pass


def test_a_file_system_that_does_not_answer_at_the_end_hides_no_error(tmp_path, monkeypatch):
    def unanswered(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with pytest.raises(KeyError, match="ours"), Lock(tmp_path):
        monkeypatch.setattr(lock._File, "read", unanswered)
        raise KeyError("ours")


@pytest.mark.parametrize("text", ["", "garbage", "[1]", "7", "{}"])
def test_a_lock_that_cannot_be_read_is_one_of_an_unknown_process(tmp_path, quick, text, caplog):
    (tmp_path / lock.LOCK).write_text(text)
    with Lock(tmp_path):
        pass
    assert "process unknown on an unknown host" in caplog.text


@pytest.mark.parametrize("make", [pathlib.Path.mkdir, lambda path: path.symlink_to(path)])
def test_what_is_no_lock_is_one_line(tmp_path, make):
    make(tmp_path / lock.LOCK)
    with pytest.raises(LockError, match="lock.json: cannot be read"), Lock(tmp_path):
        pass


def test_of_many_that_find_a_dead_holder_one_gets_the_workdir(tmp_path):
    held_by(tmp_path, pid=dead_pid())
    ready, done, results = threading.Barrier(8), threading.Barrier(8), []

    def start():
        ready.wait()
        try:
            with Lock(tmp_path):
                results.append("held")
                done.wait(30)
        except LockError:
            results.append("refused")
            done.wait(30)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == ["held"] + ["refused"] * 7
