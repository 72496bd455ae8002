"""`train_and_evaluate`: one run, from its config to its last checkpoint, top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax

from maskformer import paths
from maskformer.training.best import continue_record, out_of_patience, update_best
from maskformer.training.checkpoints import Checkpoints, RunRecord, restore_newest, restore_params
from maskformer.training.compilation import use_cache
from maskformer.training.experiment import plain
from maskformer.training.hangs import Watchdog
from maskformer.training.local_tier import LocalTier, local_tier
from maskformer.training.lock import Lock
from maskformer.training.phases import Phases
from maskformer.training.precision import average_start
from maskformer.training.preemption import Preempted, PreemptionGuard
from maskformer.training.program import Placed, Program, Stopped
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
    config: Mapping[str, Any], workdir: str | os.PathLike[str], *, steal: bool = False, phases: Phases | None = None
) -> dict[str, float]:
    """Train as `config` says, evaluating and saving on the way; resume when `workdir` already has checkpoints.

    Call it alike on every process, after `distributed.initialize()`. Where the state comes from, first that applies:
    the newest checkpoint of `workdir`, `train.resume`, `train.init_from`, fresh parameters.

    Args:
      config: a recipe's `ConfigDict`, or the mapping of a run's `config.json`.
      workdir: folder for `config.json`, `metrics.jsonl`, TensorBoard events and `checkpoints/`.
      steal: take the workdir over from another training that still has it, see `lock.Lock`.
      phases: of a start that began before this call, as with the imports of `maskformer train`.

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
    phases = Phases() if phases is None else phases
    program = Program.of(config)
    train, evaluation = program.experiment.train, program.experiment.evaluation
    checkpoint = program.experiment.checkpoint
    workdir = prepare_workdir(workdir)
    check_same_run(plain(config), workdir)
    check_sources(train, workdir)
    check_writers(program.experiment.writers)
    with phases("data"):
        program.prepare_data()

    # On the devices.
    with phases("devices"):
        use_cache()
        placed = program.on()
        placed.check_batch()
        for line in placed.dropped:
            logger.warning("sharding: %s", line)
        leader = jax.process_index() == 0

    results: dict[str, float] = {}
    with contextlib.ExitStack() as on_exit:
        guard = on_exit.enter_context(PreemptionGuard())
        lock = on_exit.enter_context(Lock(workdir, steal)) if leader else None
        on_exit.enter_context(phases)
        phases.record(workdir if leader else None, describe_devices(placed))
        on_exit.enter_context(Watchdog(phases, program.experiment.watchdog, workdir))
        checkpoints = Checkpoints(workdir, checkpoint, evaluation)
        on_exit.callback(checkpoints.close)
        local = local_tier(checkpoint, workdir, placed.state)
        if local is not None:
            on_exit.callback(local.wait)
        with phases("restore"):
            state, record = starting_state(placed, checkpoints, local)
        if local is not None:
            local.begin()
        continue_record(record, train.steps, evaluation)
        start = int(state.step)
        if leader:
            write_config(workdir, plain(config))
        recorder = Recorder(placed, workdir, plain(config), record, checkpoints, phases, start, leader)
        on_exit.callback(recorder.close)
        batches = iter(placed.train_batches(record.next_example))

        def evaluate(step: int) -> bool:
            """Evaluate the state, unless a signal stops it: then the run that goes on from here is to do it."""
            nonlocal results
            try:
                with phases("evaluation", step):
                    results = placed.evaluate(state.evaluation_params, stop=guard.requested)
            except Stopped:
                return False
            recorder.evaluation(step, results, improved=update_best(record, results, evaluation))
            return True

        if record.evaluation_due and evaluation.every:
            recorder.pause(state)
            if not evaluate(start):
                raise Preempted(start, guard.exit_code)
            record.evaluation_due = False
            recorder.flush()
            checkpoints.complete(start, record, results.get(evaluation.metric))
            recorder.resume()
        record.evaluation_due = False
        if leader and not results and start >= train.steps:
            more = 2 * max(start, 1)
            logger.warning(
                "nothing to do: step %d of %d is reached; --config.train.steps=%d goes on", start, train.steps, more
            )

        for step in phases.steps(start + 1, train.steps):
            if out_of_patience(record, evaluation):
                break
            state = placed.train_step(state, phases.batch(batches, state.step))
            record.next_example += train.batch_size
            last = step == train.steps
            evaluates = evaluation.every > 0 and (last or step % evaluation.every == 0)
            saves = last or (checkpoint.every > 0 and step % checkpoint.every == 0)
            keeps = local is not None and step % checkpoint.local_every == 0 and not saves
            preempted = guard.requested()
            if lock is not None:
                lock.check()

            if last or step % train.log_every == 0:
                recorder.window(step, state.window)
                state = dataclasses.replace(state, window=placed.empty_window())
            # The step path waits for no metrics, unless something is about to be made of them.
            stops = evaluates or saves or keeps
            recorder.settle(wait=stops or preempted)
            if stops:
                recorder.pause(state)
            evaluated = evaluates and not preempted and evaluate(step)
            record.evaluation_due = evaluates and not evaluated
            if evaluates:  # which takes its time, in which a signal may come
                preempted = preempted or guard.requested()
            if saves or preempted or (evaluated and out_of_patience(record, evaluation)):
                with phases("checkpoint", step):
                    # A checkpoint never holds a step that was not finite, and never runs ahead of metrics.jsonl.
                    recorder.check(state.window)
                    recorder.flush()
                    checkpoints.save(step, state, record, results.get(evaluation.metric) if evaluated else None)
                    preempted = preempted or guard.requested()
                    if preempted and (record.evaluation_due or not last):
                        checkpoints.wait()
                        raise Preempted(step, guard.exit_code)
            elif local is not None and keeps:
                with phases("checkpoint", step):
                    recorder.check(state.window)
                    recorder.flush()
                    local.save(step, state, record)
            if stops:
                recorder.resume()
        # Still under the guard: a SIGTERM now must not cut off the last checkpoint.
        checkpoints.wait()
        if local is not None:
            local.remove()
        if not results and evaluation.every:
            # The run was complete already: say again how good it is, and record nothing twice.
            with phases("evaluation"):
                results = placed.evaluate(state.evaluation_params)
    return results


