"""Checkpoints on each host's own disk, every few steps, between those that are kept for good.

Each process writes what its devices hold to a folder that only its host has to see. No network and no shared disk is
in the way, so that it can be done every few steps. A process that was killed finds its part there again. A host that
was lost gets its part from the others: what is replicated (over `data`, say) from a replica, and of what exists once
(such as the shards of `fsdp`) each process also keeps a copy of its neighbour's, sent over the devices' own network.

Orbax's emergency checkpoint manager does this for slices that are replicas of one another. Here any layout will do,
from two processes on, and a state is used only if every part of it can be had and every byte is as it was written.

A host may come back with what it wrote before the run went on elsewhere, from an older step. So each start writes under
a name of its own, and a small file in the workdir says whose checkpoints are of the run as it now is: what a start from
another one's local checkpoint goes on from, up to there, and its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import threading
import uuid
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np

from maskformer.paths import AnyPath
from maskformer.training import gathering
from maskformer.training.record import RunRecord
from maskformer.training.sections import CheckpointConfig
from maskformer.training.shards import Shards
from maskformer.training.workdir import replace_text

logger = logging.getLogger(__name__)

LINEAGE = "local_tier.json"
MANIFEST = "manifest.json"
ARRAYS = "arrays.bin"
KEPT = 2
# Bytes that the record of a run takes at the most.
LONGEST_TEXT = 4096

Buffers = list[np.ndarray]  # one for each device of this process; equal ones are one object


def local_tier(config: CheckpointConfig, workdir: AnyPath, abstract_state: Any) -> LocalTier | None:
    """The local checkpoints of the run in `workdir`, None where its config wants none; call it on every process.

    Raises:
      RunError: what tells the run's from others cannot be kept in the workdir.
    """
    if not config.local_every or config.local_folder is None:
        return None
    return LocalTier(pathlib.Path(config.local_folder).absolute(), workdir, abstract_state)


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Whose local checkpoints are of a run.

    Attributes:
      run: tells this run from one that was in the same workdir before: the file is deleted with its folder.
      starts: name of a start -> its last step that counts, None for all.
    """

    run: str
    starts: Mapping[str, int | None]

    @classmethod
    def of(cls, workdir: AnyPath) -> Lineage:
        """That of the run in `workdir`, of a run without local checkpoints where nothing can be read."""
        try:
            says = json.loads((workdir / LINEAGE).read_bytes())
            run, starts = says["run"], dict(says["starts"])
            if re.fullmatch("[0-9a-f]{32}", run) and all(type(last) in (int, type(None)) for last in starts.values()):
                return cls(run, starts)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        return cls(uuid.uuid4().hex, {})

    def has(self, start: str, step: int) -> bool:
        """Whether the checkpoint that a start wrote at a step is of the run."""
        return start in self.starts and ((last := self.starts[start]) is None or step <= last)

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))


class LocalTier:
    """The local checkpoints of one run, seen from this process; call every method on every process alike.

    Args:
      folder: on a disk of this host, or in its memory (below /dev/shm).
      workdir: of the run; what another one has left in the folder is not its.
      abstract_state: the state as `jax.ShapeDtypeStruct`s with `NamedSharding`s of one mesh over all devices.
    """

    def __init__(self, folder: pathlib.Path, workdir: AnyPath, abstract_state: Any):
        self._shards, self._workdir = Shards(abstract_state), workdir
        # A shared disk may show what the leader wrote to one process before another.
        told = gathering.texts(Lineage.of(workdir).text() if jax.process_index() == 0 else "", LONGEST_TEXT)[0]
        self._lineage = Lineage(**json.loads(told))
        self.folder = folder / self._lineage.run / f"process-{jax.process_index()}"
        self._start = ""
        self._restored: tuple[str, int] | None = None
        self._writing: threading.Thread | None = None

    def begin(self) -> None:
        """Go on from what `restore` returned, or from elsewhere if that was nothing; call it before the first `save`.

        Every other local checkpoint is of a run that did not come to be, and is removed.

        Raises:
          RunError: the file that says so cannot be written in the workdir.
        """
        self._start = gathering.texts(uuid.uuid4().hex, LONGEST_TEXT)[0]
        before = {} if self._restored is None else {self._restored[0]: self._restored[1]}
        self._lineage = Lineage(self._lineage.run, {**before, self._start: None})
        if jax.process_index() == 0:
            replace_text(self._workdir / LINEAGE, self._lineage.text() + "\n")
        for step in self._steps():
            if not self._lineage.has(self._started(step), step):
                shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def save(self, step: int, state: Any, record: RunRecord) -> None:
        """Copy the state off the devices, and write it while training goes on; after `begin`.

        A disk that cannot take it costs this process its part, with a warning, and not the run.
        """
        arrays = jax.tree.leaves(state)
        own = [self._off_the_devices(array) for array in arrays]
        copies = {n: self._off_the_devices(self._shards.shifted(arrays[n]), shifted=True) for n in self._shards.alone}
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
        # A shared disk may show a new checkpoint to one process before another.
        newer_than = int(gathering.arrays(np.array(newer_than)).max())
        ours = [step for step in self._steps() if step > newer_than and self._lineage.has(self._started(step), step)]
        mine = [step for step in ours if self._manifest(step) is not None][:KEPT]
        told = gathering.arrays(np.array(mine + [-1] * (KEPT - len(mine))))
        for step in sorted({int(step) for step in told.flat if step > newer_than}, reverse=True):
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
            return self._read(step, have)
        self._restored = None
        return None

    def remove(self) -> None:
        """Leave nothing on this host: the run is over, and what counts is in its workdir."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # that of the run, where this was the last process of the host

    def _off_the_devices(self, array: jax.Array, shifted: bool = False) -> Buffers:
        held = self._shards.held(array, shifted)
        # Copies: the next step overwrites the array where it is, and on CPU a view would see that.
        copied = {index: np.array(part, copy=True) for index, part in dict(held).items()}
        return [copied[index] for index, _ in held]

    def _write(self, step: int, record: dict[str, Any], own: Sequence[Buffers], copies: dict[int, Buffers]) -> None:
        partial, final = self.folder / f"{step}.partial", self.folder / str(step)
        manifest = {"step": step, "start": self._start, "layout": self._shards.fingerprint, "record": record}
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

    def _started(self, step: int) -> str:
        """Which start wrote the checkpoint of a step; empty where that cannot be read."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads((self.folder / str(step) / MANIFEST).read_bytes())["start"])
        return ""

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
        told = {"start": manifest["start"], "record": manifest["record"]} if manifest else {}
        told = json.loads(gathering.texts(json.dumps(told), LONGEST_TEXT)[have.index(True)])
        self._restored = told["start"], step
        return shards.structure.unflatten(arrays), RunRecord(**told["record"])


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
