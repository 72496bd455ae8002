"""Packing loses nothing, repeats nothing, cuts only where it must, and wastes little."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskformer.data.packing import Segment, gather, pack, split_long
from maskformer.data.sentences import split_sentences


@st.composite
def segments(draw, max_size=40):
    """Segments whose tokens are all different, so that any loss, repetition or reordering shows."""
    sizes = draw(st.lists(st.integers(1, max_size), max_size=30))
    starts = np.cumsum([0, *sizes])
    words = np.array(draw(st.lists(st.booleans(), min_size=int(starts[-1]), max_size=int(starts[-1]))), bool)
    token = np.arange(starts[-1], dtype=np.int32)
    return [Segment(token[a:b], words[a:b]) for a, b in itertools.pairwise(starts)]


def joined(found):
    return [int(t) for s in found for t in s.tokens]


@given(segments(), st.integers(1, 20))
def test_long_segments_are_cut_in_order_without_loss(found, capacity):
    for segment in found:
        pieces = list(split_long(segment, capacity))
        assert joined(pieces) == segment.tokens.tolist()
        assert [w for p in pieces for w in p.word_starts] == segment.word_starts.tolist()
        assert all(0 < len(p) <= capacity for p in pieces)


@given(segments(), st.integers(1, 20))
def test_a_word_is_cut_only_where_no_cut_between_words_fits(found, capacity):
    for segment in found:
        pieces = list(split_long(segment, capacity))
        for before, after in itertools.pairwise(pieces):
            if not after.word_starts[0]:
                # Nowhere in the piece before could it have ended instead, and it is as long as a row.
                assert len(before) == capacity and not before.word_starts[1:].any()


@given(segments(), st.integers(1, 60))
def test_gathering_keeps_sentences_whole_and_order(found, capacity):
    chunks = list(gather(found, capacity))
    assert joined(chunks) == joined(found)
    assert all(0 < len(c) <= capacity for c in chunks)
    starts_of_chunks = {int(c.tokens[0]) for c in chunks}
    for sentence in found:
        if len(sentence) <= capacity:
            assert not starts_of_chunks & set(sentence.tokens[1:].tolist()), "a sentence that fits was cut"


@given(segments(), st.integers(0, 2), st.integers(1, 8))
def test_packing_puts_every_segment_whole_into_exactly_one_row(found, around, open_rows):
    length = 40 + around
    rows = list(pack(found, length, around, open_rows))
    placed = [s.tokens.tolist() for row in rows for s in row]
    assert sorted(placed) == sorted(s.tokens.tolist() for s in found)
    assert all(0 < sum(len(s) + around for s in row) <= length for row in rows)


@given(segments())
def test_no_two_rows_could_have_been_one(found):
    used = sorted(sum(map(len, row)) for row in pack(found, length=40, open_rows=1000))
    assert len(used) < 2 or used[0] + used[1] > 40


@given(segments())
def test_packing_is_deterministic(found):
    first, second = (
        [[s.tokens.tolist() for s in row] for row in pack(iter(found), length=40, open_rows=3)] for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("size", [0, 9])
def test_a_segment_that_is_empty_or_too_long_for_a_row_is_refused(size):
    with pytest.raises(ValueError, match=f"segment of {size} tokens cannot go into rows of 8"):
        list(pack([Segment(np.zeros(size, np.int32), np.zeros(size, bool))], length=8))


def test_short_segments_fill_rows_to_more_than_98_percent():
    sizes = np.random.default_rng(0).integers(5, 60, 5000)
    rows = list(pack((Segment(np.zeros(n, np.int32), np.zeros(n, bool)) for n in sizes), length=128))
    assert sizes.sum() / (128 * len(rows)) > 0.98


@given(st.text(alphabet="abIMr. ?!\"'\n()\u3002Z", max_size=200))
def test_sentences_hold_every_character_but_white_space_in_order(text):
    found = list(split_sentences(text))
    assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", text)
    assert all(s == s.strip() != "" for s in found)


def test_sentences_end_at_marks_but_not_after_titles_and_initials():
    text = 'Mr. J. Knightley laughed. "Is it you?" she said. "Go!" '
    text += "\u4ed6\u6765\u4e86\u3002\u597d\u3002 e.g. This. I. Am"
    assert list(split_sentences(text)) == [
        "Mr. J. Knightley laughed.",
        '"Is it you?" she said.',
        '"Go!"',
        "\u4ed6\u6765\u4e86\u3002",
        "\u597d\u3002",
        "e.g. This.",
        "I.",
        "Am",
    ]


def test_a_long_run_of_marks_takes_time_in_proportion_to_its_length():
    # With the square of it, a megabyte of dots would not end today.
    for marks in ("." * 1_000_000, "!?" * 500_000, "a." + "." * 1_000_000 + "b"):
        assert list(split_sentences(marks)) == [marks]
