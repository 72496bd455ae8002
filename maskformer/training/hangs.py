"""A run that gets nowhere is ended: all stacks are written, one line says where it hangs, and the exit code is 70.

A thread looks at `Phases.beats`, which grows at every step and at every change of phase. When it has stood still for
longer than the phase may (`WatchdogConfig`), the process writes the stacks of its Python threads to stderr and to
`hung-<process>.txt` in the workdir, says which phase hangs after which step and which processes have not got there, and
ends with `EX_HUNG`. Launchers start it again, and it goes on from its newest checkpoint.

What is guaranteed:

- Steps are issued ahead of the devices. A device that hangs stops the host where it next waits for it, at the latest
  after two windows of `train.log_every` steps, since no window is begun before the last but one has arrived. The limit
  counts from there.
- A process that stood still as a whole, such as a laptop that slept or a job that was suspended, has not hung: a look
  that comes late counts as one look.
- While the main thread is in C++ the thread runs all the same. Where C++ holds Python's lock as well, no thread of
  Python runs: a timer of `faulthandler`'s, which needs no lock, then ends the process a minute later than the limit of
  the phase that the thread saw last. It writes the stacks to stderr only and exits with 1, which launchers count and
  start again too. (It cannot tell a process that was stopped for longer than that.)
- The end needs nobody: a stderr that nobody reads, a file system or a coordination service that does not answer delay
  it by `LAST_WORDS` seconds at most.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import tempfile
import threading
import time
from types import TracebackType

from maskformer.paths import AnyPath
from maskformer.training.hosts import Hosts
from maskformer.training.phases import Phases
from maskformer.training.sections import WatchdogConfig

EX_HUNG = 70

LOOK_EVERY = 1.0
# How long the last words may take, and how long the leader gives the others, whom its end takes down, for theirs.
LAST_WORDS = 30.0
LEADER_WAITS = 5.0
ASK_SECONDS = 5.0
# How much later than the limit the timer comes that needs no lock.
GRACE = 60.0


class Watchdog:
    """Ends the process when a phase gets nowhere for longer than it may, for as long as it is entered.

    Args:
      phases: of this process.
      limits: seconds for each kind of phase.
      workdir: folder of the run, for the stacks.
    """

    def __init__(self, phases: Phases, limits: WatchdogConfig, workdir: AnyPath):
        self._phases, self._workdir = phases, workdir
        self._limits = {
            "compile": limits.first_step,
            "steps": limits.step,
            "evaluation": limits.evaluation,
            "checkpoint": limits.checkpoint,
            "restore": limits.checkpoint,
        }
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._hosts: Hosts | None = None
        self._index = self._count = 0

    def __enter__(self) -> Watchdog:
        import jax
        from jax._src import distributed  # the coordination service has no public name

        self._index, self._count = jax.process_index(), jax.process_count()
        if self._count > 1:
            self._hosts = Hosts(self._phases, self._index, self._count, distributed.global_state.client)
        if any(self._limits.values()):
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        if self._hosts is not None:
            self._hosts.close()

    def _watch(self) -> None:
        beats, still, looked = -1, 0.0, time.monotonic()
        every = min(LOOK_EVERY, *(limit / 4 for limit in self._limits.values() if limit))
        while not self._done.wait(every):
            now = time.monotonic()
            name, limit = self._phases.name, self._limits.get(self._phases.name, 0.0)
            # Not `now` less the last beat: a process that was stopped as a whole did not hang meanwhile.
            still = still + min(now - looked, 2 * every) if self._phases.beats == beats else 0.0
            looked, beats = now, self._phases.beats
            if limit and still > limit:
                self._end(name, still)
            if limit:
                faulthandler.dump_traceback_later(limit - still + GRACE, exit=True, file=2)
            else:
                faulthandler.cancel_dump_traceback_later()
        faulthandler.cancel_dump_traceback_later()

    def _end(self, name: str, seconds: float) -> None:
        last = threading.Timer(LAST_WORDS, os._exit, (EX_HUNG,))
        last.daemon = True
        last.start()
        phases = self._phases
        waits = f", waiting for {phases.waits_for}" if phases.waits_for else ""
        place = f"process {self._index} on {socket.gethostname()}"
        line = f"hung: no progress for {seconds:.0f} s in {name} after step {phases.step}{waits} ({place})"
        if self._hosts is not None:
            line += f"; {self._hosts.behind(ASK_SECONDS)}"
        stacks = _stacks()
        with contextlib.suppress(OSError):
            os.write(2, f"\n{line}\n{stacks}".encode())
        with contextlib.suppress(Exception):
            phases.end(EX_HUNG, line)
        with contextlib.suppress(Exception):
            (self._workdir / f"hung-{self._index}.txt").write_text(f"{line}\n{stacks}")
        if self._index == 0 and self._count > 1:
            time.sleep(LEADER_WAITS)
        sys.stdout.flush()
        os._exit(EX_HUNG)


def _stacks() -> str:
    """What each thread of Python's is doing."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
