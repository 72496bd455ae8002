"""The novels as chapters of paragraphs, read from the compressed files beside this module.

The files hold the lines of the source edition untouched (`PROVENANCE.md`). What is done to them here, in
order: the title page, volume headings, printer's marks (`* * * * *`, `FINIS`, bracketed notes of a modern
editor) are dropped; a chapter starts at its heading, which is not part of the text; lines are rejoined into
paragraphs; `_emphasis_` marks are removed.
"""

from __future__ import annotations

import bz2
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent

# Name of the file -> title, in order of publication.
BOOKS = {
    "sensesensibility": "Sense and Sensibility",
    "prideprejudice": "Pride and Prejudice",
    "mansfieldpark": "Mansfield Park",
    "emma": "Emma",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
}

SPLITS = ("train", "validation", "test")

_CHAPTER = re.compile(r"(?:CHAPTER|Chapter) (?:[IVXL]+|\d+)")
_VOLUME = re.compile(r"VOLUME [IVX]+")
_PRINTERS_MARK = re.compile(r"[\s*]+|finis|the end|\[(?:at this point|end volume)[^\]]*\]", re.IGNORECASE)
_AFTERWORD = "A NOTE ON THE TEXT"  # a modern publisher's, at the end of Northanger Abbey
_DOUBLE_DASH = re.compile(r"(?<!-)--$")  # but not the longer dash that stands for a suppressed name


class Chapter(NamedTuple):
    """One chapter: the file name of its book, its number from 1 within the book, paragraphs joined by `\\n\\n`."""

    book: str
    number: int
    text: str

    @property
    def key(self) -> str:
        """The name that its split is drawn from, such as `emma/12`."""
        return f"{self.book}/{self.number}"


def split_of(key: str) -> str:
    """The split of a chapter: two of twenty hash buckets are held out, so about 5% and 5% of the chapters.

    >>> split_of("prideprejudice/1"), split_of("emma/12"), split_of("emma/13")
    ('test', 'validation', 'train')
    """
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")


def chapters(book: str) -> Iterator[Chapter]:
    """Yields the chapters of one of `BOOKS`, in order."""
    lines = bz2.decompress((FOLDER / f"{book}.txt.bz2").read_bytes()).decode("utf-8").split("\n")
    starts = [i for i, line in enumerate(lines) if _CHAPTER.fullmatch(line)]
    end = next((i for i, line in enumerate(lines) if line == _AFTERWORD), len(lines))
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], end], strict=True), start=1):
        yield Chapter(book, number, "\n\n".join(_paragraphs(lines[start + 1 : stop])))


def fingerprint() -> str:
    """SHA-256 over the compressed files and this module, which decides what is made of them."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for book in BOOKS:
        digest.update((FOLDER / f"{book}.txt.bz2").read_bytes())
    return digest.hexdigest()


def _paragraphs(lines: list[str]) -> Iterator[str]:
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
            continue
        paragraph = _join(block)
        block = []
        if paragraph and not _PRINTERS_MARK.fullmatch(paragraph) and not _VOLUME.fullmatch(paragraph):
            yield paragraph


def _join(block: list[str]) -> str:
    """One paragraph from its lines: indented lines (verse, signatures) stay lines, wrapped prose becomes one."""
    text = ""
    for line in block:
        words = " ".join(line.replace("_", "").split())
        if not text:
            text = words
        elif line.startswith("  "):
            text += "\n" + words
        else:
            # Printers set no space round a dash; the line break after one is the wrapping's.
            text += words if _DOUBLE_DASH.search(text) else " " + words
    return text
