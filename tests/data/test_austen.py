"""The embedded corpus: whole, clean, split by chapters, readable without TensorFlow."""

import bz2
import hashlib
import re
import subprocess
import sys

import pytest

from maskformer.data import DataConfig
from maskformer.data.austen import BOOKS, chapters, split_of, text
from maskformer.data.sources import open_source

# As in any printed edition, counted through the volumes.
CHAPTERS = {
    "sensesensibility": 50,
    "prideprejudice": 61,
    "mansfieldpark": 48,
    "emma": 55,
    "northangerabbey": 31,
    "persuasion": 24,
}


@pytest.fixture(scope="module")
def novels():
    return {book: list(chapters(book)) for book in BOOKS}


def test_novels_have_the_chapters_of_the_printed_editions(novels):
    assert {book: len(found) for book, found in novels.items()} == CHAPTERS


def test_files_have_the_recorded_checksums_and_compress_to_the_same_bytes():
    recorded = (text.FOLDER / "PROVENANCE.md").read_text()
    for book in BOOKS:
        packed = (text.FOLDER / f"{book}.txt.bz2").read_bytes()
        assert f"{hashlib.sha256(packed).hexdigest()}  {book}.txt.bz2" in recorded
        assert bz2.compress(bz2.decompress(packed), 9) == packed


def test_corpus_is_about_a_megabyte_in_the_package():
    assert sum(path.stat().st_size for path in text.FOLDER.glob("*.bz2")) < 1.1e6


@pytest.mark.parametrize("book", BOOKS)
def test_no_letter_is_lost_or_added_between_the_first_heading_and_the_end(novels, book):
    lines = bz2.decompress((text.FOLDER / f"{book}.txt.bz2").read_bytes()).decode().splitlines()
    first = next(i for i, line in enumerate(lines) if line.lower() in ("chapter 1", "chapter i"))
    raw = "\n".join(lines[first:]).split("A NOTE ON THE TEXT")[0]
    raw = re.sub(r"^(CHAPTER|Chapter|VOLUME) [IVXL\d]+$|^(FINIS|Finis|THE END)$", "", raw, flags=re.MULTILINE)
    raw = re.sub(r"\[(End volume|At this point)[^\]]*\]", "", raw)
    # Asterisks stay out of the comparison: most are printer's marks, one is a footnote's.
    kept = "".join(chapter.text for chapter in novels[book])
    assert re.sub(r"[\s_*]", "", kept) == re.sub(r"[\s_*]", "", raw)


def test_wrapped_lines_are_rejoined_and_marks_removed(novels):
    first = novels["prideprejudice"][0].text.split("\n\n")
    assert first[0] == (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want"
        " of a wife."
    )
    assert first[7] == '"You want to tell me, and I have no objection to hearing it."'
    everything = "\n\n".join(chapter.text for found in novels.values() for chapter in found)
    assert not re.search(r"_|\* \*|^CHAPTER|^[ \t]|  |\r|FINIS", everything, flags=re.MULTILINE)
    # Verse keeps its lines, prose does not.
    assert "My first doth affliction denote,\nWhich my second is destin'd to feel\n" in everything
    assert "thirty years ago Miss Maria Ward, of Huntingdon, with only seven thousand pounds" in everything


def test_every_chapter_is_in_exactly_one_split_and_no_text_in_two(novels, cache):
    by_split = {}
    for split in ("train", "validation", "test"):
        by_split[split] = list(open_source(DataConfig(), split).documents())
    expected = {split: [] for split in by_split}
    for found in novels.values():
        for chapter in found:
            expected[split_of(chapter.key)].append(chapter.text)
    assert by_split == expected
    assert sum(map(len, by_split.values())) == len({d for found in by_split.values() for d in found}) == 269
    words = {split: sum(len(d.split()) for d in found) for split, found in by_split.items()}
    assert min(words.values()) > 25_000 and words["train"] > 600_000


def test_reading_the_corpus_imports_no_tensorflow(cache):
    code = """
import sys
from maskformer.data import DataConfig
from maskformer.data.sources import open_source
assert next(iter(open_source(DataConfig(), "train").documents()))
assert "tensorflow" not in sys.modules
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "", "nothing may be printed while the corpus is prepared"
