"""Documents from a folder of `.txt` and `.jsonl` files, as they are or compressed."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from maskformer import paths
from maskformer.checks import printable, shown
from maskformer.data.cache import content_key
from maskformer.data.data_config import SPLITS
from maskformer.paths import AnyPath, StorePath
from maskformer.textfiles import DataError, lines, parse_json, suffix, unreadable, walk

logger = logging.getLogger(__name__)

# Characters; a longer .txt is cut between lines, so that memory stays bounded.
LONGEST_DOCUMENT = 1 << 20
SUFFIXES = (".txt", ".jsonl")
_NEWLINE = re.compile(r"\r\n?")
_said: set[str] = set()


class Folder:
    """A split of a folder of `.txt` files (one document each) and `.jsonl` files (one document a line).

    Either may be compressed (`.txt.gz`). Links are followed, hidden files passed over (`textfiles.walk`).

    The split called `train` is, in this order: the files below `folder/train/`; the files of `folder` whose name
    is `train` or begins with `train-`, `train_` or `train.`; else, where no file is set apart for any split, all
    documents but those that a hash of their text puts into `validation` and `test` (5% each, so that a document
    that occurs twice is never in two splits).
    """

    def __init__(self, folder: AnyPath, split: str, text_key: str):
        self._folder, self._split, self._text_key = folder, split, text_key
        self._where = f"data.name='{printable(folder)}'"
        try:
            paths.check_store(folder, only_read=True)
            is_folder, exists = folder.is_dir(), folder.exists()
        except OSError as error:
            raise unreadable(self._where, error) from None
        if not is_folder:
            kind = "is not a folder" if exists else "no such folder"
            raise DataError(f"{self._where}: {kind}; give a folder of .txt or .jsonl files")
        found = walk(folder, SUFFIXES)
        if not found.files:
            raise DataError(f"{self._where}: the folder holds no .txt or .jsonl file ({found.summary()})")
        summary = f"{self._where}: {found.summary()}"
        if found.is_plain:
            logger.info(summary)
        else:
            say_once(summary)
        named = {path: self._split_in_name(path) for path in found.files}
        self._hashed = not any(named.values())
        self._files = list(found.files) if self._hashed else [p for p in found.files if named[p] == split]
        if self._hashed and split not in SPLITS:
            raise DataError(
                f"{self._where}: no files for split {shown(split)};"
                f" put them into {printable(folder / split)} or name them {split}-*.jsonl"
            )
        if not self._files:
            others = ", ".join(sorted({name for name in named.values() if name}))
            raise DataError(
                f"{self._where}: files for {others} but none for {shown(split)};"
                f" put some into {printable(folder / split)}"
            )
        digest = hashlib.sha256()
        # A bucket's own checksums say as much as the text, which is not fetched for that.
        kept: dict[Any, str] = paths.fingerprints(folder) if isinstance(folder, StorePath) else {}
        for path in self._files:
            # The name as the system has it: it may be no text.
            digest.update(os.fsencode(path.relative_to(folder)) + f" {kept.get(path) or _content(path)}\n".encode())
        self.fingerprint = content_key(files=digest.hexdigest(), split=split, key=text_key, hashed=self._hashed)

    def _split_in_name(self, path: AnyPath) -> str | None:
        first = path.relative_to(self._folder).parts[0]
        for split in {*SPLITS, self._split}:
            if first == split or any(first.startswith(split + mark) for mark in "-_."):
                return split
        return None

    def documents(self) -> Iterator[str]:
        """See `Source`. Newlines of `.txt` files are `\\n`."""
        return (text for _, text in self._documents())

    def text_bytes(self) -> int:
        """See `Source`: newlines as the files have them."""
        return sum(len(written.encode()) for written, _ in self._documents())

    def _documents(self) -> Iterator[tuple[str, str]]:
        """Each document as it is written, and as it is read."""
        empty = True
        for path in self._files:
            for written, text in _text_file(path) if suffix(path) == ".txt" else self._records(path):
                if not self._hashed or _hashed_split(text) == self._split:
                    empty = False
                    yield written, text
        if not empty:
            return
        if self._hashed:
            raise DataError(
                f"{self._where}: too few documents to draw a {shown(self._split)} split from;"
                f" put files into {printable(self._folder / self._split)}"
            )
        one = len(self._files) == 1
        raise DataError(
            f"{printable(self._files[0])}{'' if one else f' and {len(self._files) - 1} more'}:"
            f" {'holds' if one else 'hold'} no document for the {shown(self._split)} split;"
            f" put text into {'it' if one else 'them'}"
        )

    def _records(self, path: AnyPath) -> Iterator[tuple[str, str]]:
        halves = 0
        for number, line in enumerate(lines(path), start=1):
            if not line.strip():
                continue
            where = f"{printable(path)}:{number}"
            try:
                record = parse_json(line, where)
            except DataError as error:
                fix = "write one JSON object a line"
                if number == 1 and line.lstrip().startswith("["):
                    fix += ", not one array over several: jq -c '.[]'"
                raise DataError(f"{error}; {fix}") from None
            if not isinstance(record, dict) or self._text_key not in record:
                found = shown(", ".join(record))[1:-1] if isinstance(record, dict) else type(record).__name__
                fix = "set data.text_key" if isinstance(record, dict) else "write one JSON object a line"
                raise DataError(f"{where}: no key {shown(self._text_key)}, found {found or 'none'}; {fix}")
            text = record[self._text_key]
            if not isinstance(text, str):
                raise DataError(
                    f"{where}: {shown(self._text_key)} is {type(text).__name__}, expected text; set data.text_key"
                )
            # JSON can spell half of a surrogate pair, which is no character.
            whole = text.encode("utf-8", errors="replace").decode("utf-8")
            halves += whole != text
            yield whole, whole
        if halves:
            say_once(f"{printable(path)}: {halves:,} documents spell half a surrogate pair; it is read as '?'")


def say_once(message: str) -> None:
    # Every split, and the tokenizer, goes over the folder anew.
    if message not in _said:
        _said.add(message)
        logger.warning(message)


def _content(path: AnyPath) -> str:
    try:
        with paths.opened(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{printable(path)}: {error.strerror or error}; make it readable or take it out") from None


def _text_file(path: AnyPath) -> Iterator[tuple[str, str]]:
    """The documents of a text file, with its own newlines and with plain ones."""
    written: list[str] = []
    read: list[str] = []
    size = 0
    for line in lines(path, translate_newlines=False):
        text = _NEWLINE.sub("\n", line)
        if size + len(text) > LONGEST_DOCUMENT and read:
            yield "".join(written), "".join(read)
            written, read, size = [], [], 0
        written.append(line)
        read.append(text)
        size += len(text)
    if read:
        yield "".join(written), "".join(read)


def _hashed_split(text: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")
