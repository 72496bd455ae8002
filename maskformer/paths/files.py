"""What is asked of paths of both kinds, local ones and those of a store."""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import os
import pathlib
import re
import shutil
from typing import Any, TypeAlias

from maskformer.checks import shown
from maskformer.paths import versions
from maskformer.paths.address import OBJECT_STORES, is_local, scheme, why_no_folder
from maskformer.paths.errors import reported
from maskformer.paths.store import StorePath

# What the rest of the house calls a path.
AnyPath: TypeAlias = "pathlib.Path | StorePath"


def given(path: str | os.PathLike[str]) -> AnyPath:
    """A path as it was given: relative where it is local and was written so, for files that are only read and named.

    >>> given("runs/x"), given("memory://runs/x")
    (PosixPath('runs/x'), StorePath('memory://runs/x'))
    """
    return pathlib.Path(path) if scheme(path) is None and os.fspath(path)[:5].lower() != "file:" else resolve(path)


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


def check_store(path: AnyPath, *, only_read: bool = False) -> None:
    """Refuse a bucket that is not there, or that this account may not see; a local path is fine.

    Args:
      path: in the bucket, there or not.
      only_read: what is public may be read by who may not see the bucket itself.

    Raises:
      OSError: one line that says what to do.
    """
    if not isinstance(path, StorePath) or path.scheme not in OBJECT_STORES:
        return
    try:
        with reported(path):
            if path.scheme in ("gs", "gcs"):
                versions.see_bucket(path)
            else:
                path.files.ls(path.bucket, detail=False)
    except FileNotFoundError:
        make = "gcloud storage buckets create" if path.scheme in ("gs", "gcs") else "aws s3 mb"
        fix = f"mend its name, or make it: {make} {path.bucket}"
        raise FileNotFoundError(errno.ENOENT, f"there is no bucket {path.bucket}; {fix}") from None
    except PermissionError:
        if not only_read:
            raise


def size(path: AnyPath) -> int:
    """Bytes of a file."""
    if not isinstance(path, StorePath):
        return path.stat().st_size
    with reported(path):
        return path.files.size(str(path))


def files_below(folder: AnyPath) -> list[AnyPath]:
    """Every file below a folder, sorted."""
    if isinstance(folder, StorePath):
        with reported(folder):
            found = folder.files.find(str(folder))
        return sorted(StorePath(folder.files.unstrip_protocol(name)) for name in found if not name.endswith("/"))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def stored_checksums(folder: AnyPath) -> dict[str, list[int | str]]:
    """Length and MD5 sum, `md5:HEX`, that a store keeps of the files below a folder, by name; empty where it has none.

    Google's store computes them of what it received, and shows them in a listing, which costs one request.
    """
    if not isinstance(folder, StorePath) or folder.scheme not in ("gs", "gcs"):
        return {}
    with reported(folder):
        found = folder.files.find(str(folder), detail=True)
    start = len(folder.name_in_store) + 1
    return {
        name[start:]: [int(info["size"]), f"md5:{base64.b64decode(info['md5Hash']).hex()}"]
        for name, info in found.items()
        if info.get("md5Hash")
    }


def same_disk(path: AnyPath, other: AnyPath) -> bool:
    """Whether something can be renamed from one to the other without being copied between disks."""
    return not is_local(path) or path.stat().st_dev == other.stat().st_dev


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
    if isinstance(folder, StorePath):
        with contextlib.suppress(OSError):
            folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def fingerprints(folder: StorePath) -> dict[StorePath, str]:
    """What changes whenever a file does, for every file below a folder, from one listing: no file is read.

    The checksum or the version that the store keeps; where it keeps none, length and time.
    """
    with reported(folder):
        found = folder.files.find(str(folder), detail=True)
    marks = ("md5Hash", "ETag", "etag", "content_md5", "generation")
    dates = ("mtime", "LastModified", "last_modified", "created")
    made = {}
    for name, info in sorted(found.items()):
        mark = next((f"{key}:{info[key]}" for key in marks if info.get(key)), None)
        date = next((info[key] for key in dates if info.get(key)), None)
        made[StorePath(folder.files.unstrip_protocol(name))] = f"{info.get('size')}:{mark or date}"
    return made


def opened(path: AnyPath) -> Any:
    """A file for reading bytes, with a buffer in which one can look ahead."""
    if not isinstance(path, StorePath):
        return path.open("rb")
    with reported(path):
        raw: Any = path.open("rb")
        return io.BufferedReader(raw, 1 << 16)


def unbuffered(path: AnyPath) -> Any:
    """A file to be read in large blocks by `readinto`."""
    return path.open("rb") if isinstance(path, StorePath) else path.open("rb", buffering=0)
