"""The phases of a run: every moment is in one, their lines leave no gap, and nothing is waited for."""

import itertools

import pytest

from maskformer.training import compilation, phases
from maskformer.training.events import read_events
from maskformer.training.phases import Phases, process_began
from maskformer.training.preemption import Preempted

DEVICES = {"processes": 2, "devices": 8, "device_kind": "cpu"}


class Array:
    """What the last step makes: ready or not."""

    def __init__(self, ready=True):
        self.ready = ready

    def is_ready(self):
        return self.ready


@pytest.fixture
def wait(monkeypatch):
    """Moves the clock."""
    now = [5_000.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(phases.time, "time", lambda: 1.7e9 + now[0])

    def move(seconds):
        now[0] += seconds

    return move


def lines(workdir, event="phase"):
    return [line for line in read_events(workdir) if line["event"] == event]


def short(workdir):
    """Name, seconds and steps of each phase."""
    written = lines(workdir)
    found = [(line.get("part", line["name"]), line["seconds"], line.get("first"), line.get("last")) for line in written]
    microseconds = [(round(line["time"] * 1e6), round(line["seconds"] * 1e6)) for line in written]
    for (start, length), (following, _) in itertools.pairwise(microseconds):
        assert start + length == following, found
    return found


def small_run(wait, tmp_path, steps=4):
    """One second a step, of which a quarter is waited for the batch; 3 s of compilation, 10 s of evaluation."""
    run = Phases()
    with run:
        with run("imports"):
            wait(2.0)
        wait(0.5)
        with run("data"):
            wait(1.0)
        run.record(tmp_path, DEVICES)
        with run("restore"):
            wait(4.0)

        def batches():
            while True:
                wait(0.25)
                yield "batch"

        endless = batches()
        for step in run.steps(1, steps):
            assert run.batch(endless, Array()) == "batch"
            wait(3.0 if step == 1 else 0.75)
            if step == 2:
                with run("evaluation", step):
                    wait(10.0)
        wait(0.5)
    return run


def test_each_moment_is_in_one_phase_and_the_lines_leave_no_gap(wait, tmp_path):
    run = small_run(wait, tmp_path)
    assert short(tmp_path) == [
        ("imports", 2.0, None, None), ("init", 0.5, None, None), ("data", 1.0, None, None),
        ("restore", 4.0, None, None),
        ("data", 0.25, None, None), ("compile", 3.0, 1, 1),
        ("data", 0.25, None, None), ("steps", 0.75, 2, 2), ("evaluation", 10.0, None, None),
        ("data", 0.5, None, None), ("steps", 1.5, 3, 4), ("checkpoint", 0.5, None, None),
    ]  # fmt: skip
    (start,), (end,) = lines(tmp_path, "start"), lines(tmp_path, "end")
    assert start["step"] == 0 and start["time"] == 1.7e9 + 5_000.0 and start["devices"] == 8 and start["pid"] > 0
    assert (end["code"], end["reason"], end["step"], end["time"] - start["time"]) == (0, "done", 4, 24.25)
    assert {line["attempt"] for line in read_events(tmp_path)} == {run.attempt}


def test_a_wait_for_data_costs_nothing_while_the_devices_have_work(wait, tmp_path):
    run = Phases()
    with run:
        run.record(tmp_path, DEVICES)
        for step in run.steps(1, 3):
            run.batch(iter([wait(0.0)]), Array(ready=False))

            def late():
                wait(5.0)
                yield 1

            run.batch(late(), Array(ready=step == 3))
            wait(1.0)
    assert short(tmp_path) == [("compile", 6.0, 1, 1), ("data", 5.0, None, None), ("steps", 7.0, 2, 3)] + [
        ("checkpoint", 0.0, None, None)
    ]


def test_steps_are_written_every_few_seconds_so_that_a_kill_costs_no_more(wait, tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "WRITE_EVERY", 3.0)
    run = Phases()
    run.record(tmp_path, DEVICES)
    for step in run.steps(11, 20):
        wait(1.0)
        written = max([line["last"] for line in lines(tmp_path)], default=10)
        assert step - written <= 4
    assert short(tmp_path) == [
        ("compile", 1.0, 11, 11), ("steps", 3.0, 12, 14), ("steps", 3.0, 15, 17), ("steps", 3.0, 18, 20)
    ]


@pytest.mark.parametrize(
    "error, code, reason",
    [
        (Preempted(2, 75), 75, "stopped by SIGTERM at step 2"),
        (Preempted(2, 130), 130, "stopped by SIGINT"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (ValueError("a mistake\nof two lines"), 2, "a mistake"),
        (RuntimeError("no disk"), 1, "no disk"),
        (SystemExit(3), 1, "3"),
    ],
)
def test_the_end_has_the_exit_code_and_the_reason_of_what_ended_the_run(wait, tmp_path, error, code, reason):
    run = Phases()
    with pytest.raises(type(error)), run:
        run.record(tmp_path, DEVICES)
        for _ in run.steps(1, 9):
            wait(1.0)
            if run.step == 2:
                raise error
    (end,) = lines(tmp_path, "end")
    assert end["code"] == code and end["reason"].startswith(reason) and "\n" not in end["reason"] and end["step"] == 2


def test_a_run_that_fails_before_its_first_step_has_a_start_and_an_end(wait, tmp_path):
    run = Phases()
    with pytest.raises(RuntimeError), run:
        run.record(tmp_path, DEVICES)
        with run("restore"):
            wait(1.0)
            raise RuntimeError("damaged")
    assert [line["event"] for line in read_events(tmp_path)] == ["start", "phase", "phase", "end"]


def test_only_the_process_that_keeps_the_events_writes_them(wait, tmp_path):
    run = Phases()
    with run:
        run.record(None, DEVICES)
        for _ in run.steps(1, 3):
            wait(1.0)
    assert list(tmp_path.iterdir()) == [] and run.step == 3 and run._lines is None


def test_nothing_is_written_after_the_end(wait, tmp_path):
    run = small_run(wait, tmp_path)
    before = read_events(tmp_path)
    with run("evaluation"):
        wait(9.0)
    run.end(1, "again")
    assert read_events(tmp_path) == before


def test_the_line_at_the_start_says_where_the_time_went_and_adds_up(wait, tmp_path, monkeypatch):
    counts = iter([(7, 7)] + [(10, 8)] * 99)
    monkeypatch.setattr(compilation, "counts", lambda: next(counts))
    monkeypatch.setattr(compilation, "in_use", lambda: True)
    run = small_run(wait, tmp_path)
    assert run.notes() == [
        "started in 10.8 s: imports 2.0, data 1.2, restore 4.0, compile 3.0, other 0.5 (cache: 3 hits, 1 miss)"
    ]
    assert run.notes() == []
    assert lines(tmp_path)[0]["cache_hits"] == 3 and "cache_hits" not in lines(tmp_path)[1]


def test_progress_is_seen_at_every_step_and_change_of_phase(wait):
    run, seen = Phases(), []
    for step in run.steps(1, 3):
        seen.append(run.beats)
        with run("evaluation", step):
            seen.append(run.beats)
            assert run.step == step and run.name == "evaluation"
        seen.append(run.beats)
    assert seen == sorted(set(seen))


def test_a_window_tells_what_the_host_waited_for_and_leaves_evaluations_out(wait):
    run, told = Phases(), []

    def late():
        while True:
            wait(0.5)
            yield 1

    batches = late()
    for step in run.steps(1, 6):
        run.batch(batches, Array())
        wait(0.25)
        with run.waiting():
            assert run.waits_for == "the devices"
            wait(0.25)
        if step % 2 == 0:
            told.append(run.window_times(step))
            with run("evaluation", step):
                wait(100.0)
    assert told == [{}] + [{"data_wait_seconds": 1.0, "device_wait_seconds": 0.5}] * 2
    assert run.window == {"step": 6, "seconds": 1.0, "data": 0.5, "host": 0.75}


def test_the_start_of_this_process_lies_before_now_and_after_the_boot():
    import time

    age = time.time() - process_began()
    assert 0 < age < time.clock_gettime(time.CLOCK_BOOTTIME)
    assert Phases(began=process_began())._began <= Phases()._began
