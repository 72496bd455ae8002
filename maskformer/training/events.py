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

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from maskformer import paths
from maskformer.paths import AnyPath
from maskformer.training import lines
from maskformer.training.workdir import reason

logger = logging.getLogger(__name__)

EVENTS = "events.jsonl"
PHASES = ("init", "compile", "data", "steps", "checkpoint", "evaluation")


class Events:
    """Appends to the `events.jsonl` of a workdir, from whatever thread.

    A line is on a file system when it is written; on a store that of a start or an end is, and another within
    `lines.STORE_SECONDS`. A file that cannot be written is no reason to stop a run: it is said once, and the lines are
    written when it can be again.

    Args:
      workdir: an existing folder, which no other training has.
      attempt: the name of this start of the run; goes into every line.
    """

    def __init__(self, workdir: AnyPath, attempt: str):
        self._path, self._attempt = workdir / EVENTS, attempt
        self._lock = threading.Lock()
        self._file: lines.LineFile | None = None
        self._said = self._closed = False

    def write(self, event: str, **fields: Any) -> None:
        """One line, with the time of now where `fields` has none."""
        with self._lock:
            if self._closed:
                return
            try:
                if self._file is None:
                    self._file = _open(self._path)
                self._file.write({"event": event, "time": round(time.time(), 6), "attempt": self._attempt, **fields})
                if event != "phase":
                    self._file.flush()
            except OSError as error:
                # What was given to the file waits there, and the next line takes it along.
                if not self._said:
                    logger.warning("%s: cannot be written (%s); the run goes on without", self._path, reason(error))
                self._said = True

    def close(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._closed = True
            if self._file is not None:
                self._file.close()


def read_events(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events of a run in the order of their lines; none where there is no file.

    What is no event (a line that a kill cut off, or damage) is left out.

    Raises:
      ValueError: the file cannot be read at all.
    """
    path = paths.resolve(workdir) / EVENTS
    try:
        return lines.read_lines(path, _is_event) if lines.exists(path) else []
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({reason(error)}); expected the events of a run") from error


def _open(path: AnyPath) -> lines.LineFile:
    # A kill may have cut off the last line of the start before: what follows is to begin on a line of its own.
    if lines.exists(path) and not lines.read_bytes(path).endswith(b"\n"):
        lines.rewrite(path, lines.read_lines(path, _is_event))
    return lines.LineFile(path)


def _is_event(line: Mapping[str, Any]) -> bool:
    moment = line.get("time")
    named = isinstance(line.get("event"), str) and isinstance(line.get("attempt"), str)
    return named and isinstance(moment, int | float) and type(moment) is not bool and math.isfinite(moment)
