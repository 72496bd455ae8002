"""How far a run is, and whether anybody works on it: told from its workdir alone, without a device."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from maskformer import paths
from maskformer.checks import printable
from maskformer.paths import AnyPath
from maskformer.textfiles import unreadable
from maskformer.training import lines, lock
from maskformer.training.events import read_events
from maskformer.training.hangs import EX_HUNG
from maskformer.training.preemption import EX_INTERRUPTED, EX_TEMPFAIL
from maskformer.training.workdir import CHECKPOINTS, CONFIG, METRICS, checkpoint_steps, read_config, read_metrics

STATES = ("waiting", "running", "done", "preempted", "failed", "hung", "lost")


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """How a run is doing.

    Attributes:
      state: "waiting": it was never started. "running": somebody trains in the workdir, or did a moment ago. "done".
        "preempted": it was told to stop, has saved, and goes on when it is started again. "failed": it ended with an
        error. "hung": its watchdog ended it. "lost": it ended without a word, as after a kill.
      step: the last one that is recorded; what was not saved by then is computed again.
      steps: how many it is to have; None where that is not known.
      why: a few words on one line.
      metric: the name and the last value of what is measured on held-out text, or of the training loss.
    """

    state: str
    step: int = 0
    steps: int | None = None
    why: str = ""
    metric: tuple[str, float] | None = None


def run_status(workdir: str | os.PathLike[str]) -> RunStatus:
    """The status of the run in `workdir`.

    A run on another machine counts as alive for `lock.STALE_AFTER` seconds after its last sign of life, by the clock
    of this one.

    Raises:
      ValueError: the folder cannot be read, as when a bucket is forbidden.
    """
    folder = paths.resolve(workdir)
    try:
        return _status(folder)
    except OSError as error:
        raise unreadable(f"workdir {printable(str(folder))}", error) from error


def _status(folder: AnyPath) -> RunStatus:
    held = lock.holder(folder)
    events = read_events(folder)
    begun = paths.lexists(folder / CONFIG)
    if not begun and not events and held is None:
        return RunStatus("waiting", why="never started")
    config: dict[str, Any] = {}
    damage = ""
    if begun:
        try:
            config = read_config(folder, sections=("train", "evaluation"))
        except ValueError as error:
            damage = str(error)
    metrics = read_metrics(folder / METRICS) if lines.exists(folder / METRICS) else []
    saved = checkpoint_steps(folder / CHECKPOINTS)
    told = [event[key] for event in events for key in ("step", "last") if type(event.get(key)) is int]
    step = max([*told, *saved[-1:], *(line["step"] for line in metrics[-1:])], default=0)
    steps = config.get("train", {}).get("steps")
    steps = steps if type(steps) is int else None
    state, why = _state(held, events, step, steps)
    if damage and state != "running":
        state, why = "failed", damage
    if state in ("lost", "failed", "hung"):
        why += f"; saved at step {saved[-1]}" if saved else "; nothing is saved"
    return RunStatus(state, step, steps, why, _last_metric(config, metrics))


def _state(
    held: tuple[Mapping[str, Any], float] | None, events: Sequence[Mapping[str, Any]], step: int, steps: int | None
) -> tuple[str, str]:
    if held is not None and lock.alive(*held):
        holder, silent = held
        return "running", f"on {holder.get('host', 'an unknown host')}, last sign of life {lock.age(silent)} ago"
    attempt = events[-1]["attempt"] if events else None
    end = next((event for event in events if event["attempt"] == attempt and event["event"] == "end"), None)
    # A start of which nothing but its lock is left did not come as far as its first step.
    newer = held is not None and end is not None and held[0].get("started", 0) > end["time"]
    if end is not None and not newer:
        code, reason = end.get("code"), printable(str(end.get("reason", "")))
        if code == 0:
            return "done", reason if reason != "done" else ""
        known = {EX_TEMPFAIL: "preempted", EX_INTERRUPTED: "preempted", EX_HUNG: "hung"}
        return known[code] if code in known else "failed", f"exit code {code}: {reason}"
    if not events and held is None and steps is not None and step >= steps:
        return "done", ""  # of a version without events
    if held is not None:
        holder, silent = held
        return "lost", f"no sign of life of {holder.get('host', 'an unknown host')} for {lock.age(silent)}"
    since = f" {lock.age(time.time() - events[-1]['time'])} ago" if events else ""
    return "lost", f"it ended{since} without saying why"


def _last_metric(config: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]) -> tuple[str, float] | None:
    evaluation = config.get("evaluation", {})
    for name in (f"{evaluation.get('split')}/{evaluation.get('metric')}", "train/loss"):
        for line in reversed(metrics):
            if name in line:
                return name, line[name]
    return None
