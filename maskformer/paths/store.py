"""`StorePath`: the address of a file or a folder in a bucket, with the methods of a path."""

from __future__ import annotations

import errno
import functools
import io
import logging
import os
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from maskformer.paths.address import OBJECT_STORES
from maskformer.paths.errors import reported

# Where TensorFlow is installed, Orbax's paths would speak with a store through it, under other credentials and errors.
# Looked at once, at the first path of whatever kind.
os.environ.setdefault("EPATH_USE_TF", "false")


class StorePath(epath.Path):
    """An address such as `gs://bucket/run`, with the methods of a path.

    Raises:
      OSError: from every method that asks the store. `FileNotFoundError`, `FileExistsError` and `PermissionError` mean
        what they mean elsewhere; a `StoreError` is anything else, after the client's own retries.
    """

    def __str__(self) -> str:
        # The parts of a path have lost one of the two slashes.
        head, _, rest = super().__str__().partition(":/")
        return f"{head}://{rest}" if rest and "/" not in head else super().__str__()

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> Any:
        return type(self), (str(self),)

    def as_posix(self) -> str:
        return str(self)

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> StorePath:
        return self

    def resolve(self, strict: bool = False) -> StorePath:
        return self

    def expanduser(self) -> StorePath:
        return self

    @property
    def scheme(self) -> str:
        return str(self).partition(":")[0].lower()

    @property
    def bucket(self) -> str:
        """The bucket as it is named in messages, `gs://bucket`."""
        return "/".join(str(self).split("/")[:3])

    @property
    def key(self) -> str:
        """The name within the bucket."""
        return str(self)[len(self.bucket) + 1 :]

    @property
    def files(self) -> Any:
        """The client, an fsspec file system; what it raises is to be `reported`."""
        return filesystem(self.scheme)

    def exists(self) -> bool:
        with reported(self):
            return self.files.exists(str(self))

    def is_dir(self) -> bool:
        with reported(self):
            return self.files.isdir(str(self))

    def is_file(self) -> bool:
        with reported(self):
            return self.files.isfile(str(self))

    def iterdir(self) -> Iterator[StorePath]:
        with reported(self):
            found = self.files.ls(str(self), detail=False)
        # An object called like the folder itself, with a slash at its end, stands for the folder in some stores.
        names = {name.rstrip("/").rpartition("/")[2] for name in found if name.strip("/") != self.name_in_store}
        yield from (self / name for name in sorted(names))

    def glob(self, pattern: str) -> Iterator[StorePath]:
        with reported(self):
            found = self.files.glob(f"{self}/{pattern}")
        yield from sorted(type(self)(self.files.unstrip_protocol(name)) for name in found)

    def open(self, mode: str = "r", encoding: str | None = None, errors: str | None = None, **kwargs: Any) -> IO[Any]:
        """As `open`, without appending, which some clients take for overwriting.

        Raises:
          ValueError: a mode other than reading and writing.
        """
        if mode.replace("b", "").replace("t", "") not in ("r", "w"):
            raise ValueError(f"{self}: mode={mode!r}: expected one of r, rb, w, wb; an object is written whole")
        with reported(self):
            file = self.files.open(str(self), mode.replace("b", "").replace("t", "") + "b")
        if "b" in mode:
            return file
        return io.TextIOWrapper(file, encoding=encoding or "utf-8", errors=errors, **kwargs)

    def read_bytes(self) -> bytes:
        with reported(self):
            return self.files.cat_file(str(self))

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        with reported(self):
            if self.scheme not in OBJECT_STORES:
                self.files.makedirs(str(self.parent), exist_ok=True)
            self.files.pipe_file(str(self), bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        if not self.exists():
            self.write_bytes(b"")
        elif not exist_ok:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing in an object store, where a folder begins to be with what is in it."""
        if self.scheme not in OBJECT_STORES:
            with reported(self):
                self.files.makedirs(str(self), exist_ok=exist_ok)

    def unlink(self, missing_ok: bool = False) -> None:
        with reported(self):
            try:
                self.files.rm_file(str(self))
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def rmtree(self, missing_ok: bool = False) -> None:
        with reported(self):
            try:
                self.files.rm(str(self), recursive=True)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def rename(self, target: str | os.PathLike[str]) -> StorePath:
        """Copies, within the store, and deletes: not at one moment, as in a file system."""
        with reported(self):
            self.files.mv(str(self), os.fspath(target), recursive=True)
        return type(self)(os.fspath(target))

    @property
    def name_in_store(self) -> str:
        """The name that listings of the client begin with."""
        return self.files._strip_protocol(str(self)).strip("/")


@functools.cache
def filesystem(kind: str) -> Any:
    import fsspec

    # Of ours and of Orbax alike: what another process wrote, or TensorStore in this one, is to be seen at once.
    for alias in {kind, *({"gs", "gcs"} if kind in ("gs", "gcs") else ())}:
        fsspec.config.conf.setdefault(alias, {}).setdefault("use_listings_cache", False)
    # They print the traceback of what we say in one line.
    for name in ("gcsfs", "s3fs", "google.auth._default"):
        logging.getLogger(name).addFilter(lambda record: logging.getLogger().isEnabledFor(logging.INFO))
    return fsspec.filesystem(kind)