def describe_devices(placed: Placed) -> dict[str, Any]:
    """What a run computes on, for its events."""
    kind = placed.mesh.devices.flat[0].device_kind
    return {"processes": jax.process_count(), "devices": placed.mesh.size, "device_kind": kind}


def starting_state(
    placed: Placed, checkpoints: Checkpoints, local: LocalTier | None = None
) -> tuple[TrainState, RunRecord]:
    """Where a run begins: its own newest checkpoint, or that of `train.resume`, or the parameters of
    `train.init_from`, or fresh ones.
    """
    train = placed.program.experiment.train
    latest = checkpoints.latest_step()
    restored = None if local is None else local.restore(newer_than=-1 if latest is None else latest)
    if restored is None:
        restored = checkpoints.restore_latest(placed.state)
    if restored is None and train.resume is not None:
        restored = restore_newest(paths.given(train.resume).resolve() / CHECKPOINTS, placed.state)
    if restored is not None:
        return restored
    state = placed.init()
    if train.init_from is not None:
        params, _ = restore_params(train.init_from, placed.params)
        # An average is wider than the parameters that begin with it.
        params = jax.tree.map(lambda array, wanted: array.astype(wanted.dtype), params, placed.params)
        # The optimizer's state and the average begin at these parameters: both may hold copies of them.
        ema = None
        if state.ema is not None:
            ema = jax.device_put(average_start(params), jax.tree.map(lambda leaf: leaf.sharding, state.ema))
        state = dataclasses.replace(state, params=params, opt_state=placed.init_optimizer(params), ema=ema)
    return state, RunRecord()
