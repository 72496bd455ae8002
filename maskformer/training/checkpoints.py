"""Checkpoints of a run with Orbax: the state's arrays, and a small JSON record beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from maskformer import paths
from maskformer.checks import first_line, printable
from maskformer.paths import AnyPath
from maskformer.training import gathering
from maskformer.training.checksums import CHECKSUMS, DamageError, replace_files, verify, write_checksums
from maskformer.training.orbax_noise import OrbaxFilter
from maskformer.training.precision import widened_shapes
from maskformer.training.record import RunRecord, read_record
from maskformer.training.saved_arrays import CheckpointError, StructureError, check_structure, saved_tree
from maskformer.training.scores import best_first, read_score
from maskformer.training.sections import CheckpointConfig, EvaluationConfig
from maskformer.training.workdir import (
    CHECKPOINTS,
    COMMITTED,
    RunError,
    cannot_write,
    checkpoint_steps,
    read_object,
    reason,
    stray_steps,
    unfinished_steps,
)

logger = logging.getLogger(__name__)


class SaveError(RunError):
    """A checkpoint could not be saved; names the last good one."""


class Checkpoints:
    """The `checkpoints/` folder of a workdir.

    Saving is asynchronous: `save` copies the arrays off the device and returns; a step folder appears under its
    final name only when it is whole, with the checksums of its files. In an object store, where nothing can be renamed
    at one moment, it counts from when a last small file, `workdir.COMMITTED`, is in it. The newest `keep` are kept, and
    the best by the evaluation metric.
    """

    def __init__(self, workdir: AnyPath, config: CheckpointConfig, evaluation: EvaluationConfig):
        self.directory = workdir.resolve() / CHECKPOINTS
        self._keep = config.keep
        self._sign = 1.0 if evaluation.mode == "max" else -1.0
        self._criterion = evaluation.criterion
        self._saving = 0
        self._failed = False
        self._bytes = 0
        self._manager: ocp.CheckpointManager | None = None
        self._quiet = OrbaxFilter()

    def save(self, step: int, state: Any, record: RunRecord, metric: float | None) -> None:
        """Begin to save `state`; `metric` is the evaluation at this very step, or None when there was none.

        A metric that is not a number counts as none: it would compare as the best.

        Raises:
          SaveError: this checkpoint, or the one before, cannot be written.
        """
        self.wait()
        self._saving = step
        self._bytes = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(state))
        with self._failing_in_one_line():
            if self._manager is None:
                self._quiet.install()
                self._manager = self._open()
            self._check_space()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    record=ocp.args.JsonSave({"step": step, **dataclasses.asdict(record)}),
                ),
                metrics=self._scored(metric),
                force=True,
            )

    def complete(self, step: int, record: RunRecord, metric: float | None) -> None:
        """Give the checkpoint of `step`, saved in the middle of its evaluation, what `save` after it would have.

        A run that began with another one's checkpoint (`train.resume`) has none of its own, and leaves that alone.

        Raises:
          RunError: its small files cannot be written.
        """
        texts = {
            "record/metadata": json.dumps({"step": step, **dataclasses.asdict(record)}),
            "metrics/metrics": json.dumps(self._scored(metric)),
        }

        def replace() -> None:
            if step in checkpoint_steps(self.directory):
                replace_files(self.directory / str(step), step, texts)

        self._on_leader(replace, f"complete {step}")

    def _scored(self, metric: float | None) -> dict[str, Any]:
        # Empty rather than None, which Orbax would warn of at every save between two evaluations.
        if metric is None or not math.isfinite(metric):
            return {}
        return {"score": self._sign * metric, "criterion": self._criterion}

    def wait(self) -> None:
        """Return when every save is on disk.

        Raises:
          SaveError: the last one cannot be written.
        """
        if self._manager is not None:
            with self._failing_in_one_line():
                self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """The newest checkpoint on disk."""
        return max(checkpoint_steps(self.directory), default=None)

    def restore_latest(self, abstract_state: Any) -> tuple[Any, RunRecord] | None:
        """The newest usable checkpoint, on the devices that `abstract_state` names; None when there is none.

        A damaged checkpoint is reported, set aside under `damaged-<step>`, and the one before it is used.

        Raises:
          CheckpointError: there are checkpoints and none can be read; all stay where they are.
        """
        steps = _newest_first(self.directory)
        if not steps:
            return None
        restored, damaged = _first_usable(
            self.directory, steps, lambda step: restore(self.directory, step, abstract_state)
        )
        if damaged:
            self._on_leader(lambda: self._set_aside(damaged), f"set aside damaged checkpoints {damaged}")
        return restored

    def close(self) -> None:
        """Wait for what is being saved.

        Raises:
          SaveError: it cannot be written.
        """
        try:
            if self._manager is not None:
                with self._failing_in_one_line():
                    self._manager.close()
        finally:
            self._quiet.remove()
            if self._failed and jax.process_index() == 0:
                # Nobody can use the half of a checkpoint, and it takes the space that is missing.
                for partial in self._unfinished(self._saving):
                    paths.remove_tree(partial)

    def _open(self) -> ocp.CheckpointManager:
        self._on_leader(self._tidy, "tidy checkpoints")
        best = policies.BestN(get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False)
        # Orbax knows of Google's store alone that it cannot rename a folder at one moment.
        marked = None if paths.is_local(self.directory) else ocp.path.atomicity.CommitFileTemporaryPath
        return ocp.CheckpointManager(
            os.fspath(self.directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), best]),
                # What is kept is the policy's to say; but without this Orbax writes no metrics, and after a resume
                # neither the policy nor `restore_params` would know the scores of what is there.
                best_fn=self._score,
                # What a killed run was writing is of no use to anyone.
                cleanup_tmp_directories=True,
                temporary_path_class=marked,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=lambda: self._write_checksums(self._saving)),
            ),
        )

    def _score(self, metrics: Mapping[str, Any]) -> float:
        """As Orbax asks for it: what was not evaluated, or by another metric than that of now, is never the best."""
        same = metrics.get("criterion", self._criterion) == self._criterion
        return metrics.get("score", -math.inf) if same else -math.inf

    def _tidy(self) -> None:
        # Orbax reads these small files of all checkpoints at its start, and gives up at the first bad one.
        for step in checkpoint_steps(self.directory):
            folder = self.directory / str(step)
            own = folder / "_CHECKPOINT_METADATA"
            try:
                read_score(folder)
            except ValueError as error:
                logger.warning("checkpoint of step %d in %s is damaged (%s)", step, self.directory, error)
                self._set_aside([step])
                continue
            if own.exists():
                try:
                    read_object(own, "removed, since nothing here needs it")
                except ValueError as error:
                    logger.warning("%s", error)
                    own.unlink()
        for step in unfinished_steps(self.directory):
            # What a killed run was writing is of no use to anyone.
            paths.remove_tree(self.directory / str(step))
        strays = stray_steps(self.directory)
        if strays:
            logger.warning("checkpoints of steps %s in %s are no folders", strays, self.directory)
            self._set_aside(strays)

    def _write_checksums(self, step: int) -> None:
        """Called by Orbax, on one process, when all files are written and the folder has its final name not yet."""
        (folder,) = self._unfinished(step)
        write_checksums(folder, step)

    def _unfinished(self, step: int) -> list[AnyPath]:
        if not paths.is_local(self.directory):
            return [self.directory / str(step)]
        return list(self.directory.glob(f"{step}.orbax-checkpoint-tmp*"))

    def _set_aside(self, steps: list[int]) -> None:
        # Kept for whoever wants to look, and out of the way: the run will come to these steps again.
        for step in steps:
            # On the disk where it is: beside the folder, or in it where that is a link to another disk.
            folder = self.directory.resolve()
            elsewhere = not paths.same_disk(folder, self.directory.parent)
            place = folder if elsewhere else self.directory.parent
            target = place / f"damaged-{step}"
            number = 0
            while paths.lexists(target):
                number += 1
                target = place / f"damaged-{step}-{number}"
            try:
                if not paths.is_local(folder):
                    # Renaming takes its time there, and what it leaves when it is cut off is to be no checkpoint.
                    (folder / str(step) / COMMITTED).unlink(missing_ok=True)
                (folder / str(step)).rename(target)
            except OSError as error:
                raise cannot_write(target, error) from error
            logger.warning("set aside: %s", target)

    @staticmethod
    def _on_leader(change: Callable[[], None], name: str) -> None:
        """Change the folder on one process, while the others wait."""
        if jax.process_index() == 0:
            change()
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(name)

    def _check_space(self) -> None:
        # Where even half the size does not fit, nothing is begun. (Compression gains a few percent of trained arrays;
        # the processes of a run would have to agree, and learn of a full disk from the save itself.)
        local = paths.is_local(self.directory)
        if jax.process_count() == 1 and local and shutil.disk_usage(self.directory.resolve()).free < self._bytes / 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def _failing_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> SaveError:
        self._failed = True
        try:
            good = self.latest_step()
            last = "none" if good is None else f"of step {good}"
        except OSError:  # a bucket that no longer answers
            last = "not to be seen from here"
        # TensorStore says it in several lines, with the names of its own temporary files.
        full = "RESOURCE_EXHAUSTED" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
        why = "the disk is full" if full else _said(error)
        if not paths.is_local(self.directory):
            return SaveError(
                f"the checkpoint of step {self._saving} cannot be written to {self.directory} ({_said(error)}); the "
                f"last good checkpoint is {last}; run the same command again when the bucket can be written to"
            )
        try:
            place = self.directory.resolve() if self.directory.exists() else self.directory.parent
            room = f"{_size(shutil.disk_usage(place).free)} are free"
        except OSError as gone:
            room = f"its folder cannot be reached ({reason(gone)})"
        return SaveError(
            f"the checkpoint of step {self._saving} cannot be written to {self.directory} ({why}); it needs about "
            f"{_size(self._bytes)}, and {room}; the last good checkpoint is "
            f"{last}; free some space and run the same command again"
        )


def restore_newest(directory: AnyPath, abstract_state: Any) -> tuple[Any, RunRecord]:
    """The newest usable checkpoint of another run; what is damaged is reported and left where it is.

    Args:
      directory: a `checkpoints/` folder that has some.
      abstract_state: as for `restore`.

    Raises:
      CheckpointError: none can be read, or they hold other arrays.
    """
    steps = _newest_first(directory)
    restored, _ = _first_usable(directory, steps, lambda step: restore(directory, step, abstract_state))
    return restored


def restore(directory: AnyPath, step: int, abstract_state: Any) -> tuple[Any, RunRecord]:
    """One checkpoint's state and record, after a check of its files.

    Args:
      directory: a `checkpoints/` folder.
      step: which one.
      abstract_state: pytree of `ShapeDtypeStruct` with shardings: any devices, whatever number saved it.

    Raises:
      StructureError: names the first array whose presence or shape differs.
      DamageError: names the file that is not as it was saved.
    """
    folder = directory.resolve() / str(step)
    _verify(folder, step)
    read_score(folder)
    check_structure(folder / "state", abstract_state)
    with ocp.StandardCheckpointer() as arrays:
        state = arrays.restore(os.fspath(folder / "state"), abstract_state)
    return state, read_record(folder / "record" / "metadata", step)


def restore_params(workdir: str | os.PathLike[str], abstract_params: Any, which: str = "best") -> tuple[Any, int]:
    """Parameters of a finished or running run for evaluation or a new start, and the step they are from.

    Averaged parameters (`ema`) are returned where the run kept them, in float32 (or wider) as they were kept. Where the
    checkpoint asked for is damaged, a warning says so and the next one is used: the next best, or the one before.

    Args:
      workdir: the run's folder.
      abstract_params: parameters as `ShapeDtypeStruct` with shardings.
      which: "best" by the run's evaluation metric (the newest where nothing was evaluated), or "latest".

    Raises:
      CheckpointError: no checkpoint there, none that can be read, or one of another model.
    """
    if (why := paths.why_no_run(os.fspath(workdir))) is not None:
        raise CheckpointError(f"{printable(os.fspath(workdir))}: {why}")
    directory = paths.given(workdir).resolve() / CHECKPOINTS
    steps = _newest_first(directory)
    if not steps:
        begun = unfinished_steps(directory)
        without = f" (those of steps {begun} were never committed: they lack {COMMITTED})" if begun else ""
        raise CheckpointError(f"no checkpoint in {directory}{without}: train first with --workdir={workdir}")
    if which == "best":
        steps = best_first(directory, steps)

    def read(step: int) -> tuple[Any, int]:
        folder = directory / str(step)
        _verify(folder, step)
        with ocp.PyTreeCheckpointer() as arrays:
            averaged = saved_tree(folder / "state").get("ema") is not None
            name, wanted = ("ema", widened_shapes(abstract_params)) if averaged else ("params", abstract_params)
            check_structure(folder / "state", {name: wanted}, only=(name,))
            restored = arrays.restore(
                os.fspath(folder / "state"),
                args=ocp.args.PyTreeRestore(
                    item={name: wanted},
                    restore_args=ocp.checkpoint_utils.construct_restore_args({name: wanted}),
                    partial_restore=True,
                ),
            )
        return restored[name], step

    restored, _ = _first_usable(directory, steps, read)
    return restored


def _newest_first(directory: AnyPath) -> list[int]:
    # With those that are no folder, so that they are named and not passed over.
    return sorted(checkpoint_steps(directory) + stray_steps(directory), reverse=True)


def _first_usable(directory: AnyPath, steps: Sequence[int], use: Callable[[int], Any]) -> tuple[Any, list[int]]:
    """`use(step)` of the first step whose checkpoint is not damaged, and the steps that were."""
    damage: dict[int, str] = {}
    for step in steps:
        try:
            if paths.is_local(directory) and not (directory / str(step)).is_dir():
                raise DamageError("is no folder, or a link that leads nowhere")
            result = use(step)
        except StructureError:
            # Not damage: this config describes another model, and the other checkpoints would fail alike.
            raise
        except Exception as error:
            damage[step] = _said(error)
            continue
        for bad, why in damage.items():
            logger.warning(
                "checkpoint of step %d in %s is damaged (%s); using that of step %d instead", bad, directory, why, step
            )
        return result, list(damage)
    reasons = "; ".join(f"step {step}: {why}" for step, why in damage.items())
    raise CheckpointError(
        f"no checkpoint in {directory} can be read ({reasons}); use a new --workdir to start over, or set train.resume "
        "to a run that has one"
    )


def _verify(folder: AnyPath, step: int) -> None:
    """Check the files of a checkpoint, each process its part, with one answer on all of them."""
    damage, checked = "", True
    try:
        checked = verify(folder, step, jax.process_index(), jax.process_count())
    except DamageError as error:
        damage = str(error)
    for said in gathering.texts(damage, longest=256):
        if said:
            raise DamageError(said)
    if not checked:
        logger.warning("checkpoint of step %d in %s has no %s: used unchecked", step, folder.parent, CHECKSUMS)


def _said(error: Exception) -> str:
    line = first_line(error)
    if isinstance(error, DamageError | OSError) or line == type(error).__name__:
        return line[:300]
    return f"{type(error).__name__}: {line[:200]}"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
