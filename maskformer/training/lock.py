"""One training at a time in a workdir, on file systems that several hosts share."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from maskformer.training.workdir import RunError, reason

logger = logging.getLogger(__name__)

LOCK = "lock.json"
# Seconds between signs of life, and without one after which a holder elsewhere counts as dead. A minute is how long
# network file systems show a file as it was.
HEARTBEAT = 10.0
STALE_AFTER = 90.0


class LockError(ValueError):
    """The workdir belongs to another training."""


class LockLostError(RunError):
    """Another training took the workdir over, with --steal or because this one had shown no life."""


class Lock:
    """Holds `lock.json` in a workdir for as long as the `with` block runs; on the leader of a run only.

    The file names host, process and start, and its modification time is the last sign of life. What a killed process
    left behind is recognised: at once on the same machine, where the process is gone, and on another one (or another
    boot: two machines may have one name) once no sign of life has come for `STALE_AFTER` seconds. They are waited for,
    so that a run requeued elsewhere needs no help.

    Args:
      workdir: an existing folder.
      steal: take the workdir over from whoever has it. A run that is still alive learns of it by `check`.

    Raises:
      LockError: another training has the workdir; one line that names it.
    """

    def __init__(self, workdir: pathlib.Path, steal: bool = False):
        self.path = workdir / LOCK
        self._steal = steal
        self._mine: dict[str, Any] = {}
        self._lost: str | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lock:
        self._mine = {**_machine(), "started": time.time(), "token": uuid.uuid4().hex}
        try:
            self._acquire()
        except OSError as error:
            raise LockError(
                f"{self.path}: cannot be written ({reason(error)}); free some space, or choose another --workdir"
            ) from error
        self._thread = threading.Thread(target=self._beat, name="workdir_lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        try:
            held = _read(self.path)
            if held is not None and held[0].get("token") == self._mine["token"]:
                self.path.unlink(missing_ok=True)
        except OSError as failed:
            # The run has ended, well or with an error of its own; the next one finds that nobody is alive.
            logger.warning("%s: cannot be removed (%s)", self.path, reason(failed))

    def check(self) -> None:
        """Raise when another training has taken the workdir over; reads no file.

        Raises:
          LockLostError: names who has it now.
        """
        if self._lost is not None:
            raise LockLostError(
                f"workdir {self.path.parent}: was taken over by {self._lost}; this run has stopped, and may have saved "
                f"in the {HEARTBEAT:.0f} s before it knew"
            )

    def _acquire(self) -> None:
        # A holder may go away between the attempt to create and the look at who has it.
        for _ in range(10):
            if self._create():
                return
            try:
                held = _read(self.path)
            except OSError as error:
                raise LockError(f"{self.path}: cannot be read ({reason(error)}); move it away") from error
            if held is None:
                continue
            holder, _ = held
            if not self._steal and not self._dead(holder):
                raise LockError(self._refusal(holder))
            if self._take_over(holder):
                return
        raise LockError(f"workdir {self.path.parent}: several trainings are starting in it; start one")

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(self._mine, file)
        except OSError:
            self.path.unlink(missing_ok=True)  # an empty lock would be one of an unknown process
            raise
        return True

    def _take_over(self, holder: Mapping[str, Any]) -> bool:
        """Put our lock in the place of `holder`'s; False when it is no longer there."""
        # Of two that find the same dead holder, one at a time may look again and replace it.
        guard = self.path.with_name(f"{LOCK}.takeover")
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            time.sleep(0.2)
            if time.time() - _modified(guard) > STALE_AFTER:
                guard.unlink(missing_ok=True)  # its maker was killed
            return False
        try:
            held = _read(self.path)
            if held is None or held[0] != holder:
                return False
            logger.warning(
                "workdir %s: taken over from %s", self.path.parent, _named(holder, time.time() - _modified(self.path))
            )
            partial = self.path.with_name(f"{LOCK}.{self._mine['token']}")
            try:
                partial.write_text(json.dumps(self._mine), encoding="utf-8")
                partial.replace(self.path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            return True
        finally:
            guard.unlink(missing_ok=True)

    def _dead(self, holder: Mapping[str, Any]) -> bool:
        """Whether the holder is gone for certain, or has shown no life for so long that it counts as gone."""
        # Of another boot is this machine before, or another one by the same name, as two that are named localhost.
        if all(holder.get(name) == self._mine[name] for name in ("host", "boot", "namespace")):
            return not _alive(holder)
        # Clocks of two hosts may differ; that the file changes within a time of ours says enough.
        seen = _modified(self.path)
        deadline = time.monotonic() + STALE_AFTER
        logger.warning(
            "workdir %s: waiting up to %.0f s for a sign of life of %s",
            self.path.parent, STALE_AFTER, _named(holder, time.time() - seen),
        )
        while time.monotonic() < deadline:
            time.sleep(min(1.0, HEARTBEAT / 4))
            held = _read(self.path)
            if held is None or held[0] != holder:
                return True  # gone, or another's: the takeover looks again
            if held[1] != seen:
                return False
        return True

    def _refusal(self, holder: Mapping[str, Any]) -> str:
        named = _named(holder, time.time() - _modified(self.path))
        return (
            f"workdir {self.path.parent}: {named} is training in it; wait for it or stop it, or take the workdir over "
            "with --steal"
        )

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT):
            try:
                held = _read(self.path)
                if held is not None and held[0].get("token") not in (None, self._mine["token"]):
                    self._lost = _named(held[0], 0.0)
                    return
                if held is None and not self._create():
                    continue  # somebody was faster; the next look says who
                os.utime(self.path)
            except OSError as error:
                # A file system that does not answer for a moment is no reason to stop a run.
                logger.debug("%s: no sign of life given: %s", self.path, error)


