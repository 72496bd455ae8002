"""What every process of a run is doing at this moment, told to all of them beside the training.

Each puts a small note under its own key of JAX's coordination service, from a thread, every few seconds: its host, its
last step, its phase, and the times of a step in its last window. The training waits for none of it. Who hangs can then
say which hosts have not got there, and the leader names the slowest.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import socket
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maskformer.checks import printable
from maskformer.training.phases import Phases

logger = logging.getLogger(__name__)

EVERY = 10.0
CLOSE_SECONDS = 2.0
# The slowest host is named when its own work takes longer than the others' by this share of a step, and again only
# after a while.
MARGIN = 0.1
AGAIN = 600.0
# The trainings of a process group come in the same order in all of them.
_runs = itertools.count()

Note = Mapping[str, Any]


class Hosts:
    """Tells the other processes of a run what this one is doing, and knows what they are doing.

    Args:
      phases: of this process.
      index, count: of the processes.
      client: of JAX's coordination service: `key_value_set(key, value, allow_overwrite=True)` and
        `key_value_dir_get(prefix)`.
    """

    def __init__(self, phases: Phases, index: int, count: int, client: Any):
        self._phases, self._index, self._count, self._client = phases, index, count, client
        self._prefix = f"maskformer/hosts/{next(_runs)}/"
        self._done = threading.Event()
        self._named: tuple[int, float] | None = None
        self._thread = threading.Thread(target=self._exchange, name="hosts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say nothing more; wait a moment for what is being said, since the service may end next."""
        self._done.set()
        self._thread.join(CLOSE_SECONDS)

    def publish(self) -> None:
        """Say what this process is doing."""
        phases = self._phases
        note = {"host": socket.gethostname(), "step": phases.step, "name": phases.name, "waits_for": phases.waits_for}
        text = json.dumps({**note, "window": phases.window})
        self._client.key_value_set(f"{self._prefix}{self._index}", text, allow_overwrite=True)

    def notes(self) -> dict[int, Note]:
        """Process -> what it said last; without those that have said nothing."""
        pairs = self._client.key_value_dir_get(self._prefix)
        return {int(key.rpartition("/")[2]): json.loads(text) for key, text in pairs}

    def behind(self, wait: float) -> str:
        """Which processes have not got to where this one is, in words; waits `wait` seconds at most."""
        found: list[str] = []

        def ask() -> None:
            with contextlib.suppress(Exception):
                self.publish()
                found.append(describe(self._index, self._count, self.notes()))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(wait)
        return found[0] if found else "the coordination service does not answer"

    def _exchange(self) -> None:
        while not self._done.wait(EVERY):
            try:
                self.publish()
                if self._index == 0:
                    self._name_slowest(self.notes())
            except Exception as error:
                # A coordinator that is gone ends the run by itself.
                logger.debug("hosts: nothing exchanged: %s", error)

    def _name_slowest(self, notes: Mapping[int, Note], clock: Callable[[], float] = time.monotonic) -> None:
        found = slowest(notes)
        if found is None:
            return
        process, line = found
        if self._named is None or self._named[0] != process or clock() - self._named[1] > AGAIN:
            self._named = process, clock()
            self._phases.note(line)


def slowest(notes: Mapping[int, Note]) -> tuple[int, str] | None:
    """The process whose host takes longest for its own part of a step, and a line that names it; None where all are
    alike.

    A step takes equally long on all hosts, since they wait for each other on the devices; what a host does itself,
    such as waiting for its data, does not.

    Args:
      notes: process -> its note; `window` has `seconds`, `host` and `data`, all in seconds a step.
    """
    known = {process: note for process, note in notes.items() if note.get("window")}
    if len(known) < 2:
        return None
    process = max(known, key=lambda one: known[one]["window"]["host"])
    window = known[process]["window"]
    others = statistics.median(note["window"]["host"] for one, note in known.items() if one != process)
    if window["host"] - others <= MARGIN * window["seconds"]:
        return None
    host = printable(known[process]["host"])
    return process, (
        f"slowest host: {host} (process {process}) takes {window['host']:.3f} s of a step's "
        f"{window['seconds']:.3f} s itself, {window['data']:.3f} s of it waiting for data; the median of the others is "
        f"{others:.3f} s"
    )


def describe(index: int, count: int, notes: Mapping[int, Note]) -> str:
    """Which of `count` processes are not where process `index` is, in words.

    >>> here, there = {"host": "a", "step": 7, "name": "steps"}, {"host": "b", "step": 6, "name": "evaluation"}
    >>> describe(0, 3, {0: here, 1: there, 2: here})
    'behind: process 1 on b (evaluation, 6 steps done)'
    >>> describe(1, 3, {0: here, 1: there})
    'nothing is known of process 2; all others are ahead of this one'
    >>> describe(0, 2, {0: here, 1: here})
    'all 2 processes got here'
    """
    mine = notes[index]
    silent = [str(process) for process in range(count) if process not in notes]
    step, name = mine["step"], mine["name"]
    behind = {process: note for process, note in notes.items() if note["step"] < step}
    ahead = [process for process, note in notes.items() if note["step"] > step]
    elsewhere = {process: note for process, note in notes.items() if note["step"] == step and note["name"] != name}
    said = []
    if silent:
        said.append(f"nothing is known of process{'es' * (len(silent) > 1)} {_some(silent)}")
    for word, found in (("behind", behind), ("elsewhere", elsewhere)):
        if found:
            said.append(f"{word}: {_some([_named(process, note) for process, note in sorted(found.items())])}")
    if ahead:
        said.append("all others are ahead of this one" if not behind and not elsewhere else f"{len(ahead)} are ahead")
    return "; ".join(said) or f"all {count} processes got here"


def _named(process: int, note: Note) -> str:
    waits = f", waits for {note['waits_for']}" if note.get("waits_for") else ""
    return f"process {process} on {printable(note['host'])} ({note['name']}, {note['step']} steps done{waits})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
