"""Where things are kept: on this machine's file systems, or in a bucket. The one place that knows what a path is.

A local path is a `pathlib.Path`, with links and all. Any other, `gs://bucket/run`, `s3://...` or an address of another
file system that fsspec knows, is a `StorePath`, which has the same methods as far as an object store can honour them:
there, a folder is nothing but what names have in common, a file appears whole or not at all, and nothing is appended.
What goes wrong is an `OSError` of one line that names the bucket and what to do, whatever the client library raised.

Like `checks`, a ground floor. No client library is imported, and nothing is asked of a network, before a path of its
kind is used.
"""

from maskformer.paths.address import is_local, scheme, why_no_folder, why_no_run
from maskformer.paths.errors import StoreError, reported
from maskformer.paths.files import (
    AnyPath,
    check_store,
    files_below,
    fingerprints,
    given,
    lexists,
    opened,
    remove_tree,
    replace_bytes,
    resolve,
    same_disk,
    size,
    stored_checksums,
    unbuffered,
)
from maskformer.paths.store import StorePath
from maskformer.paths.versions import get, put

__all__ = [
    "AnyPath",
    "StoreError",
    "StorePath",
    "check_store",
    "files_below",
    "fingerprints",
    "get",
    "given",
    "is_local",
    "lexists",
    "opened",
    "put",
    "remove_tree",
    "replace_bytes",
    "reported",
    "resolve",
    "same_disk",
    "scheme",
    "size",
    "stored_checksums",
    "unbuffered",
    "why_no_folder",
    "why_no_run",
]
