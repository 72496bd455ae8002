"""Packed rows on disk: memory-mapped arrays, written once in order and read at random."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from maskformer.data.packing import Segment
from maskformer.data.seal import seal
from maskformer.data.shuffle import permuted

_META = "meta.json"
_WRITE_AT_ONCE = 1024  # rows
PADDING_EXAMPLE = -1
_CHOICE_SEED = 0  # not a run's seed: runs that differ in it are to train on the same rows


def write_rows(
    folder: Path,
    rows: Iterable[list[Segment]],
    length: int,
    vocabulary_size: int,
    pad: int,
    start: int | None,
    end: int | None,
) -> None:
    """Writes packed rows to `folder`, which does not exist yet, and seals it.

    Args:
      folder: where to.
      rows: segments of each row, without start and end tokens.
      length: tokens in a row.
      vocabulary_size: decides the width of the stored ids.
      pad: id after the last segment.
      start, end: ids around every segment; None is no token.
    """
    folder.mkdir()
    token_type = np.dtype("<u2" if vocabulary_size <= 1 << 16 else "<u4")
    around = (start is not None) + (end is not None)
    counts = {"rows": 0, "segments": 0, "tokens": 0, "text_tokens": 0, "words": 0}
    with (
        open(folder / "tokens.bin", "wb") as tokens_file,
        open(folder / "segments.bin", "wb") as segments_file,
        open(folder / "words.bin", "wb") as words_file,
    ):
        tokens = np.full((_WRITE_AT_ONCE, length), pad, token_type)
        segments = np.zeros((_WRITE_AT_ONCE, length), "<u2")
        words = np.zeros((_WRITE_AT_ONCE, length), bool)
        filled = 0

        def flush() -> None:
            tokens_file.write(tokens[:filled].tobytes())
            segments_file.write(segments[:filled].tobytes())
            words_file.write(np.packbits(words[:filled], axis=1).tobytes())
            tokens[:], segments[:], words[:] = pad, 0, False

        for row in rows:
            position = 0
            for number, segment in enumerate(row, start=1):
                begin = position
                if start is not None:
                    tokens[filled, position] = start
                    position += 1
                stop = position + len(segment)
                tokens[filled, position:stop] = segment.tokens
                words[filled, position:stop] = segment.word_starts
                if end is not None:
                    tokens[filled, stop] = end
                    stop += 1
                segments[filled, begin:stop] = number
                position = stop
                counts["text_tokens"] += len(segment)
                counts["words"] += int(segment.word_starts.sum())
            counts["rows"] += 1
            counts["segments"] += len(row)
            counts["tokens"] += sum(map(len, row)) + around * len(row)
            filled += 1
            if filled == _WRITE_AT_ONCE:
                flush()
                filled = 0
        flush()
    (folder / _META).write_text(json.dumps({"length": length, "token_type": token_type.str, **counts}))
    seal(folder)


def batch_layout(rows: int, length: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array of a batch of `rows` rows of `length` tokens, as `PackedRows.read` gives them.

    >>> batch_layout(8, 128)["tokens"]
    ((8, 128), dtype('int32'))
    """
    words, numbers = np.dtype(bool), np.dtype(np.int32)
    per_token = {"tokens": numbers, "segment_ids": numbers, "positions": numbers, "word_starts": words}
    return {
        **{name: ((rows, length), dtype) for name, dtype in per_token.items()},
        **dict.fromkeys(("example_id", "epoch"), ((rows,), numbers)),
    }


