"""Tells whether a folder of the cache is what was written: sizes and checksums of its files, and of their list."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

_SEAL = "seal.json"
_BLOCK = 1 << 20  # bytes
# Blocks that are compared of a file that nobody touched: all of it where it is small, and at constant cost where it
# is large.
_CHECKED_BLOCKS = 16


def seal(folder: Path) -> None:
    """Records every file below `folder`, which is complete; reads them once."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        blocks = range(-(-status.st_size // _BLOCK))
        files[str(path.relative_to(folder))] = {
            "size": status.st_size,
            "modified": status.st_mtime_ns,
            "blocks": _checksums(path, blocks),
        }
    (folder / _SEAL).write_text(json.dumps({"files": files, "sha256": _digest(files)}))


def is_sealed(folder: Path) -> bool:
    """Whether the files below `folder` are as they were when it was sealed.

    Sizes are always compared. So are the contents of every file whose time of modification is another, and 16 MB,
    evenly spaced, of the others.
    """
    try:
        content = json.loads((folder / _SEAL).read_text())
        files = content["files"]
        return content["sha256"] == _digest(files) and all(_same(folder / name, files[name]) for name in files)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False


def _same(path: Path, recorded: dict[str, Any]) -> bool:
    status = path.stat()
    if not path.is_file() or status.st_size != recorded["size"]:
        return False
    count = len(recorded["blocks"])
    checked = min(_CHECKED_BLOCKS, count) if status.st_mtime_ns == recorded["modified"] else count
    blocks = [i * (count - 1) // max(checked - 1, 1) for i in range(checked)]
    return _checksums(path, blocks) == [recorded["blocks"][block] for block in blocks]


def _checksums(path: Path, blocks: Any) -> list[int]:
    with path.open("rb") as file:
        found = []
        for block in blocks:
            file.seek(block * _BLOCK)
            found.append(zlib.crc32(file.read(_BLOCK)))
    return found


def _digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
