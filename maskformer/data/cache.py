"""The folder of things computed once from a corpus: each is built by one process and then only read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from maskformer.data.config import DataError


def cache_dir() -> Path:
    """`$MASKFORMER_CACHE`, or `~/.cache/maskformer`; created if missing.

    Raises:
      DataError: it cannot be written.
    """
    chosen = os.environ.get("MASKFORMER_CACHE")
    folder = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "maskformer"
    fix = "set MASKFORMER_CACHE to a folder that you can write"
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


def build_once(path: Path, is_complete: Callable[[Path], bool], build: Callable[[Path], None]) -> Path:
    """Returns `path`, a folder or file in the cache, building it first if it is missing or damaged.

    Processes of one host (or of hosts that share a file system with locks) that ask at the same time wait for
    the one that builds. The result appears by an atomic rename, so a killed build leaves nothing to be mistaken
    for a result.

    Args:
      path: where the result belongs.
      is_complete: whether an existing `path` is whole; a damaged one is deleted and rebuilt.
      build: writes the result to the path that it is given, which does not exist and whose parent does.
    """
    if path.exists() and is_complete(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(path.name + ".lock")):
            if path.exists():
                if is_complete(path):  # another process built it while this one waited
                    return path
                _remove(path)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.building.") as unfinished:
                result = Path(unfinished) / path.name
                build(result)
                os.replace(result, path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.parent.exists():
            raise DataError(f"cache folder {path.parent} vanished while {path.name} was built; run again") from None
        raise DataError(
            f"cannot write {path}: {error.strerror or error};"
            " free space there or set MASKFORMER_CACHE to another folder"
        ) from error
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
