"""Stopping in good order: SIGTERM and SIGINT ask for a checkpoint at the next step boundary.

Slurm, Kubernetes and TPU VMs all send SIGTERM ahead of the kill. `EX_TEMPFAIL` as the exit code tells a launcher that
the job is worth requeueing; after a SIGINT (Ctrl-C) somebody wants it stopped, and the exit code is `EX_INTERRUPTED`.

Only the standard library is imported here: the guard of a process is to be installed before JAX is, which takes
seconds in which a signal may come too.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

EX_TEMPFAIL = 75
EX_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

_INTERRUPTED_KEYS = "maskformer/interrupted/"
_barriers = itertools.count()
# The places of a run at which the processes may agree to stop; JAX's service knows them by number.
_moments = itertools.count(1)
# How long the slowest process may compile after the fastest. One that died ends the wait by itself.
_SLOWEST_START_MS = 3_600_000
# How long the first process that fails waits for the others to fail too.
_FAIL_TOGETHER_MS = 2_000


class Preempted(Exception):
    """The run was told to stop and has saved its state at `step`; the process should end with `exit_code`."""

    def __init__(self, step: int, exit_code: int = EX_TEMPFAIL):
        name = "SIGINT" if exit_code == EX_INTERRUPTED else "SIGTERM"
        super().__init__(f"stopped by {name} at step {step}; the checkpoint is saved, run the same command to resume")
        self.step = step
        self.exit_code = exit_code


class PreemptionGuard:
    """While entered, `requested()` tells whether to stop, with one answer on all processes.

    A signal only leaves a note, since an exception raised by a handler is lost where C++ calls Python. A second SIGINT
    is passed on to the handler from before, which in Python raises KeyboardInterrupt.

    With several processes the answer comes from JAX's preemption service: signals reach the processes at different
    moments, and a checkpoint needs all of them at the same one. They agree on one of the next calls of `requested`,
    so all have to make the same calls: after each step, after each batch of an evaluation. A SIGINT to any of them
    goes the same way.

    Args:
      ends_process: the process is this run and nothing else, as in `maskformer train`. Enter the guard before all
        else. Until the first `requested` there is nothing to save: a signal then ends the process at once, even
        during a long call into C++, with one line and the exit code. So does a second SIGINT at any time. Leaving the
        guard means that the process is about to end with its own exit code: SIGTERM no longer changes it.

    A guard entered while another one is returns that one: signals belong to the process.
    """

    def __init__(self, ends_process: bool = False) -> None:
        self._ends_process = ends_process
        self._began = False
        self._shared = False
        self._requested = False
        self._stopping = False
        self._interrupted = False
        self._told_others = False
        self._previous: dict[int, Any] = {}
        # Signals by (who heard them, number), and how many of each number were acted on.
        self._heard: collections.Counter[tuple[str, int]] = collections.Counter()
        self._acted: collections.Counter[int] = collections.Counter()
        self._leaving = threading.Lock()

    @property
    def exit_code(self) -> int:
        """What the process should end with once it has stopped because of a signal."""
        return EX_INTERRUPTED if self._interrupted else EX_TEMPFAIL

    def __enter__(self) -> PreemptionGuard:
        global _active
        if _active is not None:
            return _active
        # Only the main thread may set a handler.
        if threading.current_thread() is threading.main_thread():
            _active = self
            if self._ends_process:
                self._watch()
            # JAX's service has a handler of its own, which ours would displace.
            for number in (signal.SIGINT,) if _service_runs() else (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _active
        if _active is not self:
            return
        _active = None
        if self._ends_process:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            return
        for number, handler in self._previous.items():
            if handler is not None and not (self._shared and number == signal.SIGTERM):
                signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether to save and stop now; call it alike on every process. Once it is true it stays so."""
        if not self._began:
            self._begin()
        if not self._shared:
            return self._requested
        if not self._stopping:
            from jax.experimental import multihost_utils

            self._stopping = multihost_utils.reached_preemption_sync_point(next(_moments))
            if self._stopping and _client().key_value_dir_get(_INTERRUPTED_KEYS):
                self._interrupted = True
        return self._stopping

    def _begin(self) -> None:
        """From now on there is a step to save."""
        import jax

        if jax.process_count() > 1:
            # Together: a process that has begun waits in a step for the others, and they must not leave it there.
            _client().wait_at_barrier(f"maskformer/begin/{next(_barriers)}", _SLOWEST_START_MS)
            _start_service()
            self._shared = True
        self._began = True
        if self._shared and self._requested:
            self._tell_others()

    def _watch(self) -> None:
        """Hear of signals in a thread: the main one hears of them only when it is back in Python."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def watch() -> None:
            while numbers := os.read(reader, 1):
                if numbers[0] in (signal.SIGTERM, signal.SIGINT):
                    self._hear("thread", numbers[0])

        threading.Thread(target=watch, name="signals", daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        times = self._hear("handler", number)
        previous = self._previous[number]
        if number == signal.SIGINT and times > 1 and not self._ends_process and callable(previous):
            previous(number, frame)

    def _hear(self, who: str, number: int) -> int:
        """Act once on a signal that the thread, the handler or (an event loop may divert the one) both hear of."""
        self._heard[who, number] += 1
        times = self._heard[who, number]
        if times > self._acted[number]:
            self._acted[number] = times
            self._act(number, times)
        return times

    def _act(self, number: int, times: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupted = True
        if self._ends_process and not self._began:
            self._leave(f"stopped by {name} before the first step; run the same command to start again")
        elif self._ends_process and number == signal.SIGINT and times > 1:
            self._leave("stopped by a second SIGINT, without saving; run the same command to resume")
        self._requested = True
        if self._ends_process and number == signal.SIGINT and os.isatty(2):
            _say("stopping at the next step boundary; Ctrl-C again to leave at once, without saving")
        if self._shared:
            self._tell_others()

    def _tell_others(self) -> None:
        if self._interrupted:
            try:
                _client().key_value_set(_INTERRUPTED_KEYS + "SIGINT", "", allow_overwrite=True)
            except Exception:
                pass  # They stop all the same, and only their exit code says SIGTERM.
        if not self._told_others:
            self._told_others = True
            os.kill(os.getpid(), signal.SIGTERM)  # to the handler of JAX's service

    def _leave(self, line: str) -> None:
        if self._leaving.acquire(blocking=False):
            show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # the progress bar hides it
            _say(show_cursor + line)
            os._exit(self.exit_code)


def end_failed(code: int) -> None:
    """End this process with `code` at once where others of its run may wait for it; return where it has none.

    Python's own end would wait in JAX's shutdown for the others, and they wait in a step for this one: no launcher
    would see the exit code and stop them. Those that fail together meet here first, and end in the usual way.
    """
    if "jax._src.distributed" not in sys.modules or _client() is None:
        return
    try:
        _client().wait_at_barrier("maskformer/failed", _FAIL_TOGETHER_MS)
    except Exception:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(code)


_active: PreemptionGuard | None = None


# A forked child has signals of its own, which must not reach the parent through the shared pipe. They wait while it
# gets back the handlers from before the guard.
_mask = threading.local()


def _before_fork() -> None:
    _mask.value = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.value)


def _after_fork_in_child() -> None:
    global _active
    if _active is not None:
        if _active._ends_process:
            signal.set_wakeup_fd(-1)
        for number, handler in _active._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _active = None
    _after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _say(line: str) -> None:
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:
        pass


def _service_runs() -> bool:
    distributed = sys.modules.get("jax._src.distributed")
    return distributed is not None and distributed.global_state.preemption_sync_manager is not None


def _start_service() -> None:
    """JAX's preemption service, which `distributed.initialize` has put off: from here on it has SIGTERM."""
    if not _service_runs():
        import jax
        from jax._src import distributed

        jax.config.update("jax_enable_preemption_service", True)
        distributed.global_state.initialize_preemption_sync_manager()


def _client() -> Any:
    """The coordination service: the public API has barriers of devices, but neither keys nor waits without them."""
    from jax._src import distributed

    return distributed.global_state.client
