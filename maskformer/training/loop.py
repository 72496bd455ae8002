"""`train_and_evaluate`: one run, from its config to its last checkpoint, top to bottom."""

from __future__ import annotations

import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from maskformer.objectives.schedules import in_steps
from maskformer.training.checkpoints import Checkpoints, RunRecord, restore, restore_params
from maskformer.training.checkpoints import checkpoint_steps as saved_steps
from maskformer.training.config import plain
from maskformer.training.preemption import Preempted, PreemptionGuard
from maskformer.training.program import Placed, Program
from maskformer.training.recorder import Recorder
from maskformer.training.sections import EvaluationConfig
from maskformer.training.state import TrainState, wide

logger = logging.getLogger(__name__)


def train_and_evaluate(config: Mapping[str, Any], workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Train as `config` says, evaluating and saving on the way; resume when `workdir` already has checkpoints.

    Call it alike on every process, after `distributed.initialize()`. Where the state comes from, first that applies:
    the newest checkpoint of `workdir`, `train.resume`, `train.init_from`, fresh parameters.

    Args:
      config: a recipe's `ConfigDict`, or the mapping of a run's `config.json`.
      workdir: folder for `config.json`, `metrics.jsonl`, TensorBoard events and `checkpoints/`.

    Returns:
      The metrics of the last evaluation; empty when `evaluation.every` is 0.

    Raises:
      ValueError: the config is wrong (before any device work), or does not fit the devices.
      NonFiniteError: loss or gradient norm stopped being finite.
      Preempted: SIGTERM came, and the state is saved.
    """
    # On the host, so that mistakes in the config and in the text come before the devices start.
    program = Program.of(config)
    train, evaluation, checkpoint = (
        program.experiment.train, program.experiment.evaluation, program.experiment.checkpoint
    )
    workdir = prepare_workdir(workdir)
    check_same_run(plain(config), workdir)
    program.prepare_data()

    # On the devices.
    placed = program.on()
    placed.check_batch()
    for line in placed.dropped:
        logger.warning("sharding: %s", line)
    checkpoints = Checkpoints(workdir, checkpoint, evaluation)
    state, record = starting_state(placed, checkpoints)
    start = int(state.step)
    batches = iter(placed.train_batches(record.next_example))
    leader = jax.process_index() == 0
    if leader:
        (workdir / "config.json").write_text(json.dumps(plain(config), indent=2) + "\n")
    recorder = Recorder(placed, workdir, plain(config), record, checkpoints, start, leader)

    results: dict[str, float] = {}
    try:
        with PreemptionGuard() as guard:
            for step in range(start + 1, train.steps + 1):
                if out_of_patience(record, evaluation):
                    break
                state = placed.train_step(state, next(batches))
                record.next_example += train.batch_size
                last = step == train.steps
                evaluates = evaluation.every > 0 and (last or step % evaluation.every == 0)
                saves = last or (checkpoint.every > 0 and step % checkpoint.every == 0)
                preempted = guard.requested(step)

                if last or step % train.log_every == 0:
                    recorder.window(step, state.window)
                    state = state.replace(window=placed.empty_window())
                # The step path waits for no metrics, unless something is about to be made of them.
                recorder.settle(wait=evaluates or saves or preempted)
                if evaluates:
                    results = placed.evaluate(state.evaluation_params)
                    recorder.evaluation(step, results, improved=update_best(record, results, evaluation))
                if saves or preempted or (evaluates and out_of_patience(record, evaluation)):
                    # A checkpoint never holds a step that was not finite, and never runs ahead of metrics.jsonl.
                    recorder.check(state.window)
                    recorder.flush()
                    checkpoints.save(step, state, record, results.get(evaluation.metric) if evaluates else None)
                if preempted and not last:
                    checkpoints.wait()
                    raise Preempted(step)
                if evaluates or saves:
                    recorder.resume()
            # Still under the guard: a SIGTERM now must not cut off the last checkpoint.
            checkpoints.wait()
        if not results and evaluation.every:
            # The run was complete already: say again how good it is, and record nothing twice.
            results = placed.evaluate(state.evaluation_params)
    finally:
        recorder.close()
        checkpoints.close()
    return results


def starting_state(placed: Placed, checkpoints: Checkpoints) -> tuple[TrainState, RunRecord]:
    """Where a run begins: its own newest checkpoint, or that of `train.resume`, or the parameters of
    `train.init_from`, or fresh ones.
    """
    train = placed.program.experiment.train
    restored = checkpoints.restore_latest(placed.state)
    if restored is None and train.resume is not None:
        theirs = pathlib.Path(train.resume).resolve() / "checkpoints"
        if not saved_steps(theirs):
            raise ValueError(f"train.resume={train.resume!r}: no checkpoint in {theirs}")
        restored = restore(theirs, saved_steps(theirs)[-1], placed.state)
    if restored is not None:
        return restored
    state = placed.init()
    if train.init_from is not None:
        params, _ = restore_params(pathlib.Path(train.init_from), placed.params)
        ema = None if state.ema is None else jax.tree.map(lambda leaf: jax.numpy.copy(wide(leaf)), params)
        state = state.replace(params=params, ema=ema)
    return state, RunRecord()


def prepare_workdir(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Make the folder and prove that it can be written to, or raise a one-line ValueError."""
    path = pathlib.Path(workdir).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"workdir={os.fspath(workdir)!r}: cannot be written to ({error.strerror}); choose another --workdir"
        ) from error
    return path


