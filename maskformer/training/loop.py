"""`train_and_evaluate`: one run, from its config to its last checkpoint, top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from maskformer.training.best import continue_record, out_of_patience, update_best
from maskformer.training.checkpoints import Checkpoints, RunRecord, restore_newest, restore_params
from maskformer.training.experiment import plain
from maskformer.training.lock import Lock
from maskformer.training.precision import average_start
from maskformer.training.preemption import Preempted, PreemptionGuard
from maskformer.training.program import Placed, Program
from maskformer.training.recorder import Recorder
from maskformer.training.state import TrainState
from maskformer.training.workdir import (
    CHECKPOINTS,
    check_same_run,
    check_sources,
    prepare_workdir,
    write_config,
)
from maskformer.training.writers import check_writers

logger = logging.getLogger(__name__)


def train_and_evaluate(
    config: Mapping[str, Any], workdir: str | os.PathLike[str], *, steal: bool = False
) -> dict[str, float]:
    """Train as `config` says, evaluating and saving on the way; resume when `workdir` already has checkpoints.

    Call it alike on every process, after `distributed.initialize()`. Where the state comes from, first that applies:
    the newest checkpoint of `workdir`, `train.resume`, `train.init_from`, fresh parameters.

    Args:
      config: a recipe's `ConfigDict`, or the mapping of a run's `config.json`.
      workdir: folder for `config.json`, `metrics.jsonl`, TensorBoard events and `checkpoints/`.
      steal: take the workdir over from another training that still has it, see `lock.Lock`.

    Returns:
      The metrics of the last evaluation; empty when `evaluation.every` is 0.

    Raises:
      ValueError: the config is wrong (before any device work), or does not fit the devices, or another training has
        the workdir.
      Preempted: SIGTERM or SIGINT came, and the state is saved.
      RunError: the run cannot go on: a NonFiniteError where the loss is no number any more, a SaveError where the disk
        is full, a LockLostError where another training took the workdir over.
    """
    # On the host, so that mistakes in the config and in the text come before the devices start.
    program = Program.of(config)
    train, evaluation = program.experiment.train, program.experiment.evaluation
    checkpoint = program.experiment.checkpoint
    workdir = prepare_workdir(workdir)
    check_same_run(plain(config), workdir)
    check_sources(train, workdir)
    check_writers(program.experiment.writers)
    program.prepare_data()

    # On the devices.
    placed = program.on()
    placed.check_batch()
    for line in placed.dropped:
        logger.warning("sharding: %s", line)
    if (schedule := placed.describe_pipeline()) is not None:
        logger.info("pipeline: %s", schedule)
    leader = jax.process_index() == 0

    results: dict[str, float] = {}
    with contextlib.ExitStack() as on_exit:
        guard = on_exit.enter_context(PreemptionGuard())
        lock = on_exit.enter_context(Lock(workdir, steal)) if leader else None
        checkpoints = Checkpoints(workdir, checkpoint, evaluation)
        on_exit.callback(checkpoints.close)
        state, record = starting_state(placed, checkpoints)
        continue_record(record, train.steps, evaluation)
        start = int(state.step)
        if leader:
            write_config(workdir, plain(config))
        recorder = Recorder(placed, workdir, plain(config), record, checkpoints, start, leader)
        on_exit.callback(recorder.close)
        batches = iter(placed.train_batches(record.next_example))

        for step in range(start + 1, train.steps + 1):
            if out_of_patience(record, evaluation):
                break
            state = placed.train_step(state, next(batches))
            record.next_example += train.batch_size
            last = step == train.steps
            evaluates = evaluation.every > 0 and (last or step % evaluation.every == 0)
            saves = last or (checkpoint.every > 0 and step % checkpoint.every == 0)
            preempted = guard.requested(step)
            if lock is not None:
                lock.check()

            if last or step % train.log_every == 0:
                recorder.window(step, state.window)
                state = dataclasses.replace(state, window=placed.empty_window())
            # The step path waits for no metrics, unless something is about to be made of them.
            recorder.settle(wait=evaluates or saves or preempted)
            if evaluates or saves:
                recorder.pause(state)
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
                raise Preempted(step, guard.exit_code)
            if evaluates or saves:
                recorder.resume()
        # Still under the guard: a SIGTERM now must not cut off the last checkpoint.
        checkpoints.wait()
        if not results and evaluation.every:
            # The run was complete already: say again how good it is, and record nothing twice.
            results = placed.evaluate(state.evaluation_params)
    return results


def starting_state(placed: Placed, checkpoints: Checkpoints) -> tuple[TrainState, RunRecord]:
    """Where a run begins: its own newest checkpoint, or that of `train.resume`, or the parameters of
    `train.init_from`, or fresh ones.
    """
    train = placed.program.experiment.train
    restored = checkpoints.restore_latest(placed.state)
    if restored is None and train.resume is not None:
        restored = restore_newest(pathlib.Path(train.resume).resolve() / CHECKPOINTS, placed.state)
    if restored is not None:
        return restored
    state = placed.init()
    if train.init_from is not None:
        params, _ = restore_params(pathlib.Path(train.init_from), placed.params)
        # An average is wider than the parameters that begin with it.
        params = jax.tree.map(lambda array, wanted: array.astype(wanted.dtype), params, placed.params)
        # The optimizer's state and the average begin at these parameters: both may hold copies of them.
        ema = None
        if state.ema is not None:
            ema = jax.device_put(average_start(params), jax.tree.map(lambda leaf: leaf.sharding, state.ema))
        state = dataclasses.replace(state, params=params, opt_state=placed.init_optimizer(params), ema=ema)
    return state, RunRecord()
