"""Paths on the command line.

A file that a command writes beside its answer is refused before the work, and one line says where writing fails after
it; a folder of a run is not the current directory by mistake.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
from collections.abc import Iterator

from maskformer import paths
from maskformer.checks import require, shown
from maskformer.paths import why_no_folder, why_no_run


def folder(text: str) -> str:
    """The type of a `--workdir`: as written, unless it can be no folder of a run.

    >>> folder("gz://bucket/run")
    Traceback (most recent call last):
        ...
    argparse.ArgumentTypeError: 'gz://bucket/run': unknown address; did you mean 'gs://'?
    """
    if (why := why_no_run(text)) is not None:
        raise argparse.ArgumentTypeError(f"{shown(text)}: {why}")
    return text


def check_writable(flag: str, path: str | None) -> None:
    """Refuse a file that cannot be written, before any work is done for it; None is no file.

    Raises:
      ValueError: the path is empty or a folder, its folder is not there, or writing is not permitted.

    >>> check_writable("--json", "/no/such/folder/results.json")
    Traceback (most recent call last):
        ...
    ValueError: --json='/no/such/folder/results.json': expected a file in a folder that exists; there is no folder
    '/no/such/folder'
    """
    if path is None:
        return
    require(path != "" and "\0" not in path, flag, path, "the path of a file")
    if (why := why_no_folder(path)) is not None:
        raise ValueError(f"{flag}={shown(path)}: {why}")
    if not paths.is_local(path):
        try:
            paths.check_store(paths.resolve(path))
        except OSError as error:
            raise ValueError(f"{flag}={shown(path)}: {error.strerror or error}") from error
        return
    file = pathlib.Path(path)
    require(not file.is_dir(), flag, path, "a file, and this is a folder")
    folder = file.parent
    require(folder.is_dir(), flag, path, f"a file in a folder that exists; there is no folder {str(folder)!r}")
    may = os.access(file, os.W_OK) if file.exists() else os.access(folder, os.W_OK)
    require(may, flag, path, "a file that may be written; permission is denied")


@contextlib.contextmanager
def writing(flag: str, path: str) -> Iterator[None]:
    """What fails while `path` is written is said in one line: a full disk, a folder that has gone.

    Raises:
      ValueError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"{flag}={shown(path)}: cannot be written ({error.strerror or error})") from error
