r"""The one reader of text files and the one walker of folders: what is found is decoded, or refused by name.

Like `checks`, a ground floor: whatever reads a file that a user wrote reads it from here. UTF-8, with a byte order mark
or without, UTF-16 and UTF-32 with one, and gzip by the suffix `.gz` are decoded; anything else is an error of one line
that names the file, the line and the fix. Nothing is replaced.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskformer import paths
from maskformer.checks import printable
from maskformer.paths import AnyPath, StoreError, StorePath

# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SNIFFED = 4096  # bytes
_CONVERT = "convert it: iconv -f {} -t UTF-8"


class DataError(ValueError):
    """The data cannot be read as configured; the message is one line and says what to do."""


class DiskFullError(DataError):
    """There is no room for what is made of the data: no mistake in the command, which may simply be run again."""


class UnreachableError(DataError):
    """The store that holds the data does not answer: no mistake in the command, which may simply be run again."""


def unreadable(where: str, error: OSError, fix: str = "") -> DataError:
    """The error of a file or a folder that cannot be read; an `UnreachableError` where that may be different soon."""
    kind = UnreachableError if isinstance(error, StoreError) else DataError
    return kind(f"{where}: {error.strerror or error}{fix}")


def is_text(path: str | os.PathLike) -> bool:
    """Whether a path is UTF-8, as libraries in other languages need it."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: str | os.PathLike) -> str:
    """The whole text of a file, newlines as `\\n`.

    Raises:
      DataError: it cannot be read or is not text.
    """
    return "".join(lines(path))


def lines(path: str | os.PathLike, translate_newlines: bool = True) -> Iterator[str]:
    """Yields the lines of a text file, each with its newline.

    Args:
      path: read through gzip if it ends in `.gz`, in any case.
      translate_newlines: give every newline as `\\n`; else as it is in the file.

    Raises:
      DataError: it cannot be read or is not text.
    """
    try:
        with paths.reported(path), _opened(path) as file:
            encoding = _encoding(path, file)
            yield from io.TextIOWrapper(file, encoding=encoding, newline=None if translate_newlines else "")
    except UnicodeDecodeError as error:
        raise DataError(_undecodable(path, error)) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{printable(path)}: damaged gzip file ({error}); compress or copy it again") from None
    except OSError as error:
        raise unreadable(printable(path), error, "; give a file that you can read") from None


def parse_json(text: str, where: str) -> Any:
    """The value that a JSON text stands for.

    Args:
      text: the text.
      where: the file, or file and line, for the message.

    Raises:
      DataError: it is not JSON, or nothing that Python can hold.

    >>> parse_json("[1, ]", "a.json:3")
    Traceback (most recent call last):
        ...
    maskformer.textfiles.DataError: a.json:3: not JSON (Expecting value at column 5)
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column" if error.lineno > 1 else "column"
        raise DataError(f"{where}: not JSON ({error.msg} at {place} {error.colno})") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply to read") from None
    except ValueError as error:  # Python refuses integers of over 4,300 digits
        raise DataError(f"{where}: a number too long to read ({str(error).split(';')[0]})") from None


def _opened(path: str | os.PathLike) -> io.BufferedReader | gzip.GzipFile:
    file = paths.opened(paths.given(path))
    return gzip.GzipFile(fileobj=file) if os.fspath(path).lower().endswith(".gz") else file


def _encoding(path: str | os.PathLike, file: io.BufferedReader | gzip.GzipFile) -> str:
    head = file.peek(_SNIFFED)[:_SNIFFED]
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" in head:
        raise DataError(
            f"{printable(path)}: not text, or UTF-16 without a byte order mark; {_CONVERT.format('UTF-16LE')}"
        )
    return "utf-8"


def _undecodable(path: str | os.PathLike, error: UnicodeDecodeError) -> str:
    if not error.encoding.startswith("utf-8"):
        return f"{printable(path)}: damaged {error.encoding.upper()} text ({error.reason}); write it again as UTF-8"
    # The decoder works in blocks that know no lines.
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as found:
                return (
                    f"{printable(path)}:{number}: not UTF-8 (byte 0x{line[found.start]:02x} at byte {found.start + 1}"
                    f" of the line); if it is Latin-1, {_CONVERT.format('LATIN1')}"
                )
    return f"{printable(path)}: not UTF-8; {_CONVERT.format('LATIN1')}"


@dataclass(frozen=True)
class Walk:
    """The files below a folder, and how many entries were passed over or followed.

    Attributes:
      files: sorted.
      links: symbolic links that were followed, to files or to folders.
      hidden: entries whose name begins with a dot; a hidden folder counts once.
      repeated: links to a folder that was read already: one that holds the link, or one reached by another way.
      broken: links to nothing.
      unreadable: entries that are neither files nor folders, such as pipes.
      others: files with another suffix.
    """

    files: tuple[AnyPath, ...]
    links: int = 0
    hidden: int = 0
    repeated: int = 0
    broken: int = 0
    unreadable: int = 0
    others: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether there was nothing but folders and files, hidden or wanted or of other kinds by their suffix."""
        return not (self.links or self.hidden or self.repeated or self.broken or self.unreadable)

    def summary(self) -> str:
        """What was read, followed and passed over, in words.

        >>> Walk((Path("a.txt"),), hidden=2, links=1).summary()
        'read 1 file, followed 1 link; passed over 2 hidden'
        """
        count = len(self.files)
        said = f"read {count:,} file{'s' * (count != 1)}"
        if self.links:
            said += f", followed {self.links:,} link{'s' * (self.links != 1)}"
        passed = (
            (self.hidden, "hidden"),
            (self.repeated, "linked to a folder read already"),
            (self.broken, "linked to nothing"),
            (self.unreadable, "neither file nor folder"),
            (self.others, "with other suffixes"),
        )
        left_out = ", ".join(f"{number:,} {what}" for number, what in passed if number)
        return said + (f"; passed over {left_out}" if left_out else "")


