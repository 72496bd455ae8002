"""Files of a store that several processes write: none is overwritten that its writer did not know."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from maskformer.paths.errors import StoreError, reported
from maskformer.paths.store import StorePath


def get(path: StorePath) -> tuple[bytes, str] | None:
    """The bytes of a file and its version; None where there is none.

    In Google's and Amazon's stores the version is the store's own, and bytes and version belong together.
    """
    with reported(path):
        if path.scheme in ("gs", "gcs"):
            return _get_google(path)
        for _ in range(10):
            try:
                version = str(path.files.ukey(str(path)))
                data = path.files.cat_file(str(path))
                if path.files.ukey(str(path)) == version:
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
        files, name = path.files, str(path)
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


# Seconds that are waited for a store that is busy.
PATIENCE = 30.0


@functools.cache
def _google_bucket(name: str) -> Any:
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        client = storage.Client()
    except (DefaultCredentialsError, OSError):  # OSError: credentials without a project
        client = storage.Client.create_anonymous_client()
    return client.bucket(name)


def see_bucket(path: StorePath) -> None:
    """Ask Google's store for the bucket itself, as Orbax does before it saves; it needs `storage.buckets.get`."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    with reported(path):
        _google_bucket(path.bucket.rpartition("/")[2]).reload(retry=DEFAULT_RETRY.with_timeout(PATIENCE))


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
