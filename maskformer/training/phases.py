"""Which phase a run is in: one object says it to `events.jsonl`, to the watchdog, and to the line at the start.

    phases = Phases()
    with phases, phases("data"):              # at every moment a run is in one phase
        ...
    for step in phases.steps(first, last):    # "compile" until the first step is done, "steps" from then on
        batch = phases.batch(batches, state.step)
        with phases("evaluation", step):      # within another phase, whose time stands still meanwhile
            ...

It costs the step path two readings of the clock, and waits for nothing. Only the standard library is imported at first:
the time in which JAX is imported counts too.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from maskformer.checks import first_line, one_line
from maskformer.training import compilation

# A line of steps is written when another phase begins, and at the latest after so many seconds: what a kill costs.
WRITE_EVERY = 10.0
# Parts of the beginning that have a name of their own in the line at the start.
INIT_PARTS = ("imports", "devices", "restore")
# What is shorter, and holds no step, counts as a part of what follows.
_SHORT = 1_000

_EX_INTERRUPTED, _EX_USAGE = 130, 2


class Phases:
    """The phases of one start of a run; enter it for as long as the run goes on, and its end is recorded.

    Times are whole microseconds of a clock that is never set back, so that they add up exactly.

    Args:
      began: when this start began, in seconds since the epoch, such as `process_began()`; None for now.

    Attributes:
      attempt: a name for this start.
      name: the phase of now.
      step: the last step that is done.
      waits_for: what the run waits for at this moment within the phase; empty when for nothing.
      beats: grows whenever the run has got on; what `hangs.Watchdog` looks at.
      window: times of the last window of steps, see `window_times`.
    """

    def __init__(self, began: float | None = None):
        self.attempt = uuid.uuid4().hex[:12]
        self.name, self.step, self.beats, self.waits_for = "init", 0, 0, ""
        self.window: dict[str, float] = {}
        now = time.time()
        # Seconds since the epoch of a clock that nobody sets.
        self._epoch = now - time.monotonic()
        self._began = self._since = _microseconds(now if began is None else min(began, now))
        self._first = 1
        self._idle = 0
        self._trained = self._data_wait = self._device_wait = 0
        self._window_from: tuple[int, int] | None = None
        self._counted = self._counted_before = compilation.counts()
        self._parts: dict[str, int] = {}
        self._started = False
        self._ended = False
        # Lines wait here until it is known where they are written, or that they are not.
        self._lines: list[dict[str, Any]] | None = []
        self._events: Any = None
        self._devices: Mapping[str, Any] = {}
        self._notes: list[str] = []
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def __call__(self, name: str, step: int | None = None) -> Iterator[None]:
        """Be in phase `name` (one of `events.PHASES` or `INIT_PARTS`), and then again in the one before.

        Args:
          name: of the phase.
          step: the step that is done by now, where the loop has not come to its end.
        """
        before = self.name
        if step is not None:
            self.step = step
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def steps(self, first: int, last: int) -> Iterator[int]:
        """The steps `first` to `last`, each done when the next one is asked for; what comes after is their saving."""
        self.step, self._first = first - 1, first
        self._open()
        self._enter("compile")
        try:
            for step in range(first, last + 1):
                yield step
                self.step = step
                self.beats += 1
                if self.name == "compile":
                    self._enter("steps")
                elif self._now() - self._since >= _microseconds(WRITE_EVERY):
                    self._write()
        finally:
            self._enter("checkpoint")

    def batch(self, batches: Iterator[Any], ahead: Any) -> Any:
        """The next batch, and note how long it was waited for.

        Args:
          batches: where it comes from.
          ahead: an array that the last step makes. While it is not ready the devices have work, and waiting is free.
        """
        self.waits_for = "a batch"
        began = self._now()
        batch = next(batches)
        waited = self._now() - began
        self.waits_for = ""
        self._data_wait += waited
        if ahead.is_ready():
            self._idle += waited
        return batch

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait here for the devices."""
        self.waits_for, began = "the devices", self._now()
        try:
            yield
        finally:
            self._device_wait += self._now() - began
            self.waits_for = ""

    def window_times(self, step: int) -> dict[str, float]:
        """What the host waited for since the last call, in seconds; empty for a window with the compilation.

        Call it when `step` is the last step of a window. Keeps the times of a step of this host in `window`.
        """
        trained = self._trained + (self._now() - self._since if self.name in ("compile", "steps") else 0)
        times = {"data_wait_seconds": self._data_wait / 1e6, "device_wait_seconds": self._device_wait / 1e6}
        before, self._window_from = self._window_from, (step, trained)
        self._data_wait = self._device_wait = 0
        if before is None or step <= before[0]:
            return {}
        count, seconds = step - before[0], (trained - before[1]) / 1e6
        self.window = {
            "step": step,
            "seconds": seconds / count,
            "data": times["data_wait_seconds"] / count,
            # All that the host did itself: what others make it wait for, it waits for on its devices.
            "host": max(seconds - times["device_wait_seconds"], 0.0) / count,
        }
        return times

    def record(self, workdir: Any, devices: Mapping[str, Any]) -> None:
        """Keep `events.jsonl` in `workdir`, from the beginning of this start on; None for a process that keeps none.

        Args:
          workdir: folder of the run, which is this process's alone by now.
          devices: fields that tell of them, for the line of the start.
        """
        if workdir is None:
            self._lines = None
        else:
            from maskformer.training.events import Events

            self._events, self._devices = Events(workdir, self.attempt), devices

    def end(self, code: int, reason: str) -> None:
        """The last line: with what exit code this start ends, and why."""
        with self._lock:
            if self._ended:
                return
            self._open()
            self._write(last=True)
            self._ended = True
            if self._events is not None:
                moment = self._since / 1e6
                self._events.write("end", time=moment, code=code, reason=one_line(reason), step=self.step)
                self._events.close()

    def note(self, text: str) -> None:
        """A line for the user, from whatever thread; the next one who asks for `notes` says it."""
        self._notes.append(text)

    def notes(self) -> list[str]:
        """The lines for the user that nobody has said yet."""
        said, self._notes = self._notes, []
        return said

    def __enter__(self) -> Phases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(*((0, "done") if error is None else (_exit_code(error), first_line(error))))

    def _open(self) -> None:
        """Write the line of the start, with the step that it goes on from, and what came before that was known."""
        lines, self._lines = self._lines, None
        if self._events is not None and lines is not None:
            where = {"host": socket.gethostname(), "pid": os.getpid()}
            self._events.write("start", time=self._began / 1e6, **where, **self._devices, step=self.step)
            for line in lines:
                self._events.write("phase", **line)

    def _now(self) -> int:
        return _microseconds(self._epoch + time.monotonic())

    def _enter(self, name: str) -> None:
        with self._lock:
            if name != self.name:
                self._write()
                if self.name == "compile":
                    self._say_started()
            self.name = name
            self.beats += 1

    def _write(self, last: bool = False) -> None:
        """The time since the last line belongs to the phase of now."""
        with self._lock:
            now = self._now()
            seconds, first, step = now - self._since, self._first, self.step
            if self._ended or (seconds < _SHORT and step < first and not last):
                return
            start, self._since, self._first = self._since, now, step + 1
            if self.name in ("compile", "steps"):
                self._trained += seconds
                idle, self._idle = min(self._idle, seconds), 0
                if idle:
                    self._line("data", start, idle, {})
                    start, seconds = start + idle, seconds - idle
            part = {"part": self.name} if self.name in INIT_PARTS else {}
            steps = {"first": first, "last": step} if step >= first and self.name in ("compile", "steps") else {}
            self._line("init" if part else self.name, start, seconds, part | steps | self._cache())

    def _line(self, name: str, start: int, seconds: int, more: dict[str, Any]) -> None:
        part = more.get("part", name)
        self._parts[part] = self._parts.get(part, 0) + seconds
        line = {"time": start / 1e6, "name": name, "seconds": seconds / 1e6, **more}
        if self._lines is not None:
            self._lines.append(line)
        elif self._events is not None:
            self._events.write("phase", **line)

    def _cache(self) -> dict[str, int]:
        """What was read from the compilation cache, and what was not there, since the last line."""
        before, self._counted = self._counted, compilation.counts()
        new = {name: now - then for name, now, then in zip(("cache_hits", "cache_misses"), self._counted, before)}
        return {name: count for name, count in new.items() if count}

    def _say_started(self) -> None:
        if self._started:
            return
        self._started = True
        known = [(name, self._parts.get(name, 0)) for name in ("imports", "data", "devices", "restore", "compile")]
        total = self._since - self._began
        other = total - sum(seconds for _, seconds in known)
        parts = [f"{name} {seconds / 1e6:.1f}" for name, seconds in [*known, ("other", other)] if seconds >= 50_000]
        hits, misses = (now - then for now, then in zip(self._counted, self._counted_before))
        cache = f"cache: {_counted(hits, 'hit')}, {_counted(misses, 'miss')}" if compilation.in_use() else "no cache"
        self.note(f"started in {total / 1e6:.1f} s: {', '.join(parts)} ({cache})")


def process_began() -> float:
    """When this process was started, in seconds since the epoch; now, where the system does not say."""
    now = time.time()
    try:
        status = pathlib.Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        # In ticks since the boot, as is this clock but for the unit.
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(status[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return now
    return now - age if age > 0 else now


def _exit_code(error: BaseException) -> int:
    """What `maskformer train` ends with after `error`."""
    from maskformer.training.checkpoints import CheckpointError

    if isinstance(error, KeyboardInterrupt):
        return _EX_INTERRUPTED
    stopped = getattr(error, "exit_code", None)
    return stopped if isinstance(stopped, int) else _EX_USAGE if isinstance(error, ValueError | CheckpointError) else 1


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
