"""Stopping in good order: SIGTERM asks for a checkpoint at the next step boundary.

Slurm, Kubernetes and TPU VMs all send SIGTERM ahead of the kill. `EX_TEMPFAIL` as the exit code tells a launcher
that the job is worth requeueing.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax

EX_TEMPFAIL = 75


class Preempted(Exception):
    """The run was told to stop and has saved its state at `step`."""

    def __init__(self, step: int):
        super().__init__(f"stopped by SIGTERM at step {step}; the checkpoint is saved, run the same command to resume")
        self.step = step


class PreemptionGuard:
    """While entered, `requested(step)` tells whether to stop, with one answer on all processes.

    With several processes the answer comes from JAX's preemption service: signals reach the processes at different
    steps, and a checkpoint needs all of them at the same one.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._previous: Any = None
        self._shared = jax.process_count() > 1

    def __enter__(self) -> PreemptionGuard:
        # JAX's own service has its own handler, which ours would displace; and only the main thread may set one.
        if not self._shared and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def requested(self, step: int) -> bool:
        if self._shared:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._signalled

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
