"""What a user wrote as a path: local, or the address of a store. Nothing here asks a network."""

from __future__ import annotations

import importlib.util
import os
import re

from maskformer.checks import closest

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
OBJECT_STORES = {"gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "adl", "oss", "oci"}


def scheme(path: str | os.PathLike[str]) -> str | None:
    """The scheme of an address; None for a local path, and for `file://`, which is one.

    >>> scheme("gs://bucket/run"), scheme("runs/a:b"), scheme("file:///tmp/run"), scheme("s3:/bucket/x")
    ('gs', None, None, 's3')
    """
    address = _ADDRESS.match(os.fspath(path))
    return None if address is None or address[1].lower() == "file" else address[1].lower()


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of this machine's file systems."""
    return scheme(path) is None


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
    if not path[len(kind) + 1 :].strip("/") or (kind in OBJECT_STORES and re.match(r"[^:]+:///", path)):
        return f"expected {kind}://BUCKET/FOLDER"
    return _missing_package(kind)


def why_no_run(path: str) -> str | None:
    """Why a path, as it was written, can be no folder of a run; None where it can. Asks no network.

    Orbax speaks with file systems and with Google's store, whatever its clients for small files speak with.

    >>> why_no_run("gs://bucket")
    'expected gs://BUCKET/FOLDER'
    >>> why_no_run("s3://bucket/run")
    'checkpoints are kept in gs:// or on a file system, and not in s3://; mount it, and give that folder'
    >>> why_no_run("runs/bert")
    """
    kind = scheme(path)
    if kind is None:
        return why_no_folder(path)
    from fsspec.registry import known_implementations

    # Before its package is asked for, which would not help.
    if kind in known_implementations and kind != "gs":
        kept = "checkpoints are kept in gs:// or on a file system"
        return f"{kept}, and not in {kind}://; mount it, and give that folder"
    if kind == "gs" and "/" not in path[len(kind) + 1 :].strip("/"):
        return "expected gs://BUCKET/FOLDER"
    return why_no_folder(path)


def _missing_package(kind: str) -> str | None:
    from fsspec.registry import known_implementations

    package, fix = _PACKAGES.get(kind, (known_implementations[kind]["class"].partition(".")[0], ""))
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{kind}:// needs {package}, which is not installed; {fix or f'pip install {package}'}"
