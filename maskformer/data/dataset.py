"""A split as packed rows, and the two ways to go through it: an endless training stream, one pass of evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import grain
import numpy as np

from maskformer.checks import shown
from maskformer.data import packing
from maskformer.data.cache import build_once, cache_dir, content_key
from maskformer.data.data_config import DataConfig, DataError
from maskformer.data.packing import Segment
from maskformer.data.rows import PADDING_EXAMPLE, ChosenRows, PackedRows, choose_rows, write_rows
from maskformer.data.seal import is_sealed
from maskformer.data.sentences import split_sentences
from maskformer.data.shuffle import permuted
from maskformer.data.sources import open_source
from maskformer.data.tokenizer import Tokenizer
from maskformer.objectives.vocabulary import Vocabulary

# Raise it when encoding, cutting or packing changes, so that rows made before are not taken for current.
_VERSION = 2
_ENCODE_CHARACTERS = 1 << 20  # encoded at a time: enough to keep the tokenizer's threads busy
_ENDLESS = 1 << 62

Batch = dict[str, np.ndarray]


def load_dataset(config: DataConfig, split: str, tokenizer: Tokenizer) -> PackedDataset:
    """The packed rows of a split, built on first use and read from the cache after that.

    Args:
      config: what to read and how to cut it.
      split: `train`, `validation` or `test`.
      tokenizer: `load_tokenizer(config)`.

    Raises:
      DataError: the data cannot be read, is empty, or `start_token` / `end_token` are not in the vocabulary.
    """
    vocabulary = tokenizer.vocabulary
    start, end = (_around(config, tokenizer, name) for name in ("start_token", "end_token"))
    # Padding is told from text by its segment id, so any id will do for a tokenizer that has none for it.
    pad = vocabulary.pad if vocabulary.pad is not None else 0
    source = open_source(config, split)
    key = content_key(
        version=_VERSION,
        corpus=source.fingerprint,
        tokenizer=tokenizer.fingerprint,
        length=config.length,
        segment_by=config.segment_by,
        pack=config.pack,
        around=[pad, start, end],
        open_rows=packing.OPEN_ROWS,
    )

    def build(path) -> None:
        rows = pack_documents(source.documents(), tokenizer, config)
        write_rows(path, rows, config.length, vocabulary.size, pad, start, end)

    folder = build_once(cache_dir() / "rows" / key, is_sealed, build)
    whole = PackedRows(folder, pad)
    if not len(whole):
        raise DataError(f"data.name={config.name!r}: the {split} split holds no text")
    rows: PackedRows | ChosenRows = whole
    if split == "train" and config.max_rows is not None and config.max_rows < len(whole):
        # The cache holds the whole split; only what is read from it differs.
        rows = choose_rows(whole, config.max_rows)
        key = content_key(rows=key, max_rows=config.max_rows)
    return PackedDataset(rows, vocabulary, config, split, key)


def _around(config: DataConfig, tokenizer: Tokenizer, field: str) -> int | None:
    name = getattr(config, field)
    if name is None:
        return None
    try:
        return tokenizer.token_id(name)
    except DataError as error:
        raise DataError(f"data.{field}={name!r}: {error}; use one of them or None") from None


def pack_documents(documents: Iterable[str], tokenizer: Tokenizer, config: DataConfig) -> Iterator[list[Segment]]:
    """Cuts, encodes and packs documents; the room for start and end tokens is left free.

    Yields:
      The segments of each row.
    """
    around = (config.start_token is not None) + (config.end_token is not None)
    segments = _segments(documents, tokenizer, config.segment_by, config.length - around)
    if not config.pack:
        return ([segment] for segment in segments)
    return packing.pack(segments, config.length, around)


def _segments(documents: Iterable[str], tokenizer: Tokenizer, segment_by: str, capacity: int) -> Iterator[Segment]:
    for pieces in _encoded(documents, tokenizer, whole=segment_by == "document"):
        if segment_by == "chunk":
            yield from packing.gather(pieces, capacity)
        else:
            for piece in pieces:
                yield from packing.split_long(piece, capacity)


def _encoded(documents: Iterable[str], tokenizer: Tokenizer, whole: bool) -> Iterator[list[Segment]]:
    """The encoded pieces of each document: itself, or its sentences. Encodes many documents at a time."""
    texts: list[str] = []
    counts: list[int] = []
    size = 0

    def encode() -> Iterator[list[Segment]]:
        encoded = iter(tokenizer.encode_texts(texts))
        for count in counts:
            pieces = [Segment(*next(encoded)) for _ in range(count)]
            yield [piece for piece in pieces if len(piece)]

    for document in documents:
        pieces = [document] if whole else list(split_sentences(document))
        texts += pieces
        counts.append(len(pieces))
        size += len(document)
        if size >= _ENCODE_CHARACTERS:
            yield from encode()
            texts, counts, size = [], [], 0
    yield from encode()


class PackedDataset:
    """The packed rows of one split.

    Attributes:
      vocabulary: special ids, for the objectives.
      config: what it was made from.
      split: `train`, `validation` or `test`.
      fingerprint: changes whenever the rows do.
      rows: random access to the rows.
    """

    def __init__(
        self,
        rows: PackedRows | ChosenRows,
        vocabulary: Vocabulary,
        config: DataConfig,
        split: str,
        fingerprint: str,
    ):
        self.rows, self.vocabulary, self.config, self.split = rows, vocabulary, config, split
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        """Number of rows; a row is an example."""
        return len(self.rows)

    @property
    def fill(self) -> float:
        """Part of all positions that is not padding."""
        return self.rows.tokens / (len(self) * self.rows.length)

    @property
    def tokens_per_epoch(self) -> int:
        """Positions that are not padding; start and end tokens count."""
        return self.rows.tokens

    def train_batches(
        self,
        global_batch_size: int,
        seed: int,
        rows: np.ndarray | None = None,
        start_example: int = 0,
    ) -> TrainBatches:
        """The endless training stream, shuffled anew every epoch, from global example `start_example` on.

        Example `g` of the stream is a pure function of `(seed, g)`, so batches do not depend on the number of
        processes, and a resumed run may use another. An epoch's last examples share a batch with the first of the
        next epoch: none is dropped.

        Args:
          global_batch_size: rows in a batch over all processes.
          seed: of the order.
          rows: which rows of every global batch this process gets, ascending; None for all. Any will do: which
            devices a process holds, and so which rows it needs, depends on the wiring of a pod.
          start_example: where to resume; `get_state()["next_example"]` of an iterator before.
        """
        return TrainBatches(self, global_batch_size, seed, rows, start_example)

    def eval_batches(
        self,
        global_batch_size: int,
        rows: np.ndarray | None = None,
        max_batches: int | None = None,
    ) -> Iterator[Batch]:
        """One pass in order: every row once over all processes, all batches of full size, the same number everywhere.

        The last batch is filled up with empty rows: `segment_ids` 0 everywhere, `example_id` -1.

        Args:
          global_batch_size, rows: as in `train_batches`.
          max_batches: stop after so many; None goes to the end.
        """
        part = _rows(global_batch_size, rows)
        if max_batches is not None and max_batches < 1:
            raise DataError(f"max_batches={max_batches}: expected at least 1, or None for all")
        batches = -(-len(self) // global_batch_size)
        source = _EvalSource(self.rows, global_batch_size, part, min(batches, max_batches or batches))
        return iter(self._read_ahead(source))

    def _read_ahead(self, source: Any) -> grain.IterDataset:
        options = grain.ReadOptions(num_threads=self.config.reader_threads, prefetch_buffer_size=self.config.prefetch)
        return grain.MapDataset.source(source).to_iter_dataset(options)


class TrainBatches:
    """Iterator over the training batches of one process; its state is one integer, the next global example."""

    def __init__(
        self,
        dataset: PackedDataset,
        global_batch_size: int,
        seed: int,
        rows: np.ndarray | None,
        start_example: int,
    ):
        self._part = _rows(global_batch_size, rows)
        if not isinstance(seed, int) or not 0 <= seed < 1 << 63:
            raise DataError(f"seed={seed!r}: expected an integer from 0 to 2**63 - 1")
        self._dataset, self._global_batch_size, self._seed = dataset, global_batch_size, seed
        self.set_state({"next_example": start_example})

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._next_example += self._global_batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        """`{"next_example": g}`: the first example of the next global batch. The same on all processes."""
        return {"next_example": self._next_example}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a state that `get_state` returned, here or in a run with other processes or batch sizes."""
        start = state.get("next_example")
        if not isinstance(start, int) or not 0 <= start < _ENDLESS:
            raise DataError(f"iterator state {state!r}: expected {{'next_example': an integer from 0}}")
        self._next_example = start
        source = _TrainSource(self._dataset.rows, self._seed, start, self._global_batch_size, self._part)
        self._batches = iter(self._dataset._read_ahead(source))


