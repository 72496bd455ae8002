"""The guard against signals, in small processes of its own and without JAX, which takes seconds to start."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from maskformer.training.preemption import EX_INTERRUPTED, EX_TEMPFAIL, Preempted, PreemptionGuard

PRELUDE = """
import hashlib, os, signal, sys, time, types
from maskformer.training.preemption import Preempted, PreemptionGuard
assert not {"jax", "numpy"} & set(sys.modules), "the guard is to be there before JAX is"
sys.modules["jax"] = types.SimpleNamespace(process_count=lambda: 1)
def ready():
    print("ready", flush=True)
def long_call_into_c():  # the main thread runs no Python meanwhile, as in a compilation
    hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000_000)
def train(guard):
    for step in range(1, 10_000):
        time.sleep(0.002)
        if guard.requested():
            raise Preempted(step, guard.exit_code)
        if step == 2:
            ready()
def main(body):
    with PreemptionGuard(ends_process=True) as guard:
        try:
            body(guard)
        except Preempted as stop:
            print(stop, file=sys.stderr)
            sys.exit(stop.exit_code)
"""


def run(source, *signals):
    """Runs the source, sends each signal after a "ready", returns the exit code and the lines of stderr."""
    script = PRELUDE + textwrap.dedent(source)
    # Python 3.12 and newer warn of every fork beside a thread.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for number in signals:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    return process.returncode, errors.splitlines()


@pytest.mark.parametrize("body", ["time.sleep(60)", "long_call_into_c()", "[None for _ in iter(int, 1)]"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, EX_TEMPFAIL), (signal.SIGINT, EX_INTERRUPTED)])
def test_a_signal_before_the_first_step_ends_the_process_with_its_code_in_one_line(body, number, code):
    # ", time" as the last word of a compound body would let the signal fall between two statements.
    ended, lines = run(f"main(lambda guard: (ready(), {body}))", number)
    assert ended == code
    assert lines == [f"stopped by {number.name} before the first step; run the same command to start again"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, EX_TEMPFAIL), (signal.SIGINT, EX_INTERRUPTED)])
def test_a_signal_in_the_loop_stops_at_a_step_boundary_with_its_code_in_one_line(number, code):
    ended, lines = run("main(train)", number)
    assert ended == code
    (line,) = lines
    assert line.startswith(f"stopped by {number.name} at step ") and "the checkpoint is saved" in line


@pytest.mark.parametrize("step", ["time.sleep(60)", "long_call_into_c()"])
def test_a_second_sigint_leaves_at_once(step):
    source = f"""
        def body(guard):
            guard.requested()
            ready()
            while not guard._requested: time.sleep(0.001)
            ready()
            {step}
        main(body)
    """
    assert run(source, signal.SIGINT, signal.SIGINT) == (
        EX_INTERRUPTED, ["stopped by a second SIGINT, without saving; run the same command to resume"],
    )  # fmt: skip


def test_a_sigint_where_exceptions_are_lost_is_not_lost():
    # As when it comes while JAX's callback of the garbage collector runs, which drops exceptions.
    source = """
        class Dropped:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)
        def body(guard):
            guard.requested()
            Dropped()
            train(guard)
        main(body)
    """
    code, lines = run(source)
    assert code == EX_INTERRUPTED and len(lines) == 1


def test_a_sigint_after_a_sigterm_is_not_requeued_and_a_second_sigterm_changes_nothing():
    source = """
        def body(guard):
            guard.requested()
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
            train(guard)
        main(body)
    """
    assert run(source)[0] == EX_INTERRUPTED


def test_an_event_loop_that_diverts_the_signals_hides_none_and_doubles_none():
    source = """
        def body(guard):
            guard.requested()
            signal.raise_signal(signal.SIGINT)  # heard twice: by the thread and by the handler
            time.sleep(0.05)
            ours = signal.set_wakeup_fd(-1)
            signal.raise_signal(signal.SIGTERM)
            signal.set_wakeup_fd(ours)
            assert guard._acted == {signal.SIGINT: 1, signal.SIGTERM: 1}
            train(guard)
        main(body)
    """
    code, lines = run(source)
    assert code == EX_INTERRUPTED and len(lines) == 1


def test_a_process_that_has_ended_its_run_keeps_its_exit_code():
    assert run("main(lambda guard: None); signal.raise_signal(signal.SIGTERM); sys.exit(3)") == (3, [])


def test_a_signal_to_a_forked_child_is_not_the_parents():
    source = """
        def body(guard):
            guard.requested()
            child = os.fork()
            if not child:
                time.sleep(60)
            os.kill(child, signal.SIGTERM)
            assert os.waitpid(child, 0)[1] == signal.SIGTERM
            time.sleep(0.05)
            assert not guard.requested()
        main(body)
    """
    assert run(source) == (0, [])


@pytest.fixture
def handlers():
    """Two handlers of ours for the time of a test: what the guard finds, and must leave behind."""
    def terminate(number, frame):
        raise AssertionError("a signal reached the handler from before the guard")

    before = [signal.signal(signal.SIGTERM, terminate), signal.signal(signal.SIGINT, signal.default_int_handler)]
    yield terminate, signal.default_int_handler
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])


def installed():
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


def test_inside_another_program_the_guard_gives_the_handlers_back(handlers):
    with PreemptionGuard() as guard:
        assert not set(installed()) & set(handlers)
        assert not guard.requested()
        signal.raise_signal(signal.SIGTERM)
        assert guard.requested() and guard.exit_code == EX_TEMPFAIL
        signal.raise_signal(signal.SIGINT)
        assert guard.exit_code == EX_INTERRUPTED
        with pytest.raises(KeyboardInterrupt):  # the second: somebody means it
            signal.raise_signal(signal.SIGINT)
    assert installed() == handlers


def test_a_guard_inside_another_is_the_outer_one(handlers):
    with PreemptionGuard() as outer:
        with PreemptionGuard() as inner:
            assert inner is outer
        signal.raise_signal(signal.SIGTERM)  # still guarded
        assert outer.requested()
    assert installed() == handlers


def test_what_stopped_a_run_says_so_and_carries_its_exit_code():
    assert (Preempted(7).exit_code, Preempted(7, 130).exit_code) == (75, 130)
    assert "SIGTERM at step 7" in str(Preempted(7)) and "SIGINT at step 7" in str(Preempted(7, 130))


def test_the_package_and_its_command_line_import_without_jax():
    source = "import maskformer.cli, maskformer.training.preemption, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], env=os.environ | {"PYTHONPATH": os.getcwd()}).returncode == 0
