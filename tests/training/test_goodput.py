"""Where the time of a run went: every moment in one bucket, over kills, lost lines and clocks that differ."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskformer import cli
from maskformer.training import goodput, train_and_evaluate
from maskformer.training.events import EVENTS, PHASES, read_events
from maskformer.training.goodput import BUCKETS, add_up
from tests.training.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]


def start(attempt, time, step=0):
    return {"event": "start", "attempt": attempt, "time": time, "host": f"host-{attempt}", "step": step}


def phase(attempt, time, name, seconds, first=None, last=None):
    steps = {} if first is None else {"first": first, "last": last}
    return {"event": "phase", "attempt": attempt, "time": time, "name": name, "seconds": seconds, **steps}


def end(attempt, time, code=0, reason="done", step=0):
    return {"event": "end", "attempt": attempt, "time": time, "code": code, "reason": reason, "step": step}


def seconds(events):
    return {name: value / 1e6 for name, value in add_up(events).buckets.items() if value}


# Killed at 130 s after step 20, of which 10 are saved; the next start does 11 to 20 again.
KILLED = [
    start("a", 1000.0),
    phase("a", 1000.0, "init", 5.0),
    phase("a", 1005.0, "data", 10.0),
    phase("a", 1015.0, "compile", 20.0, 1, 1),
    phase("a", 1035.0, "steps", 40.0, 2, 10),
    phase("a", 1075.0, "checkpoint", 5.0),
    phase("a", 1080.0, "data", 10.0),
    phase("a", 1090.0, "steps", 40.0, 11, 20),
]
RESUMED = [
    start("b", 1200.0, step=10),
    phase("b", 1200.0, "init", 5.0),
    phase("b", 1205.0, "compile", 10.0, 11, 11),
    phase("b", 1215.0, "steps", 60.0, 12, 31),
    phase("b", 1275.0, "evaluation", 25.0),
    end("b", 1300.0, step=31),
]


def test_a_run_that_was_killed_and_resumed_by_hand():
    assert seconds([*KILLED, *RESUMED]) == {
        "productive": 40.0 + 40.0 + 60.0 * 11 / 20, "init": 10.0, "compile": 30.0, "data": 20.0, "checkpoint": 5.0,
        "evaluation": 25.0, "recomputed": 60.0 * 9 / 20, "down": 70.0,
    }  # fmt: skip
    first, second = add_up([*KILLED, *RESUMED]).attempts
    assert (first.first, first.last, first.seconds, first.code, first.reason) == (0, 20, 130.0, None, None)
    assert (second.first, second.last, second.seconds, second.code, second.reason) == (10, 31, 100.0, 0, "done")


def test_what_a_stopped_start_had_saved_is_not_recomputed():
    stopped = [*KILLED, end("a", 1130.0, 75, "stopped by SIGTERM", 20)]
    again = [phase("b", 1200.0, "compile", 1.0, 21, 21), phase("b", 1201.0, "steps", 9.0, 22, 30)]
    assert "recomputed" not in seconds([*stopped, start("b", 1200.0, 20), *again])


def test_a_step_done_a_third_time_is_recomputed_twice():
    events = [
        start("a", 0.0), phase("a", 0.0, "steps", 10.0, 1, 10),
        start("b", 10.0), phase("b", 10.0, "steps", 5.0, 1, 5),
        start("c", 15.0), phase("c", 15.0, "steps", 20.0, 1, 20),
    ]  # fmt: skip
    assert seconds(events) == {"productive": 20.0, "recomputed": 15.0}


def test_time_that_no_line_tells_of_is_down():
    torn = [line for line in KILLED if line["name" if "name" in line else "event"] != "checkpoint"]
    assert seconds(torn)["down"] == 5.0 and sum(seconds(torn).values()) == 130.0
    killed_in_its_compilation = [*KILLED, start("b", 1150.0, 10), *[{**line, "attempt": "c"} for line in RESUMED]]
    assert seconds(killed_in_its_compilation)["down"] == 70.0


def test_a_moment_of_two_starts_counts_once_and_for_the_earlier_one():
    ahead = [{**line, "time": line["time"] - 100.0} for line in RESUMED]  # the clock of the second host
    assert sum(seconds([*KILLED, *ahead]).values()) == 200.0
    assert seconds([*KILLED, *ahead])["init"] == 5.0


def test_lines_of_the_future_or_of_another_version_are_left_out():
    odd = [
        {"event": "straggler", "attempt": "a", "time": 1e9}, phase("a", 1130.0, "dreaming", 5.0),
        phase("a", 1e300, "steps", 5.0), phase("a", 1130.0, "steps", -5.0), phase("a", 1130.0, "steps", "5"),
        phase("a", 1130.0, "steps", True), phase("unknown", 1130.0, "steps", 5.0, 21, 22), end("a", -1.0, "x"),
    ]  # fmt: skip
    assert seconds([*KILLED, *odd]) == seconds(KILLED)


@st.composite
def runs(draw):
    """Random starts of a run, each cut off after some of its lines, in microseconds."""
    moment = draw(st.integers(0, 10**15))
    events, saved = [], 0
    first, latest = None, moment
    for number in range(draw(st.integers(1, 6))):
        moment += draw(st.integers(-(10**6), 10**10)) if number else 0
        moment = max(moment, 0)
        name, step = f"a{number}", draw(st.integers(0, saved))
        events.append(start(name, moment / 1e6, step))
        first, latest = moment if first is None else min(first, moment), max(latest, moment)
        for kind in draw(st.lists(st.sampled_from(PHASES), max_size=8)):
            length = draw(st.integers(0, 10**11))
            more = draw(st.integers(0, 30)) if kind in ("steps", "compile") else 0
            events.append(phase(name, moment / 1e6, kind, length / 1e6, *((step + 1, step + more) if more else ())))
            step, moment = step + more, moment + length
            latest = max(latest, moment)
        saved = max(saved, step)
        if draw(st.booleans()):
            events.append(end(name, moment / 1e6, draw(st.sampled_from([0, 1, 70, 75])), "x", step))
    return events, first, latest


@given(runs())
def test_the_buckets_of_any_run_sum_to_its_wall_time_exactly(run):
    events, first, latest = run
    found = add_up(events)
    assert set(found.buckets) == set(BUCKETS) and min(found.buckets.values()) >= 0
    assert sum(found.buckets.values()) == found.wall == latest - first
    assert 0.0 <= found.share <= 1.0


@given(runs(), st.data())
def test_lost_lines_cost_no_moment_before_the_last_one(run, data):
    events, *_ = run
    kept = [events[0], *[line for line in events[1:] if data.draw(st.booleans())]]
    ends = [round((line["time"] + line.get("seconds", 0)) * 1e6) for line in kept]
    known = {line["attempt"] for line in kept if line["event"] == "start"}
    ends = [moment for moment, line in zip(ends, kept) if line["attempt"] in known]
    starts = [round(line["time"] * 1e6) for line in kept if line["event"] == "start"]
    assert add_up(kept).wall == max(ends) - min(starts)


def test_the_table_and_the_json_say_the_same(tmp_path, capsys):
    (tmp_path / EVENTS).write_text("".join(json.dumps(line) + "\n" for line in [*KILLED, *RESUMED]))
    assert cli.main(["report", "--goodput", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    head, _, row = (line.split("|")[1:-1] for line in said.splitlines()[:3])
    cells = dict(zip([cell.strip() for cell in head], [cell.strip() for cell in row]))
    assert cells["wall time"] == "0:05:00" and cells["starts"] == "2" and cells["productive"] == "37.7%"
    assert "start 1 on host-a: steps 0 to 20 in 0:02:10, killed, or still running" in said
    assert "start 2 on host-b: steps 10 to 31 in 0:01:40, exit code 0: done" in said
    assert cli.main(["report", "--goodput", "--json", str(tmp_path)]) == 0
    (run,) = json.loads(capsys.readouterr().out).values()
    assert run["wall_seconds"] == 300.0 == sum(run["seconds"].values()) and run["goodput"] == pytest.approx(113 / 300)
    assert [attempt["code"] for attempt in run["attempts"]] == [None, 0]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--goodput"], "no start of a run in events.jsonl"),
        (["--json"], "--json: expected with --goodput only"),
        (["--goodput", "--output=x.png"], "--output='x.png': --goodput draws no picture"),
    ],
)
def test_mistakes_are_one_line(flags, said, tmp_path, capsys):
    assert cli.main(["report", *flags, str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1


KILL = """
import os, signal, sys
import jax
from maskformer.training import phases, program, sharding, train_and_evaluate
from tests.training.tiny import tiny_config