def check_same_run(config: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Refuse to continue the run in `workdir` as another one.

    Its length, optimizer, evaluation and mesh may change; its model, data, objective and seed may not: the record would
    then tell of a run that never was.

    Raises:
      ValueError: names the first key that differs.
    """
    record = workdir / "config.json"
    if not record.is_file() or not saved_steps(workdir / "checkpoints"):
        return
    before = json.loads(record.read_text())
    for section in ("seed", "data", "objective", "model"):
        ours, theirs = config[section], before.get(section)
        if section == "objective":
            # A share of the run is another step in a run of another length.
            ours = in_steps(ours, config["train"]["steps"])
            theirs = in_steps(theirs, before["train"]["steps"])
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            # A run from before a key existed lacks it, and had what is now its empty default.
            unset = (None, {})
            keys = [
                key
                for key in sorted(ours.keys() | theirs.keys())
                if ours.get(key) != theirs.get(key) and not (ours.get(key) in unset and theirs.get(key) in unset)
            ]
            if not keys:
                continue
            section, ours, theirs = f"{section}.{keys[0]}", ours.get(keys[0]), theirs.get(keys[0])
        elif ours == theirs:
            continue
        raise ValueError(
            f"{section}={ours!r}: the run in {workdir} has {theirs!r}; use a new --workdir "
            "(train.init_from takes over its parameters)"
        )


def update_best(record: RunRecord, results: Mapping[str, float], config: EvaluationConfig) -> bool:
    """Note the evaluation in the record; True when it is the best so far.

    Raises:
      ValueError: `evaluation.metric` is not among the results.
    """
    if config.metric not in results:
        raise ValueError(f"evaluation.metric={config.metric!r}: expected one of {', '.join(results)}")
    value = results[config.metric]
    gain = 0.0 if record.best is None else (record.best - value if config.mode == "min" else value - record.best)
    improved = record.best is None or gain > config.min_improvement
    if improved:
        record.best, record.evaluations_since_best = value, 0
    else:
        record.evaluations_since_best += 1
    return improved


def out_of_patience(record: RunRecord, config: EvaluationConfig) -> bool:
    """Whether training stops early; asked of the record each time, so that a run resumed with more patience goes on."""
    return config.patience is not None and record.evaluations_since_best >= config.patience
