"""Where the time of a run went, over all its starts: `maskformer report --goodput`.

Every microsecond between the first start of a run and its last sign of life is in one bucket, so that they sum to the
wall time exactly:

- productive: steps that were done for the first time, in which the devices had data to work on.
- init: imports, devices, restoring.
- compile: the first step of each start, with its compilation.
- data: preparing the text, and waiting for a batch while the devices had nothing left to do. The wait is the host's,
  so that this is the most that was lost: a wait in whose course the devices ran out of work counts as a whole.
- checkpoint: saving, as far as training waits for it.
- evaluation.
- recomputed: steps done again, since what an earlier start had made of them was not saved when it ended.
- down: between one start and the next, and whatever no line tells of, such as the time between the last line before a
  kill and the kill.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from maskformer.checks import printable, shown
from maskformer.training.events import EVENTS, PHASES, read_events
from maskformer.training.tables import markdown_table

BUCKETS = ("productive", "init", "compile", "data", "checkpoint", "evaluation", "recomputed", "down")
_BUCKET_OF = {"steps": "productive"}
# A line of so many microseconds tells of no run.
_MOST = 2**62


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
      began: seconds since the epoch.
      seconds: from its beginning to its last line.
      host: where its leader ran.
      first, last: the step that it went on from, and the last one known to be done.
      code, reason: how it ended; None after a kill, or while it runs.
    """

    began: float
    seconds: float
    host: str
    first: int
    last: int
    code: int | None
    reason: str | None


@dataclasses.dataclass(frozen=True)
class Goodput:
    """The time of a run.

    Attributes:
      buckets: microseconds in each of `BUCKETS`.
      attempts: the starts, in order.
    """

    buckets: Mapping[str, int]
    attempts: Sequence[Attempt]

    @property
    def wall(self) -> int:
        """Microseconds from the first start to the last sign of life."""
        return sum(self.buckets.values())

    @property
    def share(self) -> float:
        """The productive part of the wall time, from 0 to 1."""
        return self.buckets["productive"] / self.wall if self.wall else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "wall_seconds": self.wall / 1e6,
            "goodput": self.share,
            "seconds": {name: microseconds / 1e6 for name, microseconds in self.buckets.items()},
            "attempts": [dataclasses.asdict(attempt) for attempt in self.attempts],
        }


def goodput(workdir: str | os.PathLike[str]) -> Goodput:
    """The time of the run in `workdir`.

    Raises:
      ValueError: the folder has no events.
    """
    events = read_events(workdir)
    if not any(_is_start(event) for event in events):
        raise ValueError(
            f"workdir {shown(os.fspath(workdir))}: no start of a run in {EVENTS}; expected the folder of a run, "
            "of a version that keeps events"
        )
    return add_up(events)


def add_up(events: Sequence[Mapping[str, Any]]) -> Goodput:
    """The time of a run from its events (see `training/events.py`), in the order of their lines.

    Where two starts overlap, as when the clocks of two hosts differ, a moment belongs to the earlier one.
    """
    starts: dict[str, Mapping[str, Any]] = {}
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        if _is_start(event):
            starts.setdefault(event["attempt"], event)
        if event["attempt"] in starts:
            lines.setdefault(event["attempt"], []).append(event)
    buckets = dict.fromkeys(BUCKETS, 0)
    attempts: list[Attempt] = []
    now, done = None, 0
    for name, start in sorted(starts.items(), key=lambda item: item[1]["time"]):
        began = _microseconds(start["time"])
        now = began if now is None else now
        last, first = done, _step(start.get("step"))
        until, reached, end = began, first, None
        for line in sorted(lines[name], key=lambda line: line["time"]):
            if line["event"] == "end" and _is_length(line["time"]):
                end = line
                start_of, finish, bucket = until, _microseconds(line["time"]), "down"
                reached = max(reached, _step(line.get("step")))
            elif _is_phase(line):
                start_of = _microseconds(line["time"])
                finish, bucket = start_of + _microseconds(line["seconds"]), line["name"]
            else:
                continue
            until = max(until, finish)
            if finish <= now:
                reached = max(reached, _step(line.get("last")))
                continue
            if start_of > now:
                buckets["down"] += start_of - now
            length = finish - max(start_of, now)
            now = finish
            if bucket == "steps":
                again = _again(line, last)
                buckets["recomputed"] += math.floor(length * again)
                length -= math.floor(length * again)
            buckets[_BUCKET_OF.get(bucket, bucket)] += length
            reached = max(reached, _step(line.get("last")))
        done = max(done, reached)
        code = None if end is None else end.get("code")
        attempts.append(
            Attempt(
                began=start["time"],
                seconds=(until - began) / 1e6,
                host=str(start.get("host", "")),
                first=first,
                last=reached,
                code=code if type(code) is int else None,
                reason=None if end is None else str(end.get("reason", "")),
            )
        )
        # A start that said nothing more was alive at its beginning.
        if now is not None and began > now:
            buckets["down"] += began - now
            now = began
    return Goodput(buckets, attempts)


def table(workdirs: Sequence[str | os.PathLike[str]]) -> str:
    """A Markdown table: the wall time of each run, and what part of it went where; below, how its starts ended.

    Raises:
      ValueError: a folder has no events.
    """
    runs = {printable(os.fspath(workdir)): goodput(workdir) for workdir in workdirs}
    rows = [
        [name, _duration(run.wall / 1e6), str(len(run.attempts)), *(_share(run, bucket) for bucket in BUCKETS)]
        for name, run in runs.items()
    ]
    text = markdown_table(["run", "wall time", "starts", *BUCKETS], rows)
    for name, run in runs.items():
        text += f"\n\n{name}:"
        for number, attempt in enumerate(run.attempts, start=1):
            text += (
                f"\n  start {number} on {printable(attempt.host)}: steps {attempt.first} to {attempt.last} in "
                f"{_duration(attempt.seconds)}, {_ending(attempt)}"
            )
    return text


def _ending(attempt: Attempt) -> str:
    if attempt.reason is None:
        return "killed, or still running"
    return f"exit code {attempt.code}: {printable(attempt.reason)}"


def _share(run: Goodput, bucket: str) -> str:
    return f"{run.buckets[bucket] / run.wall:.1%}" if run.wall else "-"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}"


def _again(line: Mapping[str, Any], done: int) -> float:
    """What share of a line's steps an earlier start had done already."""
    first, last = _step(line.get("first")), _step(line.get("last"))
    if not first <= last or "first" not in line:
        return 0.0
    return min(max(done - first + 1, 0), last - first + 1) / (last - first + 1)


def _is_start(event: Mapping[str, Any]) -> bool:
    return event["event"] == "start" and _is_length(event["time"])


def _is_phase(event: Mapping[str, Any]) -> bool:
    return (
        event["event"] == "phase"
        and event.get("name") in PHASES
        and _is_length(event["time"])
        and _is_length(event.get("seconds"))
    )


def _is_length(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < _MOST / 1e6


def _step(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
