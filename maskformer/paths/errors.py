"""What goes wrong in a store, in one voice: an `OSError` of one line, whatever the client library raised."""

from __future__ import annotations

import contextlib
import errno
import os
import re
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


class RefusedError(PermissionError):
    """A bucket that this account may not use: one line that names it and says which rights it needs."""


@contextlib.contextmanager
def reported(path: Any) -> Iterator[None]:
    """What a client library raises inside is an `OSError` of one line; local paths are left alone.

    Raises:
      OSError: see `StorePath`.
    """
    try:
        yield
    except (NotADirectoryError, IsADirectoryError, StoreError, RefusedError):
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
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = _said(error)
    # Google's library has an enumeration of them, others numbers or strings.
    code = str(getattr(error, "code", "")).rpartition(".")[2]
    kin = "gs" if path.scheme in ("gs", "gcs") else "s3" if path.scheme in ("s3", "s3a") else ""
    if code in ("404", "NOT_FOUND"):
        return FileNotFoundError(errno.ENOENT, f"no {path.bucket} there, or nothing of that name", str(path))
    refused = "PermissionError" in kinds or str(error).startswith("Forbidden") or code in ("401", "403")
    if refused or {"NoCredentialsError", "DefaultCredentialsError", "RefreshError"} & kinds:
        grants = _GRANTS.get(kin, "give this account read and write access to it")
        return RefusedError(errno.EACCES, f"no access to {path.bucket} ({said}); {grants}")
    lost = {"OSError", "TimeoutError", "ClientError", "ConnectionError", "RetryError", "TransportError"}
    if code in _THROTTLED or lost & kinds:
        return StoreError(
            f"{path.bucket} does not answer, also when asked again for half a minute ({said}); run the same command"
            " again later, or see whether this machine reaches it"
        )
    return StoreError(f"{path.bucket}: {type(error).__name__}: {said}")


def _said(error: Exception) -> str:
    """What the server said: without the request, which is known, and without how often it was made."""
    lines = str(error).strip().splitlines()
    if re.search("name resolution|Name or service not known|nodename nor servname|No address associated", str(error)):
        host = re.search(r"host[ =]'?([\w.-]+)", str(error))
        return f"could not resolve {host[1] if host else 'its address'}"
    text = re.sub(r"(\d{3} )?[A-Z]+ https?://\S+ ?", "", lines[-1] if lines else "").partition(": ('Request failed")[0]
    if (message := re.search('"message": ?"([^"]+)"', text)) is not None:
        text = message[1]
    return one_line(text.rpartition("last exception: ")[2] or type(error).__name__, 100)
