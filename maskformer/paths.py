"""Where things are kept: on this machine's file systems, or in a bucket. The one place that knows what a path is.

A local path is a `pathlib.Path`, with links and all. Any other, `gs://bucket/run`, `s3://...` or an address of another
file system that fsspec knows, is a `StorePath`, which has the same methods as far as an object store can honour them:
there, a folder is nothing but what names have in common, a file appears whole or not at all, and nothing is appended.
What goes wrong is an `OSError` of one line that names the bucket and what to do, whatever the client library raised.

Like `checks`, a ground floor. No client library is imported, and nothing is asked of a network, before a path of its
kind is used.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import IO, Any, TypeAlias

from etils import epath

from maskformer.checks import closest, one_line, shown

# What the rest of the house calls a path.
AnyPath: TypeAlias = "pathlib.Path | StorePath"

# A letter and a colon alone is a drive. One slash is enough, since a `pathlib.Path` merges the two.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
# scheme -> the package that speaks it, and how to get it.
_PACKAGES = {
    "gs": ("gcsfs", "pip install 'maskformer[gcs]'"),
    "gcs": ("gcsfs", "pip install 'maskformer[gcs]'"),
    "s3": ("s3fs", "pip install 'maskformer[s3]'"),
    "s3a": ("s3fs", "pip install 'maskformer[s3]'"),
}
# Where folders are not made, and a write is of a whole object. Asked to make a folder, some clients make the bucket.
_OBJECT_STORES = {"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "oss", "oci"}
_GRANTS = {
    "gs": "give this account roles/storage.objectUser and roles/storage.legacyBucketReader on it, or log in:"
    " gcloud auth application-default login",
    "s3": "give this account s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject on it, or set"
    " AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_THROTTLED = {"408", "429", "500", "502", "503", "504"}


def scheme(path: str | os.PathLike[str]) -> str | None:
    """The scheme of an address; None for a local path, and for `file://`, which is one.

    >>> scheme("gs://bucket/run"), scheme("runs/a:b"), scheme("file:///tmp/run"), scheme(pathlib.Path("s3://bucket/x"))
    ('gs', None, None, 's3')
    """
    address = _ADDRESS.match(os.fspath(path))
    return None if address is None or address[1].lower() == "file" else address[1].lower()


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of this machine's file systems."""
    return scheme(path) is None


def resolve(path: str | os.PathLike[str]) -> AnyPath:
    """A path from what a user wrote: absolute where it is local, a `StorePath` where it is an address.

    Raises:
      ValueError: `why_no_folder` says why.

    >>> resolve("memory://runs/") / "bert"
    StorePath('memory://runs/bert')
    """
    if isinstance(path, StorePath):
        return path
    text = os.fspath(path)
    if (why := why_no_folder(text)) is not None:
        raise ValueError(f"{shown(text)}: {why}")
    if is_local(text):
        return pathlib.Path(re.sub("^[Ff][Ii][Ll][Ee]:/+", "/", text)).absolute()
    return StorePath(text)


def why_no_folder(path: str) -> str | None:
    """Why a path, as it was written, can name no folder here or in a bucket; None where it can. Asks no network.

    >>> why_no_folder("gs://")
    'expected gs://BUCKET/FOLDER'
    >>> why_no_folder("gz://bucket/run")
    "unknown address; did you mean 'gs://'?"
    >>> why_no_folder("")
    "expected a folder; '.' is the current one"
    >>> why_no_folder("runs/a:b")
    """
    if not path:
        return "expected a folder; '.' is the current one"
    kind = scheme(path)
    if kind is None:
        return None
    from fsspec.registry import known_implementations

    if kind not in known_implementations:
        near = closest(kind, ["gs", "s3", *known_implementations], cutoff=0.5)
        return "unknown address" + (f"; did you mean '{near}://'?" if near else "; expected a folder, gs:// or s3://")
    if not path[len(kind) + 1 :].strip("/") or (kind in _OBJECT_STORES and re.match(r"[^:]+:///", path)):
        return f"expected {kind}://BUCKET/FOLDER"
    return _missing_package(kind)


def _missing_package(kind: str) -> str | None:
    from fsspec.registry import known_implementations

    package, fix = _PACKAGES.get(kind, (known_implementations[kind]["class"].partition(".")[0], ""))
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{kind}:// needs {package}, which is not installed; {fix or f'pip install {package}'}"


