"""Checksums of the files of a checkpoint: written before it counts, checked before it is used.

CRC-32, which misses one damage in four thousand million and costs a fraction of a second a gigabyte: it is chance
that it guards against, not malice.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

from maskformer.training.workdir import read_object, reason, replace_text

CHECKSUMS = "checksums.json"
# Orbax writes these two into the folder itself after the checksums; a state is read without them.
UNCHECKED = ("_CHECKPOINT_METADATA", "commit_success.txt")
BLOCK = 1 << 22
THREADS = 8

# Ends the message about a damaged file of a checkpoint.
FIX = "the checkpoint is not used"


class DamageError(RuntimeError):
    """A checkpoint is not what was saved."""


def write_checksums(folder: pathlib.Path, step: int) -> None:
    """Write the checksums of every file in `folder`, the checkpoint of `step`, into `checksums.json` there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNCHECKED)
    names = [path.relative_to(folder).as_posix() for path in files]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(names, pool.map(_checksum, files), strict=True))
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as file:
        json.dump({"step": step, "files": found}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def replace_files(folder: pathlib.Path, step: int, texts: Mapping[str, str]) -> None:
    """Change small files of a checkpoint, such as its record, so that it is whole at every moment.

    Args:
      folder: the checkpoint of `step`.
      step: see `write_checksums`.
      texts: what each file is to hold, by its name below the folder.

    Raises:
      RunError: one of them cannot be written.
    """
    path = folder / CHECKSUMS
    checked = os.path.lexists(path)
    files: dict[str, Any] = dict(read_object(path, FIX)["files"]) if checked else {}

    def list_files() -> None:
        if checked:
            replace_text(path, json.dumps({"step": step, "files": files}, indent=1))

    # What is not listed is not checked: without them, then with what they are.
    files = {name: found for name, found in files.items() if name not in texts}
    list_files()
    for name, text in texts.items():
        replace_text(folder / name, text)
    files |= {name: _checksum(folder / name) for name in texts}
    list_files()


def verify(folder: pathlib.Path, step: int, part: int = 0, parts: int = 1) -> bool:
    """Check the files of a checkpoint against their checksums.

    Args:
      folder: the checkpoint.
      step: the step that it has to be of.
      part, parts: check this part of the files; the other processes of a run check the others.

    Returns:
      Whether there are checksums at all; a checkpoint of an earlier version has none, which is no damage.

    Raises:
      DamageError: names the first file that is missing or differs, or says that the checkpoint is of another step.
    """
    path = folder / CHECKSUMS
    if not os.path.lexists(path):
        return False
    try:
        manifest = read_object(path, "delete it to use the checkpoint unchecked")
    except ValueError as error:
        raise DamageError(str(error)) from error
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise DamageError(f"{CHECKSUMS} lists no files")
    if manifest.get("step") != step:
        raise DamageError(f"its files are those of step {manifest.get('step')}")
    names = sorted(files)[part::parts]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(names, pool.map(lambda name: _try_checksum(folder / name), names), strict=True):
            if isinstance(found, str):
                raise DamageError(f"{name} cannot be read: {found}")
            if found != files[name]:
                raise DamageError(f"{name} is not as it was saved")
    return True


def _try_checksum(path: pathlib.Path) -> list[int] | str:
    try:
        return _checksum(path)
    except OSError as error:
        return reason(error)


def _checksum(path: pathlib.Path) -> list[int]:
    """Length and CRC-32 of a file."""
    length = crc = 0
    with path.open("rb", buffering=0) as file:
        block = bytearray(BLOCK)
        while count := file.readinto(block):
            crc = zlib.crc32(memoryview(block)[:count], crc)
            length += count
    return [length, crc]