def holder(workdir: pathlib.Path) -> tuple[Mapping[str, Any], float] | None:
    """Who trains in a workdir (`host`, `pid`, `started`, ...) and the seconds since its last sign of life; or None.

    Raises:
      OSError: the lock cannot be read.
    """
    held = _read(workdir / LOCK)
    return None if held is None else (held[0], time.time() - held[1])


def alive(holder: Mapping[str, Any], silent: float) -> bool:
    """Whether who holds a lock still trains: on this machine that is known, on others it is by the last sign of life.

    Args:
      holder, silent: what `holder` returned.
    """
    here = _machine()
    if all(holder.get(name) == here[name] for name in ("host", "boot", "namespace")):
        return _alive(holder)
    return silent < STALE_AFTER


def _machine() -> dict[str, Any]:
    """What tells a process from every other: a pid means something within one boot and one namespace only."""
    pid = os.getpid()
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        boot = namespace = ""
    return {"host": socket.gethostname(), "pid": pid, "born": _born(pid), "boot": boot, "namespace": namespace}


def _born(pid: int) -> str:
    """When a process started, in ticks since boot; empty where that is not known."""
    return _status(pid, 19)


def _status(pid: int, field: int) -> str:
    """A field of what Linux tells of a process after its name, from the state on; empty where it tells nothing."""
    try:
        # The name in brackets may hold anything, brackets too, in any encoding.
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return stat.rpartition(")")[2].split()[field]
    except (OSError, IndexError):
        return ""


def _alive(holder: Mapping[str, Any]) -> bool:
    pid = holder.get("pid")
    if type(pid) is not int or not 0 < pid < 1 << 31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # One that has ended keeps its number until its parent asks for it.
    if _status(pid, 0) in ("Z", "X"):
        return False
    # Another process may have been given the number since.
    return _born(pid) == holder.get("born")


def _read(path: pathlib.Path) -> tuple[dict[str, Any], float] | None:
    """Who holds the lock, and its last sign of life; None when nobody does.

    A lock that cannot be read names nobody: it may be in the making, or damaged.
    """
    try:
        # Opened, since network file systems show the attributes of a file that is not as they were.
        with path.open("rb") as file:
            modified = os.fstat(file.fileno()).st_mtime
            holder = json.loads(file.read())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        holder = {}
    return (holder if isinstance(holder, dict) else {}), modified


def _modified(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _named(holder: Mapping[str, Any], silent: float) -> str:
    started = holder.get("started")
    since = f", started {_age(time.time() - started)} ago" if isinstance(started, int | float) else ""
    return (
        f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
        f" (last sign of life {_age(silent)} ago{since})"
    )


def _age(seconds: float) -> str:
    seconds = max(seconds, 0.0)
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