class StoreError(OSError):
    """A bucket, or another store, that cannot be used now: one line that names it and says what to do."""


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
    def _files(self) -> Any:
        return _filesystem(self.scheme)

    def exists(self) -> bool:
        with reported(self):
            return self._files.exists(str(self))

    def is_dir(self) -> bool:
        with reported(self):
            return self._files.isdir(str(self))

    def is_file(self) -> bool:
        with reported(self):
            return self._files.isfile(str(self))

    def iterdir(self) -> Iterator[StorePath]:
        with reported(self):
            found = self._files.ls(str(self), detail=False)
        # An object called like the folder itself, with a slash at its end, stands for the folder in some stores.
        names = {name.rstrip("/").rpartition("/")[2] for name in found if name.strip("/") != self._name_in_store}
        yield from (self / name for name in sorted(names))

    def glob(self, pattern: str) -> Iterator[StorePath]:
        with reported(self):
            found = self._files.glob(f"{self}/{pattern}")
        yield from sorted(type(self)(self._files.unstrip_protocol(name)) for name in found)

    def open(self, mode: str = "r", encoding: str | None = None, errors: str | None = None, **kwargs: Any) -> IO[Any]:
        """As `open`, without appending, which some clients take for overwriting.

        Raises:
          ValueError: a mode other than reading and writing.
        """
        if mode.replace("b", "").replace("t", "") not in ("r", "w"):
            raise ValueError(f"{self}: mode={mode!r}: expected one of r, rb, w, wb; an object is written whole")
        with reported(self):
            file = self._files.open(str(self), mode.replace("b", "").replace("t", "") + "b")
        if "b" in mode:
            return file
        return io.TextIOWrapper(file, encoding=encoding or "utf-8", errors=errors, **kwargs)

    def read_bytes(self) -> bytes:
        with reported(self):
            return self._files.cat_file(str(self))

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        with reported(self):
            if self.scheme not in _OBJECT_STORES:
                self._files.makedirs(str(self.parent), exist_ok=True)
            self._files.pipe_file(str(self), bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        if put(self, b"") is None and not exist_ok:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing in an object store, where a folder begins to be with what is in it."""
        if self.scheme not in _OBJECT_STORES:
            with reported(self):
                self._files.makedirs(str(self), exist_ok=exist_ok)

    def unlink(self, missing_ok: bool = False) -> None:
        with reported(self):
            try:
                self._files.rm_file(str(self))
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def rmtree(self, missing_ok: bool = False) -> None:
        with reported(self):
            try:
                self._files.rm(str(self), recursive=True)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def rename(self, target: str | os.PathLike[str]) -> StorePath:
        """Copies, within the store, and deletes: not at one moment, as in a file system."""
        with reported(self):
            self._files.mv(str(self), os.fspath(target), recursive=True)
        return type(self)(os.fspath(target))

    def size(self) -> int:
        """Bytes of a file."""
        with reported(self):
            return self._files.size(str(self))

    @property
    def _name_in_store(self) -> str:
        return self._files._strip_protocol(str(self)).strip("/")


@functools.cache
def _filesystem(kind: str) -> Any:
    import fsspec

    # Of ours and of Orbax alike: what another process wrote, or TensorStore in this one, is to be seen at once.
    os.environ.setdefault("EPATH_USE_TF", "false")
    for alias in {kind, *({"gs", "gcs"} if kind in ("gs", "gcs") else ())}:
        fsspec.config.conf.setdefault(alias, {}).setdefault("use_listings_cache", False)
    # They print the traceback of what we say in one line.
    for name in ("gcsfs", "s3fs", "google.auth._default"):
        logging.getLogger(name).addFilter(lambda record: logging.getLogger().isEnabledFor(logging.INFO))
    return fsspec.filesystem(kind)


def check_store(path: AnyPath) -> None:
    """Refuse a bucket that is not there, or that this account may not see; a local path is fine.

    Raises:
      OSError: one line that says what to do.
    """
    if not isinstance(path, StorePath) or path.scheme not in _OBJECT_STORES:
        return
    with reported(path):
        try:
            path._files.info(path.bucket)
        except FileNotFoundError:
            make = "gcloud storage buckets create" if path.scheme in ("gs", "gcs") else "aws s3 mb"
            fix = f"mend its name, or make it: {make} {path.bucket}"
            raise StoreError(f"there is no bucket {path.bucket}; {fix}") from None


def size(path: AnyPath) -> int:
    """Bytes of a file."""
    return path.size() if isinstance(path, StorePath) else path.stat().st_size


def files_below(folder: AnyPath) -> list[AnyPath]:
    """Every file below a folder, sorted."""
    if isinstance(folder, StorePath):
        with reported(folder):
            found = folder._files.find(str(folder))
        return sorted(StorePath(folder._files.unstrip_protocol(name)) for name in found if not name.endswith("/"))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def lexists(path: AnyPath) -> bool:
    """Whether there is something of that name: also a link that leads nowhere, where there are links."""
    return path.exists() if isinstance(path, StorePath) else os.path.lexists(path)


def replace_bytes(path: AnyPath, data: bytes) -> None:
    """Write a file so that a reader, and a run that is killed meanwhile, find the old bytes or the new ones.

    Raises:
      OSError: it cannot be written.
    """
    if isinstance(path, StorePath):
        path.write_bytes(data)
        return
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def remove_tree(folder: AnyPath) -> None:
    """Delete a folder with what is in it, as far as that is possible."""
    import shutil

    if isinstance(folder, StorePath):
        with contextlib.suppress(OSError):
            folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def fingerprint(path: StorePath) -> str:
    """What changes whenever a file of a store does: its checksum where the store keeps one, else time and size."""
    with reported(path):
        found = path._files.info(str(path))
    for name in ("md5Hash", "ETag", "etag", "content_md5", "crc32c"):
        if found.get(name):
            return f"{name}:{found[name]}"
    return f"{found.get('size')}:{found.get('mtime') or found.get('created') or found.get('LastModified')}"


def get(path: StorePath) -> tuple[bytes, str] | None:
    """The bytes of a file and its version; None where there is none.

    In Google's and Amazon's stores the version is the store's own, and bytes and version belong together.
    """
    with reported(path):
        if path.scheme in ("gs", "gcs"):
            return _get_google(path)
        for _ in range(10):
            try:
                version = str(path._files.ukey(str(path)))
                data = path._files.cat_file(str(path))
                if path._files.ukey(str(path)) == version:
                    return data, version
            except FileNotFoundError:
                return None
    raise StoreError(f"{path}: changes all the time; let one process write it")


def put(path: StorePath, data: bytes, version: str | None = None) -> str | None:
    """Write a file only where it is the one that is known, so that no other process' words are lost.

    Google's store compares and writes in one step (a generation precondition), Amazon's does so for a file that is not
    to be there yet. Others are asked first and then written to: two processes may both believe to have been first.

    Args:
      path: the file.
      data: all of it.
      version: what `get` or `put` said it was; None where there is to be none.

    Returns:
      The new version; None where there is another one than `version`, and nothing was written.
    """
    with reported(path):
        if path.scheme in ("gs", "gcs"):
            return _put_google(path, data, version)
        files, name = path._files, str(path)
        held = str(files.ukey(name)) if files.exists(name) else None
        if held != version:
            return None
        if version is None and path.scheme in ("s3", "s3a"):
            try:
                files.pipe_file(name, data, mode="create")
            except FileExistsError:
                return None
        else:
            path.write_bytes(data)
        return str(files.ukey(name))


@functools.cache
def _google_bucket(name: str) -> Any:
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        client = storage.Client()
    except (DefaultCredentialsError, OSError):  # OSError: credentials without a project
        client = storage.Client.create_anonymous_client()
    return client.bucket(name)


def _get_google(path: StorePath) -> tuple[bytes, str] | None:
    from google.api_core import exceptions

    for _ in range(10):
        blob = _google_bucket(path.bucket.rpartition("/")[2]).get_blob(path.key)
        if blob is None:
            return None
        with contextlib.suppress(exceptions.NotFound, exceptions.PreconditionFailed):
            return blob.download_as_bytes(if_generation_match=blob.generation), str(blob.generation)
    raise StoreError(f"{path}: changes all the time; let one process write it")


def _put_google(path: StorePath, data: bytes, version: str | None) -> str | None:
    from google.api_core import exceptions

    blob = _google_bucket(path.bucket.rpartition("/")[2]).blob(path.key)
    try:
        blob.upload_from_string(data, "application/octet-stream", if_generation_match=int(version or 0))
    except exceptions.PreconditionFailed:
        # What a lost answer had written already counts as written: the retry finds itself in its way.
        held = _get_google(path)
        return held[1] if held is not None and held[0] == data and held[1] != version else None
    return str(blob.generation)


@contextlib.contextmanager
def reported(path: AnyPath) -> Iterator[None]:
    """What a client library raises inside is an `OSError` of one line; local paths are left alone.

    Raises:
      OSError: see `StorePath`.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, StoreError):
        raise
    except Exception as error:
        if not isinstance(path, StorePath):
            raise
        raise _translated(path, error) from error


def _translated(path: StorePath, error: Exception) -> OSError:
    kind = type(error).__name__
    said = one_line(str(error).strip() or kind, 160)
    code = str(getattr(error, "code", ""))
    kin = "gs" if path.scheme in ("gs", "gcs") else "s3" if path.scheme in ("s3", "s3a") else ""
    if code == "404":
        return FileNotFoundError(errno.ENOENT, f"no {path.bucket} there, or nothing of that name", str(path))
    refused = isinstance(error, PermissionError) or said.startswith("Forbidden") or code in ("401", "403")
    if refused or "Credentials" in kind or "RefreshError" in kind or "Anonymous caller" in said:
        grants = _GRANTS.get(kin, "give this account read and write access to it")
        return PermissionError(errno.EACCES, f"no access to {path.bucket} ({said}); {grants}")
    if code in _THROTTLED or isinstance(error, OSError | TimeoutError) or "Connection" in kind or "Client" in kind:
        return StoreError(
            f"{path.bucket} does not answer, also when asked again for half a minute ({said}); run the same command"
            " again later, or see whether this machine reaches it"
        )
    return StoreError(f"{path.bucket}: {kind}: {said}")
