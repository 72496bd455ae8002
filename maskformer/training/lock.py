"""One training at a time in a workdir, on file systems that several hosts share."""

from __future__ import annotations

import dataclasses
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

from maskformer import paths
from maskformer.paths import AnyPath, StorePath
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

    The file names host, process and start, and its modification time is the last sign of life; in an object store it is
    written anew for that, with the time in it. What a killed process left behind is recognised: at once on the same
    machine, where the process is gone, and on another one (or another boot: two machines may have one name) once no
    sign of life has come for `STALE_AFTER` seconds. They are waited for, so that a run requeued elsewhere needs no
    help.

    On a file system, and in Google's store, of several that begin at one moment exactly one gets the workdir (files are
    made exclusively, objects under a generation precondition). In other stores two that take over from the same dead
    holder within a second may both believe so, until the first sign of life of the one tells the other.

    Args:
      workdir: an existing folder.
      steal: take the workdir over from whoever has it. A run that is still alive learns of it by `check`.

    Raises:
      LockError: another training has the workdir; one line that names it.
    """

    def __init__(self, workdir: AnyPath, steal: bool = False):
        self.path = workdir / LOCK
        self._place: _File | _Object = _Object(self.path) if isinstance(self.path, StorePath) else _File(self.path)
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
            held = self._place.read()
            if held is not None and held.holder.get("token") == self._mine["token"]:
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
            if self._place.create(self._mine):
                return
            try:
                held = self._place.read()
            except OSError as error:
                raise LockError(f"{self.path}: cannot be read ({reason(error)}); move it away") from error
            if held is None:
                continue
            if not self._steal and not self._dead(held):
                raise LockError(
                    f"workdir {self.path.parent}: {held} is training in it; wait for it or stop it, or take the "
                    "workdir over with --steal"
                )
            if self._place.replace(held.holder, self._mine):
                return
        raise LockError(f"workdir {self.path.parent}: several trainings are starting in it; start one")

    def _dead(self, held: _Held) -> bool:
        """Whether the holder is gone for certain, or has shown no life for so long that it counts as gone."""
        # Of another boot is this machine before, or another one by the same name, as two that are named localhost.
        if all(held.holder.get(name) == self._mine[name] for name in ("host", "boot", "namespace")):
            return not _alive(held.holder)
        # Clocks of two hosts may differ; that the file changes within a time of ours says enough.
        deadline = time.monotonic() + STALE_AFTER
        logger.warning("workdir %s: waiting up to %.0f s for a sign of life of %s", self.path.parent, STALE_AFTER, held)
        while time.monotonic() < deadline:
            time.sleep(min(1.0, HEARTBEAT / 4))
            now = self._place.read()
            if now is None or now.holder.get("token") != held.holder.get("token"):
                return True  # gone, or another's: the takeover looks again
            if now.version != held.version:
                return False
        return True

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT):
            try:
                held = self._place.read()
                if held is not None and held.holder.get("token") not in (None, self._mine["token"]):
                    self._lost = held.name(silent=0.0)
                    return
                if held is None and not self._place.create(self._mine):
                    continue  # somebody was faster; the next look says who
                self._place.show_life(self._mine)
            except OSError as error:
                # A file system that does not answer for a moment is no reason to stop a run.
                logger.debug("%s: no sign of life given: %s", self.path, error)


@dataclasses.dataclass(frozen=True)
class _Held:
    """A lock as it was found.

    Attributes:
      holder: what it says; empty where it cannot be read, as in the making, or damaged.
      version: another one after each sign of life.
      silent: seconds since the last one, by the clock of this host.
    """

    holder: Mapping[str, Any]
    version: float | str
    silent: float

    def name(self, silent: float | None = None) -> str:
        started = self.holder.get("started")
        since = f", started {age(time.time() - started)} ago" if isinstance(started, int | float) else ""
        return (
            f"process {self.holder.get('pid', 'unknown')} on {self.holder.get('host', 'an unknown host')}"
            f" (last sign of life {age(self.silent if silent is None else silent)} ago{since})"
        )

    __str__ = name


def holder(workdir: AnyPath) -> tuple[Mapping[str, Any], float] | None:
    """Who trains in a workdir (`host`, `pid`, `started`, ...) and the seconds since its last sign of life; or None.

    Raises:
      OSError: the lock cannot be read.
    """
    path = workdir / LOCK
    held = (_Object(path) if isinstance(path, StorePath) else _File(path)).read()
    return None if held is None else (held.holder, held.silent)


def alive(holder: Mapping[str, Any], silent: float) -> bool:
    """Whether who holds a lock still trains: on this machine that is known, on others it is by the last sign of life.

    Args:
      holder, silent: what `holder` returned.
    """
    here = _machine()
    if all(holder.get(name) == here[name] for name in ("host", "boot", "namespace")):
        return _alive(holder)
    return silent < STALE_AFTER


class _File:
    """A lock on a file system: made exclusively, its modification time the last sign of life."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def create(self, mine: Mapping[str, Any]) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(mine, file)
        except OSError:
            self.path.unlink(missing_ok=True)  # an empty lock would be one of an unknown process
            raise
        return True

    def replace(self, holder: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
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
            held = self.read()
            if held is None or held.holder != holder:
                return False
            logger.warning("workdir %s: taken over from %s", self.path.parent, held)
            partial = self.path.with_name(f"{LOCK}.{mine['token']}")
            try:
                partial.write_text(json.dumps(mine), encoding="utf-8")
                partial.replace(self.path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            return True
        finally:
            guard.unlink(missing_ok=True)

    def read(self) -> _Held | None:
        """Who holds the lock; None when nobody does."""
        try:
            # Opened, since network file systems show the attributes of a file that is not as they were.
            with self.path.open("rb") as file:
                modified = os.fstat(file.fileno()).st_mtime
                text = file.read()
        except FileNotFoundError:
            return None
        return _Held(_parsed(text), modified, time.time() - modified)

    def show_life(self, mine: Mapping[str, Any]) -> None:
        os.utime(self.path)


class _Object:
    """A lock in an object store: written only where it is what it was known to be."""

    def __init__(self, path: StorePath):
        self.path = path
        self._version: str | None = None

    def create(self, mine: Mapping[str, Any]) -> bool:
        return self._put(mine, None)

    def replace(self, holder: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
        """Put our lock in the place of `holder`'s; False when it is no longer there."""
        held = self.read()
        if held is None or held.holder.get("token") != holder.get("token"):
            return False
        if not self._put(mine, str(held.version)):
            return False
        logger.warning("workdir %s: taken over from %s", self.path.parent, held)
        return True

    def read(self) -> _Held | None:
        """Who holds the lock; None when nobody does."""
        found = paths.get(self.path)
        if found is None:
            return None
        text, version = found
        says = _parsed(text)
        alive = says.get("alive")
        return _Held(says, version, time.time() - alive if isinstance(alive, int | float) else 0.0)

    def show_life(self, mine: Mapping[str, Any]) -> None:
        # Where the workdir was taken over in this moment there is another version, and nothing is written.
        if not self._put(mine, self._version):
            held = self.read()
            if held is not None and held.holder.get("token") == mine["token"]:
                self._version = str(held.version)

    def _put(self, mine: Mapping[str, Any], version: str | None) -> bool:
        made = paths.put(self.path, json.dumps({**mine, "alive": time.time()}).encode(), version)
        if made is not None:
            self._version = made
        return made is not None


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        says = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return says if isinstance(says, dict) else {}


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


def _modified(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def age(seconds: float) -> str:
    """How long ago something was, in a word or two.

    >>> age(30), age(300)
    ('30 s', '5 min')
    """
    seconds = max(seconds, 0.0)
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