def suffix(path: AnyPath) -> str:
    """The suffix that says what a file holds: in lower case, without `.gz`.

    >>> suffix(Path("a/B.TXT")), suffix(Path("b.jsonl.GZ")), suffix(Path("c.gz"))
    ('.txt', '.jsonl', '')
    """
    name = path.name.lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


def walk(folder: AnyPath, suffixes: Sequence[str]) -> Walk:
    """Finds the files below `folder` whose `suffix` is one of `suffixes`.

    Links are followed, to files and to folders. Below each entry of `folder` every real folder is read once, so that
    links in a circle end, and a folder that two splits link to belongs to both. Hidden entries are passed over. In a
    bucket, where there are no links, all files are found by one listing.

    Raises:
      DataError: a folder cannot be read.
    """
    if isinstance(folder, StorePath):
        return _walk_store(folder, suffixes)
    files: list[AnyPath] = []
    counts = dict.fromkeys(("links", "hidden", "repeated", "broken", "unreadable", "others"), 0)
    # Folders still to be read, each with the real folders already met below its entry of `folder`.
    waiting: list[tuple[Path, set[tuple[int, int]] | None]] = [(folder, None)]
    while waiting:
        place, met = waiting.pop()
        for path, is_link in _entries(place):
            if path.name.startswith("."):
                counts["hidden"] += 1
            elif not os.path.exists(path):
                counts["broken"] += 1
            elif path.is_dir():
                known = {_identity(folder)} if met is None else met
                if (identity := _identity(path)) in known:
                    counts["repeated"] += 1
                    continue
                counts["links"] += is_link
                known.add(identity)
                waiting.append((path, known))
            elif not path.is_file():
                counts["unreadable"] += 1
            elif suffix(path) in suffixes:
                counts["links"] += is_link
                files.append(path)
            else:
                counts["others"] += 1
    return Walk(tuple(sorted(files)), **counts)


def _walk_store(folder: StorePath, suffixes: Sequence[str]) -> Walk:
    try:
        found = paths.files_below(folder)
    except OSError as error:
        raise unreadable(str(folder), error) from None
    shown = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    wanted = tuple(path for path in shown if suffix(path) in suffixes)
    return Walk(wanted, hidden=len(found) - len(shown), others=len(shown) - len(wanted))


def _entries(folder: Path) -> list[tuple[Path, bool]]:
    try:
        with os.scandir(folder) as found:
            return sorted((Path(entry.path), entry.is_symlink()) for entry in found)
    except OSError as error:
        raise DataError(f"{printable(folder)}: {error.strerror or error}; give a folder that you can read") from None


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
