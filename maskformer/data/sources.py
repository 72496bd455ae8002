"""Where documents come from: the embedded corpus, a TFDS dataset, or a folder. One stream of texts for each split."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from maskformer import paths
from maskformer.checks import first_line, nearest, shown
from maskformer.data.cache import build_once, cache_dir, content_key
from maskformer.data.data_config import DataConfig
from maskformer.data.folder import Folder, say_once
from maskformer.data.seal import is_sealed, seal
from maskformer.paths import why_no_folder
from maskformer.textfiles import DataError, is_text

_READ_AT_ONCE = 256  # TFDS reads records in batches about five times faster than one by one


class Source(Protocol):
    """The documents of one split.

    `fingerprint` is a hash that changes whenever the documents may have changed.
    """

    fingerprint: str

    def documents(self) -> Iterator[str]:
        """Yields the text of each document, in a fixed order."""
        ...

    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents as they are stored: before newlines are translated, without byte order marks."""
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
            f"data.name={shown(config.name)}: no such folder, and not 'austen';"
            f" a TFDS dataset is written {shown('tfds:' + config.name)}"
        )
    if (why := why_no_folder(config.name)) is not None:
        raise DataError(f"data.name={shown(config.name)}: {why}")
    return Folder(paths.given(config.name), name, config.text_key)


class _Tfds:
    """A split of a prepared TFDS dataset."""

    def __init__(self, builder: Any, split: str, text_key: str, content: str | None = None):
        name = builder.info.full_name
        available = sorted(builder.info.splits)
        # TFDS's own grammar: parts joined by +, each a split with or without a slice.
        for part in split.split("+"):
            if (called := part.split("[")[0]) not in (*available, "all"):
                raise DataError(
                    f"dataset {name!r} has no split {shown(called)}"
                    + (f" (in {shown(split)})" if called != split else "")
                    + f": it has {', '.join(available)}{nearest(called, available)}"
                )
        if text_key not in builder.info.features:
            keys = ", ".join(sorted(builder.info.features))
            raise DataError(f"data.text_key={shown(text_key)}: the records of {name!r} have {keys}")
        try:
            self._records = builder.as_data_source(split=split)
        except NotImplementedError:
            raise DataError(
                f"dataset {name!r} is prepared as {builder.info.file_format.value}, which has no random access;"
                f" prepare it as array_record: {_prepare_command(name, 'ANOTHER_FOLDER')}"
            ) from None
        except Exception as error:  # slices that hold nothing, damaged files: TFDS and array_record raise many kinds
            raise DataError(f"dataset {name!r}, split {shown(split)}: {first_line(error)}") from None
        self._name, self._text_key = name, text_key
        # TFDS records the size of every shard when it prepares them; a path alone would miss a new preparation.
        shards = [[s.name, list(s.shard_lengths), s.num_bytes] for s in map(builder.info.splits.get, available)]
        self.fingerprint = content_key(dataset=name, shards=shards, split=split, key=text_key, content=content)

    def documents(self) -> Iterator[str]:
        """See `Source`."""
        damaged = 0
        for number, text in enumerate(self._texts()):
            if isinstance(text, bytes):
                try:
                    text = text.decode()
                except UnicodeDecodeError:
                    damaged += 1
                    text = text.decode(errors="replace")
            if not isinstance(text, str):
                raise DataError(
                    f"data.text_key={shown(self._text_key)}: record {number} of {self._name!r} has"
                    f" {type(text).__name__} there, expected text;"
                    " set data.text_key, or prepare it again if it is damaged"
                )
            yield text
        if damaged:
            say_once(f"dataset {self._name!r}: {damaged:,} records are not UTF-8; what cannot be read is U+FFFD")

    def text_bytes(self) -> int:
        """See `Source`."""
        return sum(len(text if isinstance(text, bytes) else text.encode()) for text in self._texts())

    def _texts(self) -> Iterator[Any]:
        size = len(self._records)
        for start in range(0, size, _READ_AT_ONCE):
            stop = min(start + _READ_AT_ONCE, size)
            try:
                texts = [record[self._text_key] for record in self._records.__getitems__(range(start, stop))]
            except Exception as error:  # array_record's own
                raise DataError(
                    f"dataset {self._name!r}, records {start} to {stop - 1}: {first_line(error)};"
                    " a file of it is damaged or missing: prepare it again"
                ) from None
            yield from texts


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
        seal(path)

    def needs() -> int:
        return sum(len(chapter.text.encode()) for book in text.BOOKS for chapter in text.chapters(book))

    build_once(folder, is_sealed, build, needs)
    return Austen(data_dir=folder, file_format="array_record")


def tfds_builder(config: DataConfig, **options: Any) -> Any:
    """TFDS's builder of the dataset that `config` names.

    Raises:
      DataError: TFDS has no such dataset, or none of that version or configuration.
    """
    import tensorflow_datasets as tfds

    if not paths.is_local(config.data_dir or ""):
        raise DataError(
            f"data.data_dir={shown(config.data_dir)}: TFDS's array_record files are read at random, which buckets are"
            " too slow for; copy them to a local or mounted folder, or give a folder of .jsonl files as data.name"
        )
    if not is_text(config.data_dir or ""):
        raise DataError(f"data.data_dir={shown(config.data_dir)}: TFDS needs a name in UTF-8; rename the folder")
    try:
        builder = tfds.builder(config.tfds_name, data_dir=config.data_dir, **options)
        if builder.info.splits and builder.info.features is None:
            raise ValueError("features.json is missing; prepare it again")
        return builder
    except tfds.core.DatasetNotFoundError:
        raise DataError(f"data.name={shown(config.name)}: {_not_found(config)}") from None
    except Exception as error:  # an unknown configuration or version, damaged files: TFDS raises many kinds
        # TFDS begins with the call and ends with a list that its first line only announces.
        reason = first_line(error).split('}": ')[-1].split(". Here are")[0]
        if not isinstance(error, (ValueError, AssertionError, ImportError)):
            reason += "; a file of it is damaged or missing: prepare it again"
        raise DataError(f"data.name={shown(config.name)}: {reason}") from None


def _not_found(config: DataConfig) -> str:
    """TFDS says "not found" of a dataset that it has, too, where the version or configuration is another."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    base = re.split("[/:]", config.tfds_name)[0]
    root = Path(config.data_dir or tfds.core.constants.DATA_DIR).expanduser()
    found = (root / base).rglob("dataset_info.json") if base.isidentifier() else ()
    versions = sorted(path.parent.relative_to(root) for path in found)
    if versions:
        names = ", ".join(f"tfds:{path.parent}:{path.name}" for path in versions)
        return f"no such version or configuration; prepared in {root}: {names}"
    if base in known:
        return f"TFDS has {base!r}, but not as {config.tfds_name!r}; write tfds:{base}, /configuration, :1.2.3 after it"
    return f"TFDS knows no such dataset; see tfds.list_builders(){nearest(base, known, cutoff=0.8)}"


def _open_tfds(config: DataConfig, split: str) -> Source:
    name = config.tfds_name
    builder = tfds_builder(config)
    if not builder.info.splits:
        where = config.data_dir or builder.data_dir_root
        raise DataError(f"dataset {name!r} is not prepared in {where}; prepare it: {_prepare_command(name, where)}")
    return _Tfds(builder, split, config.text_key)


def _prepare_command(name: str, data_dir: Any) -> str:
    return f"python -m maskformer.data.prepare --name=tfds:{name} --data_dir={data_dir}"
