"""Where documents come from: the embedded corpus, a TFDS dataset, or a folder. One stream of texts for each split."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from maskformer.data.cache import build_once, cache_dir, content_key
from maskformer.data.config import SPLITS, DataConfig, DataError

_READ_AT_ONCE = 256  # TFDS reads records in batches about five times faster than one by one
_LONGEST_DOCUMENT = 1 << 20  # characters; a longer .txt is cut between lines, so that memory stays bounded


class Source(Protocol):
    """The documents of one split.

    `fingerprint` is a hash that changes whenever the documents may have changed.
    """

    fingerprint: str

    def documents(self) -> Iterator[str]:
        """Yields the text of each document, in a fixed order."""
        ...


def open_source(config: DataConfig, split: str) -> Source:
    """The documents of `split` (`train`, `validation` or `test`) that `config` names.

    Raises:
      DataError: no such dataset, folder or split, or a dataset that is not prepared; says how to prepare it.
    """
    name = config.split_name(split)
    if config.name == "austen":
        from maskformer.data.austen import text

        return _Tfds(_prepared_austen(), name, "text", text.fingerprint())
    if config.is_tfds:
        return _open_tfds(config, name)
    if "/" not in config.name and not Path(config.name).exists():
        raise DataError(
            f"data.name={config.name!r}: no such folder, and not 'austen';"
            f" a TFDS dataset is written 'tfds:{config.name}'"
        )
    return Folder(Path(config.name), name, config.text_key)


class _Tfds:
    """A split of a prepared TFDS dataset."""

    def __init__(self, builder: Any, split: str, text_key: str, content: str | None = None):
        name = builder.info.full_name
        available = sorted(builder.info.splits)
        if split.split("[")[0] not in available:
            raise DataError(f"dataset {name!r} has no split {split!r}: it has {', '.join(available)}")
        if text_key not in builder.info.features:
            keys = ", ".join(sorted(builder.info.features))
            raise DataError(f"data.text_key={text_key!r}: the records of {name!r} have {keys}")
        try:
            self._records = builder.as_data_source(split=split)
        except NotImplementedError:
            raise DataError(
                f"dataset {name!r} is prepared as {builder.info.file_format.value}, which has no random access;"
                f" prepare it as array_record: {_prepare_command(name, 'ANOTHER_FOLDER')}"
            ) from None
        except (ValueError, AssertionError) as error:
            raise DataError(f"dataset {name!r}, split {split!r}: {str(error).strip().splitlines()[0]}") from None
        self._text_key = text_key
        # TFDS records the size of every shard when it prepares them; a path alone would miss a new preparation.
        shards = [[s.name, list(s.shard_lengths), s.num_bytes] for s in map(builder.info.splits.get, available)]
        self.fingerprint = content_key(dataset=name, shards=shards, split=split, key=text_key, content=content)

    def documents(self) -> Iterator[str]:
        size = len(self._records)
        for start in range(0, size, _READ_AT_ONCE):
            for record in self._records.__getitems__(range(start, min(start + _READ_AT_ONCE, size))):
                text = record[self._text_key]
                if isinstance(text, bytes):
                    text = text.decode("utf-8", errors="replace")
                if not isinstance(text, str):
                    raise DataError(f"data.text_key={self._text_key!r}: expected text, found {type(text).__name__}")
                yield text


def _prepared_austen() -> Any:
    from maskformer.data.austen import Austen, text

    # The key covers the text and its treatment, so that a new version of the package prepares it anew.
    folder = cache_dir() / "tfds" / text.fingerprint()[:24]

    def build(path: Path) -> None:
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        # It prints a banner about a download, and there is none.
        with contextlib.redirect_stdout(io.StringIO()):
            Austen(data_dir=path, file_format="array_record").download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )

    def is_complete(path: Path) -> bool:
        try:
            info = Austen(data_dir=path, file_format="array_record").info
        except Exception:  # whatever damaged metadata makes TFDS raise
            return False
        return set(info.splits) == set(SPLITS) and all(
            Path(file).stat().st_size > 0 for split in info.splits.values() for file in split.filepaths
        )

    build_once(folder, is_complete, build)
    return Austen(data_dir=folder, file_format="array_record")


def _open_tfds(config: DataConfig, split: str) -> Source:
    import tensorflow_datasets as tfds

    name = config.tfds_name
    try:
        builder = tfds.builder(name, data_dir=config.data_dir)
    except tfds.core.DatasetNotFoundError:
        raise DataError(f"data.name={config.name!r}: TFDS knows no such dataset; see tfds.list_builders()") from None
    except (ValueError, AssertionError) as error:  # an unknown config or version of a known dataset
        raise DataError(f"data.name={config.name!r}: {str(error).strip().splitlines()[0]}") from None
    if not builder.info.splits:
        where = config.data_dir or builder.data_dir_root
        raise DataError(f"dataset {name!r} is not prepared in {where}; prepare it: {_prepare_command(name, where)}")
    return _Tfds(builder, split, config.text_key)


def _prepare_command(name: str, data_dir: Any) -> str:
    return f"python -m maskformer.data.prepare --name=tfds:{name} --data_dir={data_dir}"


class Folder:
    """A split of a folder of `.txt` files (one document each) and `.jsonl` files (one document a line).

    The split called `train` is, in this order: the files below `folder/train/`; the files of `folder` whose name
    is `train` or begins with `train-`, `train_` or `train.`; else, where no file is set apart for any split, all
    documents but those that a hash of their text puts into `validation` and `test` (5% each, so that a document
    that occurs twice is never in two splits).
    """

    def __init__(self, folder: Path, split: str, text_key: str):
        if not folder.is_dir():
            kind = "is not a folder" if folder.exists() else "no such folder"
            raise DataError(f"data.name='{folder}': {kind}; give a folder of .txt or .jsonl files")
        self._folder, self._split, self._text_key = folder, split, text_key
        files = sorted(p for p in folder.rglob("*") if p.suffix in (".txt", ".jsonl") and p.is_file())
        if not files:
            raise DataError(f"data.name='{folder}': the folder holds no .txt or .jsonl file")
        named = {path: self._split_in_name(path) for path in files}
        self._hashed = not any(named.values())
        self._files = files if self._hashed else [p for p in files if named[p] == split]
        if self._hashed and split not in SPLITS:
            raise DataError(
                f"data.name='{folder}': no files for split {split!r};"
                f" put them into {folder / split} or name them {split}-*.jsonl"
            )
        if not self._files:
            others = ", ".join(sorted({name for name in named.values() if name}))
            raise DataError(
                f"data.name='{folder}': files for {others} but none for {split!r}; put some into {folder / split}"
            )
        digest = hashlib.sha256()
        for path in self._files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(folder)} {content}\n".encode())
        self.fingerprint = content_key(files=digest.hexdigest(), split=split, key=text_key, hashed=self._hashed)

    def _split_in_name(self, path: Path) -> str | None:
        first = path.relative_to(self._folder).parts[0]
        for split in {*SPLITS, self._split}:
            if first == split or any(first.startswith(split + mark) for mark in "-_."):
                return split
        return None

    def documents(self) -> Iterator[str]:
        empty = True
        for path in self._files:
            for text in _text_file(path) if path.suffix == ".txt" else self._lines(path):
                if not self._hashed or _hashed_split(text) == self._split:
                    empty = False
                    yield text
        if empty:
            raise DataError(
                f"data.name='{self._folder}': too few documents to draw a {self._split!r} split from;"
                f" put files into {self._folder / self._split}"
            )

    def _lines(self, path: Path) -> Iterator[str]:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: not JSON ({error.msg}); write one JSON object a line") from None
                if not isinstance(record, dict) or self._text_key not in record:
                    found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                    raise DataError(f"{path}:{number}: no key {self._text_key!r}, found {found}; set data.text_key")
                text = record[self._text_key]
                if not isinstance(text, str):
                    raise DataError(f"{path}:{number}: {self._text_key!r} is {type(text).__name__}, expected text")
                # JSON can spell half of a surrogate pair, which is no character.
                yield text.encode("utf-8", errors="replace").decode("utf-8")


def _text_file(path: Path) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if size + len(line) > _LONGEST_DOCUMENT and lines:
                yield "".join(lines)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
    if lines:
        yield "".join(lines)


def _hashed_split(text: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")
