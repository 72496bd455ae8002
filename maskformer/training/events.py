"""What happened in a run and when: `events.jsonl`, one JSON object a line, over all its starts.

    {"event": "start", "time", "attempt", "host", "pid", "processes", "devices", "device_kind", "step"}
    {"event": "phase", "time", "attempt", "name", "seconds"}     and, where they apply, "part", "first", "last", ...
    {"event": "end", "time", "attempt", "code", "reason", "step"}

`time` is in seconds since the epoch: of a phase, when it began. `attempt` names one start of the run, and `step` is the
last one that is done. A phase is written when it is over, so that the lines of an attempt follow each other without a
gap; `first` and `last` are the steps that were done in it. There is no end after a kill, and the last line may be torn.
`training/phases.py` writes the file, on the leader of a run only; `training/goodput.py` adds it up.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
import threading
import time
from typing import Any

from maskformer.training.workdir import reason

logger = logging.getLogger(__name__)

EVENTS = "events.jsonl"
PHASES = ("init", "compile", "data", "steps", "checkpoint", "evaluation")


class Events:
    """Appends to the `events.jsonl` of a workdir; what is written is flushed, from whatever thread.

    A file that cannot be written is no reason to stop a run: it is said once, and the run goes on without events.

    Args:
      workdir: an existing folder.
      attempt: the name of this start of the run; goes into every line.
    """

    def __init__(self, workdir: pathlib.Path, attempt: str):
        self._path, self._attempt = workdir / EVENTS, attempt
        self._lock = threading.Lock()
        self._broken = False

    def write(self, event: str, **fields: Any) -> None:
        """One line, with the time of now where `fields` has none."""
        line = {"event": event, "time": round(time.time(), 6), "attempt": self._attempt, **fields}
        with self._lock:
            if self._broken:
                return
            try:
                _append(self._path, json.dumps(line))
            except OSError as error:
                self._broken = True
                logger.warning("%s: cannot be written (%s); the run goes on without", self._path, reason(error))


def read_events(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of a run in the order of their lines; none where there is no file.

    What is no event (a line that a kill cut off, or damage) is left out.

    Raises:
      ValueError: the file cannot be read at all.
    """
    path = pathlib.Path(workdir) / EVENTS
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({reason(error)}); expected the events of a run") from error
    return [line for text in data.split(b"\n") if (line := _event(text)) is not None]


def _append(path: pathlib.Path, text: str) -> None:
    with path.open("ab+") as file:
        # A kill may have cut off the last line of the start before: what follows begins on a line of its own.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else f"\n{text}"
        file.write(f"{text}\n".encode())


def _event(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    known = isinstance(line, dict) and isinstance(line.get("event"), str) and isinstance(line.get("attempt"), str)
    moment = line.get("time") if known else None
    return line if type(moment) in (int, float) and math.isfinite(moment) else None
