"""Checkpoints of a run with Orbax: the state's arrays, and a small JSON record beside them."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from maskformer.training.sections import CheckpointConfig, EvaluationConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class RunRecord:
    """What a run remembers beside its arrays; everything in it is JSON.

    Attributes:
      next_example: global index of the first example that no finished step has used. It names a place in the
        stream of epochs, independent of batch size and number of processes.
      tokens, predicted: seen and predicted so far, padding not counted.
      best: best evaluation so far of `evaluation.metric`; None before the first.
      evaluations_since_best: for early stopping.
    """

    next_example: int = 0
    tokens: int = 0
    predicted: int = 0
    best: float | None = None
    evaluations_since_best: int = 0


class CheckpointError(RuntimeError):
    """No usable checkpoint where one was asked for."""


class Checkpoints:
    """The `checkpoints/` folder of a workdir.

    Saving is asynchronous: `save` copies the arrays off the device and returns; a step folder appears under its
    final name only when it is whole. The newest `keep` are kept, and the best by the evaluation metric.
    """

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig, evaluation: EvaluationConfig):
        self.directory = workdir.resolve() / "checkpoints"
        self._sign = 1.0 if evaluation.mode == "max" else -1.0
        best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(config.keep), best]),
                # What is kept is the policy's to say; but without this Orbax writes no metrics, and after a resume
                # neither the policy nor `best_step` would know the scores of what is there.
                best_fn=_score,
                # What a killed run was writing is of no use to anyone.
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def save(self, step: int, state: Any, record: RunRecord, metric: float | None) -> None:
        """Begin to save `state`; `metric` is the evaluation at this very step, or None when there was none.

        A metric that is not a number counts as none: it would compare as the best.
        """
        scored = metric is not None and math.isfinite(metric)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(dataclasses.asdict(record))
            ),
            # Empty rather than None, which Orbax would warn of at every save between two evaluations.
            metrics={"score": self._sign * metric} if scored else {},
            force=True,
        )

    def wait(self) -> None:
        """Return when every save is on disk."""
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore_latest(self, abstract_state: Any) -> tuple[Any, RunRecord] | None:
        """The newest usable checkpoint, on the devices that `abstract_state` names; None when there is none.

        A damaged checkpoint is reported, set aside under `damaged-<step>`, and the one before it is used.

        Raises:
          CheckpointError: there are checkpoints and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        reasons = []
        for step in steps:
            try:
                return restore(self.directory, step, abstract_state)
            except StructureError:
                # Not damage: this config describes another model, and older checkpoints would fail alike.
                raise
            except Exception as error:
                reasons.append(f"step {step}: {_first_line(error)}")
                logger.warning(
                    "checkpoint of step %d in %s is damaged (%s); set aside as 'damaged-%d', trying the one before",
                    step, self.directory, _first_line(error), step,
                )
                self._set_aside(step)
        if reasons:
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be read ({'; '.join(reasons)}); "
                "use a new --workdir to start over, or set train.resume to a run that has one"
            )
        return None

    def close(self) -> None:
        self._manager.close()

    def _set_aside(self, step: int) -> None:
        # Kept for whoever wants to look, and out of the way: the run will come to this step again.
        if jax.process_index() == 0:
            source = self.directory / str(step)
            target = self.directory.parent / f"damaged-{step}"
            number = 0
            while target.exists():
                number += 1
                target = self.directory.parent / f"damaged-{step}-{number}"
            source.rename(target)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"set aside damaged checkpoint {step}")
        self._manager.reload()


class StructureError(CheckpointError):
    """The checkpoint holds other arrays than the config describes."""


def restore(directory: pathlib.Path, step: int, abstract_state: Any) -> tuple[Any, RunRecord]:
    """One checkpoint's state and record.

    Args:
      directory: a `checkpoints/` folder.
      step: which one.
      abstract_state: pytree of `ShapeDtypeStruct` with shardings: any devices, whatever number saved it.

    Raises:
      StructureError: names the first array whose presence or shape differs.
    """
    folder = directory.resolve() / str(step)
    _check_structure(folder / "state", abstract_state)
    with ocp.StandardCheckpointer() as arrays:
        state = arrays.restore(folder / "state", abstract_state)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as records:
        record = records.restore(folder / "record")
    return state, RunRecord(**record)


def restore_params(workdir: pathlib.Path, abstract_params: Any, which: str = "best") -> tuple[Any, int]:
    """Parameters of a finished or running run for evaluation or a new start, and the step they are from.

    Averaged parameters (`ema`) are returned where the run kept them.

    Args:
      workdir: the run's folder.
      abstract_params: parameters as `ShapeDtypeStruct` with shardings.
      which: "best" by the run's evaluation metric (the newest where nothing was evaluated), or "latest".

    Raises:
      CheckpointError: no checkpoint there, or one of another model.
    """
    directory = pathlib.Path(workdir).resolve() / "checkpoints"
    steps = checkpoint_steps(directory)
    if not steps:
        raise CheckpointError(f"no checkpoint in {directory}: train first with --workdir={workdir}")
    step = steps[-1] if which == "latest" else best_step(directory, steps)
    folder = directory / str(step) / "state"
    with ocp.PyTreeCheckpointer() as arrays:
        saved = arrays.metadata(folder).item_metadata.tree
        name = "ema" if saved.get("ema") is not None else "params"
        _check_structure(folder, {name: abstract_params}, only=(name,))
        restored = arrays.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item={name: abstract_params},
                restore_args=ocp.checkpoint_utils.construct_restore_args({name: abstract_params}),
                partial_restore=True,
            ),
        )
    return restored[name], step


def checkpoint_steps(directory: pathlib.Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit())


def best_step(directory: pathlib.Path, steps: list[int]) -> int:
    """The step with the highest score (the evaluation metric, negated where lower is better), or the newest.

    Only checkpoints saved at a step that was evaluated have a score.
    """
    scores = {}
    for step in steps:
        metrics = directory / str(step) / "metrics" / "metrics"
        if metrics.exists():
            scores[step] = _score(json.loads(metrics.read_text()))
    return max(scores, key=lambda step: (scores[step], step)) if scores else steps[-1]


def _score(metrics: Mapping[str, float]) -> float:
    return metrics.get("score", -math.inf)


def _check_structure(folder: pathlib.Path, abstract: Any, only: tuple[str, ...] | None = None) -> None:
    with ocp.PyTreeCheckpointer() as arrays:
        tree = arrays.metadata(folder).item_metadata.tree
    if only is not None:
        tree = {name: tree[name] for name in only if name in tree}
    saved = _leaves(tree)
    expected = _leaves(abstract)
    for name in sorted(saved.keys() | expected.keys()):
        if name not in saved or name not in expected:
            holder, other = ("config", "checkpoint") if name in expected else ("checkpoint", "config")
            raise StructureError(
                f"checkpoint {folder.parent}: the {holder} has '{name}' and the {other} has not; "
                "use the config that the run was started with, or a new --workdir"
            )
        if saved[name] != expected[name]:
            raise StructureError(
                f"checkpoint {folder.parent}: '{name}' has shape {saved[name]} and the config asks for "
                f"{expected[name]}; use the config that the run was started with, or a new --workdir"
            )


def _leaves(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape, alike for a state and for the nested dicts that Orbax describes it with."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {
        "/".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path): tuple(
            leaf.shape
        )
        for path, leaf in leaves
        if hasattr(leaf, "shape") and leaf.shape is not None
    }


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
