"""The folder of things computed once from a corpus: each is built by one process and then only read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from maskformer.checks import printable
from maskformer.paths import why_no_folder
from maskformer.textfiles import DataError, DiskFullError, is_text

_BUILDING = ".building."
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_dir() -> Path:
    """`$MASKFORMER_CACHE`, or `~/.cache/maskformer`; created if missing.

    Raises:
      DataError: it cannot be written, it is no folder of this machine, or its name is no text, which TFDS needs.
    """
    chosen = os.environ.get("MASKFORMER_CACHE")
    folder = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "maskformer"
    fix = "set MASKFORMER_CACHE to a folder that you can write"
    if chosen and (why := why_no_folder(chosen)) is not None:
        raise DataError(f"cache folder {printable(chosen)}: {why}; {fix}")
    if not is_text(folder):
        raise DataError(f"cache folder {printable(folder)}: its name is not UTF-8; {fix}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # os.access misjudges read-only mounts and some network file systems; writing does not.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"cache folder {folder}: {error.strerror or error}; {fix}") from None
    return folder


def content_key(**parts: Any) -> str:
    """A name for what `parts` (JSON values) determine: 24 hex digits of their SHA-256.

    >>> content_key(length=128, corpus="ab") == content_key(corpus="ab", length=128)
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def build_once(
    path: Path,
    is_complete: Callable[[Path], bool],
    build: Callable[[Path], None],
    needs: Callable[[], int] | None = None,
) -> Path:
    """Returns `path`, a folder or file in the cache, building it first if it is missing or damaged.

    Processes of one host (or of hosts that share a file system with locks) that ask at the same time wait for
    the one that builds. The result appears by an atomic rename, so a killed build leaves nothing to be mistaken
    for a result; what it does leave is removed by the next build in the same folder.

    Args:
      path: where the result belongs.
      is_complete: whether an existing `path` is whole; a damaged one is deleted and rebuilt.
      build: writes the result to the path that it is given, which does not exist and whose parent does.
      needs: bytes that the result takes at least, where that is known beforehand.

    Raises:
      DataError: it cannot be written, or the disk is full.
    """
    if path.exists() and is_complete(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(_lock(path)):
            if os.path.lexists(path):
                if path.exists() and is_complete(path):  # another process built it while this one waited
                    return path
                _remove(path)
            _remove_leftovers(path)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name + _BUILDING) as unfinished:
                result = Path(unfinished) / path.name
                try:
                    build(result)
                except Exception as error:
                    if (full := out_of_space(error)) is None:
                        raise
                    least = max(_size(Path(unfinished)), needs() if needs else 0)
                    raise DiskFullError(f"cannot write {path}: {_too_little(full, path.parent, least)}") from error
                os.replace(result, path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.parent.exists():
            raise DataError(f"cache folder {path.parent} vanished while {path.name} was built; run again") from None
        if (full := out_of_space(error)) is not None:
            raise DiskFullError(
                f"cannot write {path}: {_too_little(full, path.parent, needs() if needs else 0)}"
            ) from error
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; set MASKFORMER_CACHE to a folder that you can write"
        ) from error
    return path


def out_of_space(error: BaseException) -> str | None:
    """What the system said where a file could not be written for want of space, else None.

    Libraries that write files themselves raise errors of their own with the system's words in them.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return os.strerror(error.errno)
    said = (os.strerror(number) for number in _FULL)
    return next((words for words in said if words in str(error)), None)


def _too_little(full: str, folder: Path, least: int) -> str:
    free = shutil.disk_usage(folder if folder.exists() else cache_dir()).free
    said = f"{full}; " + (f"it takes more than {least / 1e6:,.1f} MB and " if least else "")
    if full == os.strerror(errno.EFBIG):
        return f"{said}a limit on the size of files forbids it; raise it: ulimit -f unlimited"
    return f"{said}{free / 1e6:,.1f} MB are free there; free space or set MASKFORMER_CACHE to a folder with more"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _lock(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _remove_leftovers(path: Path) -> None:
    """Removes what killed builds left beside `path`, whose lock is held; not what is being built at this moment."""
    for leftover in path.parent.glob(f"*{_BUILDING}*"):
        target = leftover.with_name(leftover.name.rsplit(_BUILDING, 1)[0])
        try:
            with contextlib.nullcontext() if target == path else filelock.FileLock(_lock(target), timeout=0):
                shutil.rmtree(leftover, ignore_errors=True)
        except filelock.Timeout:
            pass  # its builder lives


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
