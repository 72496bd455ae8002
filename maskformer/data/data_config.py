"""What to read, how to cut it into tokens, and how to pack the tokens into rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from maskformer.checks import nearest, shown
from maskformer.textfiles import DataError, suffix

SEGMENT_BY = ("sentence", "chunk", "document")
TRAINED_TOKENIZERS = ("wordpiece", "bpe", "unigram")
SPLITS = ("train", "validation", "test")
# Segments of a row are counted in 16 bits.
LONGEST_ROW = 65_535


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, its tokenizer, and the shape of the packed rows.

    Args:
      name: `austen` (embedded in the package), `tfds:<name>` (any TFDS dataset, such as `tfds:lm1b` or
        `tfds:wikipedia/20230601.en`), or a folder of `.txt` / `.jsonl` files, here or in a
        bucket (`gs://bucket/text`).
      data_dir: where TFDS datasets are prepared; None is TFDS's own default. Only with `tfds:`.
      text_key: the field of a TFDS record or of a `.jsonl` line that holds the text.
      train_split, validation_split, test_split: what the three splits are called in the dataset. For `tfds:` they
        may be slices (`train[:99%]`). For a folder, see `sources.Folder`.
      tokenizer: `wordpiece`, `bpe` (byte-level) or `unigram` to train one on the train split, or the path of a
        `tokenizer.json` or `vocab.txt`.
      vocabulary_size: ids of a trained tokenizer, special tokens included; None is 8192.
      lowercase: fold case and accents (BERT "uncased"). None is True for a trained `wordpiece` and for
        `vocab.txt`, False for `bpe` and `unigram`; a `tokenizer.json` brings its own and takes None only.
      sentinels: number of `<extra_id_i>` tokens of a trained tokenizer, which stand for removed spans.
      length: tokens in a row, start and end tokens and padding included.
      segment_by: `sentence`: each is a segment. `chunk`: whole sentences of one document are gathered up to the
        row length. `document`: a document is one segment. A segment longer than a row is cut into several.
      pack: several segments share a row. False gives each segment a row of its own.
      start_token, end_token: around every segment; None is no token. Their names in the vocabulary.
      max_rows: train on at most so many rows of the train split, again and again; None is all. They are drawn once,
        whatever the run's seed, and a smaller choice is part of a larger one. The tokenizer still learns from all.
      reader_threads: threads that assemble batches ahead of the training loop.
      prefetch: batches kept ready.

    Raises:
      DataError: a field has a value that cannot work.

    >>> DataConfig(length=64, segment_by="sentence").vocabulary_size is None
    True
    >>> DataConfig(text_key="")
    Traceback (most recent call last):
    maskformer.textfiles.DataError: data.text_key='': expected a name
    """

    name: str = "austen"
    data_dir: str | None = None
    text_key: str = "text"
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    tokenizer: str = "wordpiece"
    vocabulary_size: int | None = None
    lowercase: bool | None = None
    sentinels: int = 0
    length: int = 128
    segment_by: str = "document"
    pack: bool = True
    start_token: str | None = "[CLS]"
    end_token: str | None = "[SEP]"
    max_rows: int | None = None
    reader_threads: int = 2
    prefetch: int = 8

    def __post_init__(self):
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), str(field.type))
        if not self.name or self.name == "tfds:":
            raise DataError(f"data.name={shown(self.name)}: expected 'austen', 'tfds:<name>' or a folder")
        if self.data_dir is not None and not self.is_tfds:
            raise DataError(
                f"data.data_dir={shown(self.data_dir)}: only 'tfds:' datasets have one,"
                f" not {shown(self.name)}; use None"
            )
        if self.segment_by not in SEGMENT_BY:
            raise DataError(
                f"data.segment_by={shown(self.segment_by)}: expected one of {', '.join(SEGMENT_BY)}"
                + nearest(self.segment_by, SEGMENT_BY)
            )
        around = (self.start_token is not None) + (self.end_token is not None)
        if not around < self.length <= LONGEST_ROW:
            raise DataError(
                f"data.length={self.length}: expected {around + 1} to {LONGEST_ROW} tokens"
                f" ({around} of them are the start and end tokens)"
            )
        for name in ("start_token", "end_token"):
            if getattr(self, name) == "":
                raise DataError(f"data.{name}='': name a token, or use None for no token")
        for name, least in (("sentinels", 0), ("reader_threads", 1), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise DataError(f"data.{name}={shown(getattr(self, name))}: expected at least {least}")
        if self.max_rows is not None and self.max_rows < 1:
            raise DataError(f"data.max_rows={shown(self.max_rows)}: expected at least 1, or None for all")
        for name in ("text_key", "train_split", "validation_split", "test_split"):
            if not getattr(self, name):
                raise DataError(f"data.{name}='': expected a name")
        self._check_tokenizer()

    def _check_tokenizer(self):
        if self.trains_tokenizer:
            least = 5 + self.sentinels + (256 if self.tokenizer == "bpe" else 1)
            if self.vocabulary_size is not None and self.vocabulary_size < least:
                raise DataError(
                    f"data.vocabulary_size={self.vocabulary_size}: expected at least {least} for {self.tokenizer}"
                )
            return
        if suffix(Path(self.tokenizer)) not in (".json", ".txt"):
            raise DataError(
                f"data.tokenizer={shown(self.tokenizer)}: expected {', '.join(TRAINED_TOKENIZERS)}, or the path of a"
                " tokenizer.json or vocab.txt" + nearest(self.tokenizer, TRAINED_TOKENIZERS)
            )
        if self.vocabulary_size is not None:
            raise DataError(
                f"data.vocabulary_size={self.vocabulary_size}: {self.tokenizer} fixes it; use None or train one"
            )
        if self.sentinels:
            raise DataError(f"data.sentinels={self.sentinels}: {self.tokenizer} fixes them; use 0 or train one")
        if self.tokenizer.endswith(".json") and self.lowercase is not None:
            raise DataError(f"data.lowercase={self.lowercase}: {self.tokenizer} has its own normalizer; use None")

    @property
    def is_tfds(self) -> bool:
        """Whether `name` is a TFDS dataset that is not embedded here."""
        return self.name.startswith("tfds:")

    @property
    def tfds_name(self) -> str:
        """`name` as TFDS knows it."""
        return self.name.removeprefix("tfds:")

    @property
    def trains_tokenizer(self) -> bool:
        """Whether the tokenizer is trained on the train split, instead of read from a file."""
        return self.tokenizer in TRAINED_TOKENIZERS

    def split_name(self, split: str) -> str:
        """The dataset's own name of `split`, which is `train`, `validation` or `test`."""
        if split not in SPLITS:
            raise DataError(f"split {shown(split)}: expected one of {', '.join(SPLITS)}" + nearest(split, SPLITS))
        return getattr(self, f"{split}_split")


_TYPES = {"str": str, "int": int, "bool": bool, "None": type(None)}


def _check_type(name: str, value: Any, annotation: str) -> None:
    allowed = tuple(_TYPES[part] for part in re.split(r"\s*\|\s*", annotation))
    # bool is an int to Python, and `length=True` is a mistake.
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        hint = "; write str(path)" if isinstance(value, Path) else ""
        expected = annotation.replace("|", "or")
        raise DataError(f"data.{name}={shown(value)}: expected {expected}, got {type(value).__name__}{hint}")
