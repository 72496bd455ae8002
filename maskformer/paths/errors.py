"""What goes wrong in a store, in one voice: an `OSError` of one line, whatever the client library raised."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from maskformer.checks import one_line
from maskformer.paths.address import is_local

_GRANTS = {
    "gs": "give this account roles/storage.objectUser and roles/storage.legacyBucketReader on it, or log in:"
    " gcloud auth application-default login",
    "s3": "give this account s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject on it, or set"
    " AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_THROTTLED = {"408", "429", "500", "502", "503", "504"}


class StoreError(OSError):
    """A bucket, or another store, that cannot be used now: one line that names it and says what to do."""


@contextlib.contextmanager
def reported(path: Any) -> Iterator[None]:
    """What a client library raises inside is an `OSError` of one line; local paths are left alone.

    Raises:
      OSError: see `StorePath`.
    """
    try:
        yield
    except (NotADirectoryError, IsADirectoryError, StoreError):
        raise
    except (FileNotFoundError, FileExistsError) as error:
        if is_local(path) or error.errno is not None:
            raise
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EEXIST
        raise OSError(number, os.strerror(number), str(path)) from error
    except Exception as error:
        if is_local(path):
            raise
        raise _translated(path, error) from error


def _translated(path: Any, error: Exception) -> OSError:
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
