"""Cuts documents into segments and packs segments into rows of a fixed length. Pure: tokens in, rows out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Rows being filled at a time. More of them pack tighter and mix segments from further apart.
OPEN_ROWS = 512


class Segment(NamedTuple):
    """Tokens that attend to each other: `tokens int32 [n]`, `word_starts bool [n]`."""

    tokens: np.ndarray
    word_starts: np.ndarray

    def __len__(self) -> int:  # type: ignore[override]  # the number of tokens, not of fields
        return len(self.tokens)


def split_long(segment: Segment, capacity: int) -> Iterator[Segment]:
    """Cuts a segment into pieces of at most `capacity` tokens, at word starts unless a word alone is longer."""
    start, size = 0, len(segment)
    while size - start > capacity:
        stop = start + capacity
        # The piece may end before `stop` only where a word begins; its first token is no such place.
        words = np.flatnonzero(segment.word_starts[start + 1 : stop + 1])
        if len(words):
            stop = start + 1 + int(words[-1])
        yield Segment(segment.tokens[start:stop], segment.word_starts[start:stop])
        start = stop
    if start < size:
        yield Segment(segment.tokens[start:], segment.word_starts[start:])


def gather(sentences: Iterable[Segment], capacity: int) -> Iterator[Segment]:
    """Joins consecutive sentences of one document into segments of at most `capacity` tokens.

    A sentence that does not fit begins the next segment; one longer than `capacity` is cut.
    """
    held: list[Segment] = []
    room = capacity
    for sentence in sentences:
        for piece in split_long(sentence, capacity):
            if len(piece) > room:
                yield _concatenate(held)
                held, room = [], capacity
            held.append(piece)
            room -= len(piece)
    if held:
        yield _concatenate(held)


def _concatenate(segments: Sequence[Segment]) -> Segment:
    return Segment(np.concatenate([s.tokens for s in segments]), np.concatenate([s.word_starts for s in segments]))


def pack(
    segments: Iterable[Segment], length: int, around: int = 0, open_rows: int = OPEN_ROWS
) -> Iterator[list[Segment]]:
    """Packs segments into rows of at most `length` tokens, none of them cut or left out.

    Best fit over a bounded number of open rows: a segment goes where it leaves the least room; where it fits
    nowhere it opens a row, and past `open_rows` the fullest row is closed. One pass, memory independent of the
    number of segments, and the same segments always give the same rows.

    Args:
      segments: each of 1 to `length - around` tokens.
      length: capacity of a row.
      around: room that every segment takes beside its tokens, for a start and an end token.
      open_rows: rows kept open; 1 or more.

    Yields:
      The segments of each row, in order of arrival.

    >>> segment = lambda n: Segment(np.arange(n), np.ones(n, bool))
    >>> [[len(s) for s in row] for row in pack(map(segment, [5, 3, 7, 2, 1]), length=8)]
    [[5, 3], [7, 1], [2]]
    """
    by_room: list[list[list[Segment]]] = [[] for _ in range(length + 1)]
    # Bit r is set while some open row has room r: the best fit is the lowest set bit at or above the size.
    occupied = 0
    count = 0
    for segment in segments:
        size = len(segment) + around
        if not around < size <= length:
            raise ValueError(f"a segment of {size} tokens cannot go into rows of {length}; cut it with split_long")
        fitting = occupied >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop(0)
            if not by_room[room]:
                occupied &= ~(1 << room)
            count -= 1
        else:
            room, row = length, []
        row.append(segment)
        room -= size
        if room == 0:
            yield row
            continue
        by_room[room].append(row)
        occupied |= 1 << room
        count += 1
        if count > open_rows:
            fullest = (occupied & -occupied).bit_length() - 1
            yield by_room[fullest].pop(0)
            if not by_room[fullest]:
                occupied &= ~(1 << fullest)
            count -= 1
    for rows in by_room:
        yield from rows