phases.WRITE_EVERY = 0.0
to_global, calls = program.sharding.to_global, []


def killing(batch, where):
    calls.append(1)
    if len(calls) == 13:  # two of them are of the evaluation
        os.kill(os.getpid(), signal.SIGKILL)
    return to_global(batch, where)


create = sharding.create_mesh
sharding.create_mesh = lambda config: create(config, jax.devices()[:1])
program.sharding.to_global = killing
train_and_evaluate(tiny_config(sys.argv[1], evaluation__max_batches=2, checkpoint__every=4), sys.argv[2])
"""


def test_a_real_run_that_was_killed_and_resumed(corpus, devices, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", KILL, str(corpus), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    (first,) = goodput.goodput(tmp_path).attempts
    # It was asked for the batch of step 11: nothing of the ten steps before is lost.
    assert (first.first, first.last, first.code) == (0, 10, None)
    train_and_evaluate(tiny_config(corpus, evaluation__max_batches=2), tmp_path)
    run = goodput.goodput(tmp_path)
    _, second = run.attempts
    saved = second.first
    assert saved in (4, 8) and (second.last, second.code) == (12, 0)
    assert all(run.buckets[name] > 0 for name in BUCKETS)
    events = read_events(tmp_path)
    wall = round(events[-1]["time"] * 1e6) - round(events[0]["time"] * 1e6)
    assert sum(run.buckets.values()) == wall
    again = [line for line in events if line["attempt"] == events[-1]["attempt"] and line.get("name") == "steps"]
    assert again[0]["first"] == saved + 2
