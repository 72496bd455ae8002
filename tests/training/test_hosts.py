"""What the processes of a run tell each other: who is behind, who is slowest, and that nobody waits for it."""

import json
import threading
import time

import pytest

from maskformer.training import hosts
from maskformer.training.hosts import Hosts, describe, slowest
from maskformer.training.phases import Phases


class Store:
    """A coordination service of a dictionary."""

    def __init__(self):
        self.values, self.gate = {}, threading.Event()
        self.gate.set()

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        self.gate.wait()
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


def note(host=0.1, data=0.0, seconds=1.0, step=10, name="steps"):
    return {
        "host": f"h{step}", "step": step, "name": name, "waits_for": "",
        "window": {"step": step, "seconds": seconds, "host": host, "data": data},
    }  # fmt: skip


@pytest.fixture
def group(monkeypatch):
    """A function that makes the `Hosts` of three processes, which exchange nothing by themselves."""
    monkeypatch.setattr(hosts, "EVERY", 1e6)
    monkeypatch.setattr(hosts, "_runs", iter([0, 0, 0]))
    made = []

    def make(store):
        made.extend(Hosts(Phases(), index, 3, store) for index in range(3))
        return made

    yield make
    for one in made:
        one.close()


def test_the_slowest_is_the_host_whose_own_work_takes_longest_and_waiting_for_others_does_not_count():
    notes = {0: note(0.1), 1: note(0.9, data=0.7), 2: note(0.2), 3: note(0.1)}
    process, line = slowest(notes)
    assert process == 1
    assert line == (
        "slowest host: h10 (process 1) takes 0.900 s of a step's 1.000 s itself, 0.700 s of it waiting for data; the "
        "median of the others is 0.100 s"
    )


@pytest.mark.parametrize(
    "notes",
    [
        {},
        {0: note(0.9)},
        {0: note(0.9), 1: {**note(), "window": {}}},
        {0: note(0.20), 1: note(0.29), 2: note(0.2)},
        # Ten times as long, and still nothing beside a step.
        {0: note(0.0001), 1: note(0.001), 2: note(0.0001)},
    ],
)
def test_nobody_is_named_where_all_are_alike_or_nothing_is_known(notes):
    assert slowest(notes) is None


def test_of_two_hosts_the_slower_one_is_named():
    assert slowest({0: note(0.1), 1: note(0.5)})[0] == 1


def test_the_same_host_is_named_again_only_after_a_while_and_another_at_once(group):
    leader, *_ = group(Store())
    now = [0.0]

    def name(slow):
        leader._name_slowest({one: note(0.9 if one == slow else 0.1) for one in range(3)}, lambda: now[0])
        return len(leader._phases.notes())

    assert [name(1), name(1), name(2)] == [1, 0, 1]
    now[0] = hosts.AGAIN + 1
    assert name(2) == 1


def test_who_has_not_got_there_is_named_with_host_phase_and_step(group):
    store = Store()
    made = group(store)
    for one, step in zip(made, (120, 119, 120)):
        one._phases.step, one._phases.name = step, "steps"
    made[1]._phases.waits_for = "a batch"
    for one in made:
        one.publish()
    host = json.loads(store.values["maskformer/hosts/0/1"])["host"]
    assert made[0].behind(5.0) == f"behind: process 1 on {host} (steps, 119 steps done, waits for a batch)"
    assert made[1].behind(5.0) == "all others are ahead of this one"
    made[1]._phases.step, made[1]._phases.name = 120, "evaluation"
    made[1].publish()
    assert made[0].behind(5.0).startswith("elsewhere: process 1 on ")


def test_a_thousand_hosts_make_one_line():
    notes = {0: note(step=9)} | {process: note(step=3) for process in range(1, 1000)}
    assert describe(0, 1024, notes).count("process") < 20 and "and 991 more" in describe(0, 1024, notes)


def test_a_service_that_does_not_answer_is_waited_for_no_longer_than_was_said(group):
    store = Store()
    leader, *_ = group(store)
    store.gate.clear()
    began = time.monotonic()
    assert leader.behind(0.2) == "the coordination service does not answer"
    assert time.monotonic() - began < 5.0
    store.gate.set()


def test_notes_are_exchanged_in_a_thread_and_the_leader_notes_the_slowest(monkeypatch):
    monkeypatch.setattr(hosts, "EVERY", 0.01)
    monkeypatch.setattr(hosts, "_runs", iter([5, 5]))
    store, runs = Store(), [Phases(), Phases()]
    for run, host in zip(runs, (0.1, 0.8)):
        run.window = {"step": 4, "seconds": 1.0, "host": host, "data": 0.0}
    made = [Hosts(run, index, 2, store) for index, run in enumerate(runs)]
    deadline, said = time.monotonic() + 30, []
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
        said = runs[0].notes()
    for one in made:
        one.close()
    assert "(process 1) takes 0.800 s" in said[0] and not runs[1].notes()
