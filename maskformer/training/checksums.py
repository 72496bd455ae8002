"""Checksums of the files of a checkpoint: written before it counts, checked before it is used.

CRC-32, or the MD5 sum that a store has computed itself. The first misses one damage in four thousand million
and costs a fraction of a second a gigabyte: it is chance that both guard against, not malice.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

from maskformer import paths
from maskformer.paths import AnyPath
from maskformer.training.workdir import COMMITTED, read_object, reason, replace_text

CHECKSUMS = "checksums.json"
# Orbax writes these two into the folder itself after the checksums; a state is read without them.
UNCHECKED = ("_CHECKPOINT_METADATA", COMMITTED)
BLOCK = 1 << 22
THREADS = 8

# Ends the message about a damaged file of a checkpoint.
FIX = "the checkpoint is not used"


class DamageError(RuntimeError):
    """A checkpoint is not what was saved."""


def write_checksums(folder: AnyPath, step: int) -> None:
    """Write the checksums of every file in `folder`, the checkpoint of `step`, into `checksums.json` there.

    Of a file in Google's store it is the MD5 sum that the store computed of what it received; others are read.

    Raises:
      OSError: a file cannot be read, or the checksums cannot be written.
    """
    files = [path for path in paths.files_below(folder) if path.name not in (CHECKSUMS, *UNCHECKED)]
    names = [path.relative_to(folder).as_posix() for path in files]
    kept = paths.stored_checksums(folder)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(lambda name: kept.get(name) or _checksum(folder / name, "crc"), names)
        found = dict(zip(names, sums, strict=True))
    text = json.dumps({"step": step, "files": found}, indent=1)
    if not paths.is_local(folder):
        (folder / CHECKSUMS).write_text(text)
        return
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_files(folder: AnyPath, step: int, texts: Mapping[str, str]) -> None:
    """Change small files of a checkpoint, such as its record, so that it is whole at every moment.

    Args:
      folder: the checkpoint of `step`.
      step: see `write_checksums`.
      texts: what each file is to hold, by its name below the folder.

    Raises:
      RunError: one of them cannot be written.
    """
    path = folder / CHECKSUMS
    checked = paths.lexists(path)
    files: dict[str, Any] = dict(read_object(path, FIX)["files"]) if checked else {}

    def list_files() -> None:
        if checked:
            replace_text(path, json.dumps({"step": step, "files": files}, indent=1))

    # What is not listed is not checked: without them, then with what they are.
    files = {name: found for name, found in files.items() if name not in texts}
    list_files()
    for name, text in texts.items():
        replace_text(folder / name, text)
    files |= {name: _checksum(folder / name, "crc") for name in texts}
    list_files()


def verify(folder: AnyPath, step: int, part: int = 0, parts: int = 1) -> bool:
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
    if not paths.lexists(path):
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
    kept = paths.stored_checksums(folder)

    def found(name: str) -> list[int | str] | str:
        try:
            # In whichever way it was written: a run may have been copied from a bucket to a disk, or to a bucket.
            if "md5:" not in str(files[name]):
                return _checksum(folder / name, "crc")
            return kept.get(name) or _checksum(folder / name, "md5")
        except OSError as error:
            return reason(error)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for name, sums in zip(names, pool.map(found, names), strict=True):
            if isinstance(sums, str):
                raise DamageError(f"{name} cannot be read: {sums}")
            if sums != files[name]:
                raise DamageError(f"{name} is not as it was saved")
    return True


def _checksum(path: AnyPath, kind: str) -> list[int | str]:
    """Length of a file and its CRC-32, or its MD5 sum."""
    length = crc = 0
    md5 = hashlib.md5(usedforsecurity=False)
    with paths.reported(path), paths.unbuffered(path) as file:
        block = bytearray(BLOCK)
        while count := file.readinto(block):
            part = memoryview(block)[:count]
            if kind == "md5":
                md5.update(part)
            else:
                crc = zlib.crc32(part, crc)
            length += count
    return [length, f"md5:{md5.hexdigest()}" if kind == "md5" else crc]
