"""Checkpoints on each host's own disk, every few steps, between those that are kept for good.

Each process writes what its devices hold to a folder that only its host has to see. No network and no shared disk is
in the way, so that it can be done every few steps. A process that was killed finds its part there again. A host that
was lost gets its part from the others: what is replicated (over `data`, say) from a replica, and of what exists once
(such as the shards of `fsdp`) each process also keeps a copy of its neighbour's, sent over the devices' own network.

Orbax's emergency checkpoint manager does this for slices that are replicas of one another. Here any layout will do,
from two processes on, and a state is used only if every part of it can be had and every byte is as it was written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import threading
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import jax
import numpy as np

from maskformer.training.record import RunRecord
from maskformer.training.shards import Shards

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ARRAYS = "arrays.bin"
KEPT = 2
# Bytes that a record takes at the most, as text.
LONGEST_RECORD = 4096

Buffers = list[np.ndarray]  # one for each device of this process; equal ones are one object


class LocalTier:
    """The local checkpoints of one run, seen from this process; call every method on every process alike.

    Args:
      folder: on a disk of this host, or in its memory (below /dev/shm).
      run: names the run; what another one has left in the folder is not its.
      abstract_state: the state as `jax.ShapeDtypeStruct`s with `NamedSharding`s of one mesh over all devices.
    """

    def __init__(self, folder: pathlib.Path, run: str, abstract_state: Any):
        self._shards = Shards(abstract_state)
        self.folder = folder / run / f"process-{jax.process_index()}"
        self._writing: threading.Thread | None = None

    def save(self, step: int, state: Any, record: RunRecord) -> None:
        """Copy the state off the devices, and write it while training goes on.

        A disk that cannot take it costs this process its part, with a warning, and not the run.
        """
        arrays = jax.tree.leaves(state)
        own = [self._off_the_devices(array) for array in arrays]
        copies = {n: self._off_the_devices(self._shards.shifted(arrays[n])) for n in self._shards.alone}
        self.wait()
        self._writing = threading.Thread(
            target=self._write,
            args=(step, dataclasses.asdict(record), own, copies),
            name="local_checkpoint",
            daemon=True,
        )
        self._writing.start()

    def wait(self) -> None:
        """Return when the last save is on disk, or has failed."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def restore(self, newer_than: int) -> tuple[Any, RunRecord] | None:
        """The newest local checkpoint of which every part can be had, and its record; None if there is none.

        Args:
          newer_than: step of the newest checkpoint that is kept for good, -1 for none; no older one is used.
        """
        mine = [step for step in self._steps() if step > newer_than and self._manifest(step) is not None][:KEPT]
        told = _gathered(np.array(mine + [-1] * (KEPT - len(mine))))
        for step in sorted({step for step in told.flat if step > newer_than}, reverse=True):
            have = [bool((of_process == step).any()) for of_process in told]
            missing = self._shards.missing(have)
            lost = ", ".join(str(process) for process, there in enumerate(have) if not there)
            if missing is not None:
                logger.warning(
                    "local checkpoint of step %d: process %s has lost its part, and nobody else has it of %s; not used",
                    step, lost, missing,
                )  # fmt: skip
                continue
            if lost:
                logger.warning(
                    "local checkpoint of step %d: process %s has lost its part, and gets it from the others", step, lost
                )
            return self._read(int(step), have)
        return None

    def _off_the_devices(self, array: jax.Array) -> Buffers:
        held = self._shards.held(array)
        # Copies: the next step overwrites the array where it is, and on CPU a view would see that.
        copied = {index: np.array(part, copy=True) for index, part in dict(held).items()}
        return [copied[index] for index, _ in held]

    def _write(self, step: int, record: dict[str, Any], own: Sequence[Buffers], copies: dict[int, Buffers]) -> None:
        partial, final = self.folder / f"{step}.partial", self.folder / str(step)
        manifest = {"step": step, "layout": self._shards.fingerprint, "record": record}
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with (partial / ARRAYS).open("wb") as file:
                manifest["own"] = [_append(file, buffers) for buffers in own]
                manifest["copies"] = {str(number): _append(file, buffers) for number, buffers in copies.items()}
                file.flush()
                os.fsync(file.fileno())
            with (partial / MANIFEST).open("w", encoding="utf-8") as text:
                json.dump(manifest, text)
                text.flush()
                os.fsync(text.fileno())
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self._steps()[KEPT:]:
                shutil.rmtree(self.folder / str(old), ignore_errors=True)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            logger.warning(
                "local checkpoint of step %d: cannot be written to %s (%s); the run goes on without it",
                step, self.folder, error,
            )  # fmt: skip

    def _steps(self) -> list[int]:
        """Steps of what is there, the newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((int(entry.name) for entry in self.folder.iterdir() if entry.name.isdecimal()), reverse=True)

    def _manifest(self, step: int) -> dict[str, Any] | None:
        """The manifest of a checkpoint whose every byte is as it was written, if it is of this mesh and state."""
        place = self.folder / str(step)
        try:
            manifest = json.loads((place / MANIFEST).read_bytes())
            if manifest["layout"] != self._shards.fingerprint:
                logger.warning("local checkpoint %s: of another mesh, or of another state; not used", place)
                return None
            with (place / ARRAYS).open("rb") as file:
                for parts in [*manifest["own"], *manifest["copies"].values()]:
                    for offset, size, checksum in parts:
                        file.seek(offset)
                        if zlib.crc32(file.read(size)) != checksum:
                            raise ValueError(f"{ARRAYS} is not as it was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("local checkpoint %s: damaged (%s); not used", place, error)
            return None
        return manifest

    def _read(self, step: int, have: Sequence[bool]) -> tuple[Any, RunRecord]:
        shards, mine = self._shards, have[jax.process_index()]
        manifest = self._manifest(step) if mine else None
        arrays = []
        with contextlib.ExitStack() as on_exit:
            file = on_exit.enter_context((self.folder / str(step) / ARRAYS).open("rb")) if manifest else None
            for number, leaf in enumerate(shards.leaves):
                own = shards.array(leaf, _parts(file, manifest and manifest["own"][number], leaf))
                if not all(have):
                    copy = None
                    if number in shards.alone:
                        entries = manifest and manifest["copies"][str(number)]
                        copy = shards.array(leaf, _parts(file, entries, leaf))
                    own = shards.recovered(leaf, own, copy, have)
                arrays.append(own)
        record = _from_first(json.dumps(manifest["record"]) if manifest else "", have)
        return shards.structure.unflatten(arrays), RunRecord(**json.loads(record))


def _append(file: BinaryIO, buffers: Buffers) -> list[tuple[int, int, int]]:
    """Write the buffers, equal ones once; offset, bytes and CRC-32 of each."""
    written: dict[int, tuple[int, int, int]] = {}
    for buffer in buffers:
        if id(buffer) not in written:
            data = buffer.tobytes()
            written[id(buffer)] = file.tell(), len(data), zlib.crc32(data)
            file.write(data)
    return [written[id(buffer)] for buffer in buffers]


def _parts(file: BinaryIO | None, entries: Any, leaf: jax.ShapeDtypeStruct) -> Buffers:
    """A buffer for each device of this process: those that were written, or zeros."""
    shape = leaf.sharding.shard_shape(leaf.shape)
    if file is None:
        return [np.zeros(shape, leaf.dtype)] * jax.local_device_count()
    parts = []
    for offset, size, _ in entries:
        file.seek(offset)
        parts.append(np.frombuffer(file.read(size), leaf.dtype).reshape(shape))
    return parts


def _gathered(array: np.ndarray) -> np.ndarray:
    """The array of each process, stacked."""
    if jax.process_count() == 1:
        return array[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array))


def _from_first(text: str, have: Sequence[bool]) -> str:
    """The text of the first process that has one."""
    encoded = np.zeros(LONGEST_RECORD, np.uint8)
    data = text.encode()
    encoded[: len(data)] = np.frombuffer(data, np.uint8)
    return bytes(_gathered(encoded)[have.index(True)]).rstrip(b"\0").decode()