class PackedRows:
    """Random access to the rows of a folder that `write_rows` made.

    Attributes:
      length: tokens in a row.
      segments, tokens, text_tokens, words: totals; `tokens` counts start and end tokens, `text_tokens` does not.
    """

    def __init__(self, folder: Path, pad: int):
        meta = json.loads((folder / _META).read_text())
        self.length: int = meta["length"]
        self.segments: int = meta["segments"]
        self.tokens: int = meta["tokens"]
        self.text_tokens: int = meta["text_tokens"]
        self.words: int = meta["words"]
        self._size: int = meta["rows"]
        self._pad = pad
        width = -(-self.length // 8)
        self._tokens = _mapped(folder / "tokens.bin", np.dtype(meta["token_type"]), (self._size, self.length))
        self._segments = _mapped(folder / "segments.bin", np.dtype("<u2"), (self._size, self.length))
        self._words = _mapped(folder / "words.bin", np.dtype("u1"), (self._size, width))

    def __len__(self) -> int:
        return self._size

    def read(self, rows: np.ndarray, epoch: np.ndarray | int = 0) -> dict[str, np.ndarray]:
        """A batch of the given rows.

        Args:
          rows: int64 [B]; `PADDING_EXAMPLE` (-1) gives a row of padding: segment 0 everywhere.
          epoch: int64 [B] or one for all.

        Returns:
          `tokens int32 [B, L]`, `segment_ids int32 [B, L]` (0 is padding), `positions int32 [B, L]` (from 0 in
          every segment), `word_starts bool [B, L]`, `example_id int32 [B]` (the row), `epoch int32 [B]`.
        """
        real = rows != PADDING_EXAMPLE
        shape = (len(rows), self.length)
        tokens = np.full(shape, self._pad, np.int32)
        segment_ids = np.zeros(shape, np.int32)
        word_starts = np.zeros(shape, bool)
        tokens[real] = self._tokens[rows[real]]
        segment_ids[real] = self._segments[rows[real]]
        word_starts[real] = np.unpackbits(self._words[rows[real]], axis=1, count=self.length).astype(bool)
        return {
            "tokens": tokens,
            "segment_ids": segment_ids,
            "positions": _positions(segment_ids),
            "word_starts": word_starts,
            "example_id": rows.astype(np.int32),
            "epoch": np.broadcast_to(np.asarray(epoch, np.int32), len(rows)).copy(),
        }


class ChosenRows:
    """Some rows of a folder under numbers of their own, `0 .. len - 1`: a small corpus cut from a large one.

    Attributes:
      length, segments, tokens, text_tokens, words: as of `PackedRows`, of the chosen rows.
    """

    def __init__(self, rows: PackedRows, chosen: np.ndarray):
        self._rows, self._chosen = rows, chosen
        self.length = rows.length
        self.tokens = self.segments = self.words = 0
        for part in np.array_split(chosen, -(-len(chosen) // _WRITE_AT_ONCE)):
            batch = rows.read(part)
            self.tokens += int((batch["segment_ids"] > 0).sum())
            self.segments += int(batch["segment_ids"].max(axis=1).sum())
            self.words += int(batch["word_starts"].sum())
        # Every segment of a folder has the same tokens around it.
        around = (rows.tokens - rows.text_tokens) // max(rows.segments, 1)
        self.text_tokens = self.tokens - around * self.segments

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, rows: np.ndarray, epoch: np.ndarray | int = 0) -> dict[str, np.ndarray]:
        """As `PackedRows.read`; `example_id` is the number among the chosen."""
        real = rows != PADDING_EXAMPLE
        batch = self._rows.read(np.where(real, self._chosen[rows], PADDING_EXAMPLE), epoch)
        return {**batch, "example_id": rows.astype(np.int32)}


def choose_rows(rows: PackedRows, count: int) -> ChosenRows:
    """`count` rows drawn without replacement, always the same ones; fewer are the first of more."""
    order = permuted(np.arange(count), len(rows), _CHOICE_SEED, np.zeros(count, np.int64))
    return ChosenRows(rows, order)


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, int]) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r", shape=shape) if shape[0] else np.zeros(shape, dtype)


def _positions(segment_ids: np.ndarray) -> np.ndarray:
    index = np.arange(segment_ids.shape[1], dtype=np.int32)[None, :]
    begins = np.ones(segment_ids.shape, bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return np.where(segment_ids > 0, index - start, 0).astype(np.int32)
