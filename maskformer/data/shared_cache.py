"""A cache in a bucket: what one machine builds, others fetch. Each keeps a mirror of it on its own disk.

What is read at random is memory-mapped, so it has to be local; the bucket holds whole results. A result is sent under a
name of its own, `NAME/ID/...`, and becomes the one that counts when the small object `NAME.whole` names that ID. It is
written only where there is none, so of machines that build the same at the same time the first one's counts, and the
others throw theirs away and fetch it: all of them read the same bytes.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable

from maskformer import paths
from maskformer.paths import StorePath
from maskformer.textfiles import DataError, unreadable

logger = logging.getLogger(__name__)

THREADS = 8
BLOCK = 1 << 24  # bytes


class SharedCache:
    """The bucket's folder `address`, and its mirror on this machine.

    Attributes:
      mirror: the local folder that results are read from.

    Raises:
      DataError: there is no such bucket, or this account may not see it.
    """

    def __init__(self, address: StorePath):
        self._address = address
        key = hashlib.sha256(str(address).encode()).hexdigest()[:16]
        # Where a home is small or lies in a network, as on some pods.
        chosen = os.environ.get("MASKFORMER_MIRROR")
        base = pathlib.Path(chosen) if chosen else pathlib.Path.home() / ".cache" / "maskformer" / "mirrors"
        self.mirror = base / key
        self._said = False
        try:
            paths.check_store(address, only_read=True)
        except OSError as error:
            raise unreadable(f"MASKFORMER_CACHE={address}", error) from error

    def build(
        self,
        path: pathlib.Path,
        result: pathlib.Path,
        is_complete: Callable[[pathlib.Path], bool],
        build: Callable[[pathlib.Path], None],
    ) -> None:
        """Make a result: fetched where the bucket has it whole, else built and shared.

        Args:
          path: its name in the mirror.
          result: where to make it, which does not exist and whose parent does.
          is_complete, build: as in `cache.build_once`.

        Raises:
          DataError: the bucket cannot be read or written now. One that is only read from is no error.
        """
        try:
            damaged = self._fetch(path, result, is_complete)
            if result.exists():
                return
            build(result)
            if not self._send(path, result, damaged):
                # Another machine was faster, and all are to read the same.
                mine = result.with_name(f"{result.name}.mine")
                result.rename(mine)
                self._fetch(path, result, is_complete)
                if not result.exists():
                    mine.rename(result)
        except DataError:
            raise
        except (paths.StoreError, PermissionError) as error:
            raise unreadable(f"MASKFORMER_CACHE={self._address}", error) from error

    def _fetch(
        self, path: pathlib.Path, result: pathlib.Path, is_complete: Callable[[pathlib.Path], bool]
    ) -> str | None:
        """Bring what the bucket has to `result`; the version of its name where that is damaged, and is not used."""
        found = paths.get(self._whole(path))
        if found is None:
            return None
        name, version = found
        folder = self._sent(path) / name.decode("ascii", errors="replace")
        files = paths.files_below(folder)
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda file: _download(file, _below(result, file.relative_to(folder))), files))
        if result.exists() and is_complete(result):
            _restore_times(result)
            logger.info("fetched %s from %s", path.name, folder)
            return None
        logger.warning("%s is damaged: %s is built anew", folder, path.name)
        if result.is_dir():
            shutil.rmtree(result)
        result.unlink(missing_ok=True)
        return version

    def _send(self, path: pathlib.Path, result: pathlib.Path, damaged: str | None) -> bool:
        """Share a result that was built here; False where another machine's counts.

        Args:
          damaged: the version of the name that is to be replaced; None where there was none.
        """
        whole, sent, mine = self._whole(path), self._sent(path), uuid.uuid4().hex
        try:
            held = paths.get(whole)
            if (None if held is None else held[1]) != damaged:
                return False
            files = [result] if result.is_file() else [file for file in sorted(result.rglob("*")) if file.is_file()]
            targets = [(file, sent / mine / _name(result, file)) for file in files]
            with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda pair: _upload(*pair), targets))
            if paths.put(whole, mine.encode(), damaged) is None:
                paths.remove_tree(sent / mine)
                return False
            for entry in sent.iterdir():
                # Of a machine that was killed, that came second, or what was damaged.
                if entry.name != mine:
                    paths.remove_tree(entry)
        except PermissionError as error:
            if not self._said:
                logger.warning("MASKFORMER_CACHE=%s: is only read from (%s)", self._address, error.strerror or error)
            self._said = True
        return True

    def _sent(self, path: pathlib.Path) -> StorePath:
        return self._address / path.relative_to(self.mirror).as_posix()

    def _whole(self, path: pathlib.Path) -> StorePath:
        sent = self._sent(path)
        return sent.with_name(f"{sent.name}.whole")


# A result that is one file has the name of the result.
_ONE_FILE = "file"


def _name(path: pathlib.Path, file: pathlib.Path) -> str:
    return _ONE_FILE if file == path else f"tree/{file.relative_to(path).as_posix()}"


def _below(path: pathlib.Path, name: pathlib.PurePath) -> pathlib.Path:
    return path if name.parts == (_ONE_FILE,) else path.joinpath(*name.parts[1:])


def _download(source: StorePath, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with paths.reported(source), source.open("rb") as file, target.open("wb") as made:
        while block := file.read(BLOCK):
            made.write(block)


def _upload(source: pathlib.Path, target: StorePath) -> None:
    with paths.reported(target), source.open("rb") as file, target.open("wb") as made:
        while block := file.read(BLOCK):
            made.write(block)


def _restore_times(path: pathlib.Path) -> None:
    """Of files that were found to be those of the seal: it need not read them all again next time."""
    try:
        for name, recorded in json.loads((path / "seal.json").read_text())["files"].items():
            os.utime(path / name, ns=(recorded["modified"], recorded["modified"]))
    except NotADirectoryError:
        pass  # one file, which has no seal
