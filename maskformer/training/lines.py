"""Files of JSON lines, such as `metrics.jsonl`: appended to on a file system, in numbered parts on an object store.

Nothing can be appended to an object. What is written since the last flush is added to the newest part, which is
written again as a whole (so a reader finds it before or after), until it is `PART_BYTES` long and the next one begins:
`metrics.00001.jsonl`, `metrics.00002.jsonl`, ... Whoever reads `metrics.jsonl` reads their text, joined.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from maskformer import paths
from maskformer.paths import AnyPath, StoreError, StorePath

logger = logging.getLogger(__name__)

PART_BYTES = 1 << 18
# On a store, lines wait for so long, or for a flush: a request for each would be slow, and throttled.
STORE_SECONDS = 30.0


class LineFile:
    """Appends JSON objects to a file, one a line; one process at a time.

    Args:
      path: such as `workdir / "metrics.jsonl"`. What is there is kept.

    Raises:
      OSError: it cannot be written, here and in its methods; a `StoreError` where another process writes it too.
    """

    def __init__(self, path: AnyPath):
        self._parts = _Parts(path) if isinstance(path, StorePath) else None
        if self._parts is None and any(part != path for part in part_paths(path)):
            _join(path)
        self._file = None if isinstance(path, StorePath) else _appending(path)

    def write(self, mapping: Mapping[str, Any]) -> None:
        """Add a line. On a file system it is read from now on; on a store after `STORE_SECONDS`, or a flush."""
        line = json.dumps(dict(mapping)) + "\n"
        if self._parts is not None:
            self._parts.write(line.encode())
        elif self._file is not None:
            self._file.write(line)
            self._file.flush()

    def flush(self) -> None:
        """Every line is on disk, or in the store."""
        if self._parts is not None:
            self._parts.flush()
        elif self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._parts is not None:
            self._parts.flush()
        elif self._file is not None:
            self._file.close()


def _appending(path: pathlib.Path) -> TextIO:
    with path.open("ab+") as file:
        # A kill may have cut off the last line of the start before: what follows begins on a line of its own.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return path.open("a", encoding="utf-8")


class _Parts:
    def __init__(self, path: StorePath):
        self._path = path
        parts = [part for part in part_paths(path) if isinstance(part, StorePath) and part != path]
        self._number = len(parts) or 1
        held = paths.get(parts[-1]) if parts else None
        self._text, self._version = held if held is not None else (b"", None)
        if self._text and not self._text.endswith(b"\n"):
            self._text += b"\n"  # of a run that was copied here with a line that a kill had cut off
        self._waiting = b""
        self._flushed = time.monotonic()

    def write(self, line: bytes) -> None:
        self._waiting += line
        if time.monotonic() - self._flushed > STORE_SECONDS:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        if len(self._text) >= PART_BYTES:
            self._number, self._text, self._version = self._number + 1, b"", None
        path = part_path(self._path, self._number)
        # A store that does not answer is not asked again by the next line at once: its client has tried for long.
        self._flushed = time.monotonic()
        version = paths.put(path, self._text + self._waiting, self._version)
        if version is None:
            raise StoreError(f"{path}: was written by another process meanwhile; let one training at a time write it")
        self._text, self._version, self._waiting = self._text + self._waiting, version, b""


def part_path(path: AnyPath, number: int) -> Any:
    """Where a part of a file is kept, from number 1 on."""
    return path.with_name(f"{path.stem}.{number:05d}{path.suffix}")


def part_paths(path: AnyPath) -> list[AnyPath]:
    """What a file is kept in, in order: one file of its name, parts, or both after a run was copied between stores."""
    form = re.compile(rf"{re.escape(path.stem)}\.([0-9]{{5,}}){re.escape(path.suffix)}")
    try:
        names = {entry.name for entry in path.parent.iterdir()}
    except FileNotFoundError:
        return []
    numbers = sorted(int(match[1]) for match in map(form.fullmatch, names) if match)
    return [path] * (path.name in names) + [part_path(path, number) for number in numbers]


def exists(path: AnyPath) -> bool:
    """Whether there is a file of lines of that name, in one piece or in parts."""
    return bool(part_paths(path))


def read_bytes(path: AnyPath) -> bytes:
    """The whole text of a file, its parts joined.

    Raises:
      OSError: there is none, or it cannot be read.
    """
    return b"".join(part.read_bytes() for part in part_paths(path) or [path])


def _join(path: AnyPath) -> None:
    text, parts = read_bytes(path), part_paths(path)
    paths.replace_bytes(path, text)
    for part in parts:
        if part != path:
            part.unlink()


def read_lines(path: AnyPath, accept: Callable[[dict[str, Any]], bool] = lambda line: True) -> list[dict[str, Any]]:
    """The lines of a file, one dict each.

    A last line that a kill cut off is left out. Other damage is left out too, and one warning says where; what follows
    it is kept, on the same line as well.

    Args:
      path: of the file, not of a part.
      accept: whether an object is a line of such a file at all.

    Raises:
      OSError: the file cannot be read at all.
    """

    def parsed(text: bytes) -> dict[str, Any] | None:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return line if isinstance(line, dict) and accept(line) else None

    lines, damaged = [], []
    # What follows the last newline is no line yet.
    *texts, rest = read_bytes(path).split(b"\n")
    for number, text in enumerate(texts, start=1):
        if (line := parsed(text)) is None:
            damaged.append(number)
            # Zeros, or a line that was cut off, may stand before a whole one, which is flat where that matters.
            line = parsed(text[max(text.rfind(b"{"), 0) :])
        if line is not None:
            lines.append(line)
    if (line := parsed(rest)) is not None:
        lines.append(line)
    if damaged:
        where = ", ".join(map(str, damaged[:3])) + (f" and {len(damaged) - 3} more" if len(damaged) > 3 else "")
        logger.warning(
            "%s: damaged at line %s, which is left out; the other %d lines are used", path, where, len(lines)
        )
    return lines


def rewrite(path: AnyPath, lines: Sequence[Mapping[str, Any]]) -> None:
    """Make `lines` the whole of a file, which nobody else writes meanwhile.

    A run that is killed meanwhile leaves the old file or the new one. On a store, where lines were dropped from the
    end, it leaves all of `lines`, and maybe some of those that follow them in the old file.

    Raises:
      OSError: it cannot be written.
    """
    texts = [(json.dumps(dict(line)) + "\n").encode() for line in lines]
    old = part_paths(path)
    if not isinstance(path, StorePath):
        paths.replace_bytes(path, b"".join(texts))
        for part in old:
            if part != path:
                part.unlink()
        return
    # Parts end where they did, whatever their length: where lines were dropped from the end, one object changes.
    wanted: list[bytes] = []
    rest = b"".join(texts)
    for held in (part.read_bytes() for part in old):
        if not rest or not (rest.startswith(held) or held.startswith(rest)):
            break
        wanted.append(rest[: len(held)])
        rest = rest[len(held) :]
    unchanged = len(wanted)
    for text in rest.splitlines(keepends=True):
        if len(wanted) == unchanged or len(wanted[-1]) >= PART_BYTES:
            wanted.append(b"")
        wanted[-1] += text
    wanted = wanted or [b""]
    # The last ones go first; a part that holds the same lines as before, since none of them was dropped, is left alone.
    for part in reversed(old[len(wanted) :]):
        part.unlink(missing_ok=True)
    for index, text in enumerate(wanted):
        number = index + 1 - (path in old)
        part = path if number == 0 else part_path(path, number)
        if index >= len(old) or part.read_bytes() != text:
            part.write_bytes(text)