class _TrainSource:
    """Random access to the batches of the training stream: number `k` begins at example `start + k * global size`."""

    def __init__(self, rows: PackedRows | ChosenRows, seed: int, start: int, global_batch_size: int, part: np.ndarray):
        self._rows, self._seed, self._start = rows, seed, start
        self._global_batch_size, self._part = global_batch_size, part

    def __len__(self) -> int:
        return (_ENDLESS - self._start) // self._global_batch_size

    def __getitem__(self, number: int) -> Batch:
        first = self._start + int(number) * self._global_batch_size
        example = first + self._part
        epoch, index = np.divmod(example, len(self._rows))
        return self._rows.read(permuted(index, len(self._rows), self._seed, epoch), epoch)

    def __repr__(self) -> str:
        return f"_TrainSource(seed={self._seed}, start={self._start}, part={self._part})"


class _EvalSource:
    """Random access to the batches of one ordered pass."""

    def __init__(self, rows: PackedRows | ChosenRows, global_batch_size: int, part: np.ndarray, batches: int):
        self._rows, self._global_batch_size, self._part, self._batches = rows, global_batch_size, part, batches

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, number: int) -> Batch:
        first = int(number) * self._global_batch_size
        row = first + self._part
        return self._rows.read(np.where(row < len(self._rows), row, PADDING_EXAMPLE))

    def __repr__(self) -> str:
        return f"_EvalSource(part={self._part}, batches={self._batches})"


def _rows(global_batch_size: int, rows: np.ndarray | None) -> np.ndarray:
    """Offsets into a global batch, int64 and ascending."""
    if global_batch_size < 1:
        raise DataError(f"global_batch_size={global_batch_size}: expected at least 1 row")
    if rows is None:
        return np.arange(global_batch_size, dtype=np.int64)
    rows = np.asarray(rows, np.int64)
    if rows.ndim != 1 or not len(rows) or rows[0] < 0 or rows[-1] >= global_batch_size or (np.diff(rows) <= 0).any():
        raise DataError(
            f"rows={shown(rows.tolist())}: expected ascending rows of a batch of {global_batch_size}, each once"
        )
    return rows
