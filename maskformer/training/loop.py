"""`train_and_evaluate`: one run, from its config to its last checkpoint, top to bottom."""

from __future__ import annotations

import functools
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from maskformer import data, evaluation, models
from maskformer.objectives.schedules import in_steps
from maskformer.training import sharding
from maskformer.training.checkpoints import Checkpoints, RunRecord, restore, restore_params
from maskformer.training.checkpoints import checkpoint_steps as saved_steps
from maskformer.training.config import plain, resolve
from maskformer.training.losses import mean_names
from maskformer.training.optimizer import create_optimizer, create_schedule
from maskformer.training.precision import average_start
from maskformer.training.preemption import Preempted, PreemptionGuard
from maskformer.training.sections import EvaluationConfig
from maskformer.training.state import NEVER, TrainState, Window, create_state
from maskformer.training.step import create_eval_step, create_train_step
from maskformer.training.throughput import Clock
from maskformer.training.writers import Progress, create_writers

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A watched metric became NaN or infinite; nothing after it was saved."""


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
    experiment = resolve(config)
    train, evaluate_config = experiment.train, experiment.evaluation
    schedule = create_schedule(experiment.optimizer, train.steps)
    workdir = prepare_workdir(workdir)
    check_same_run(plain(config), workdir)

    # Data: text -> packed rows. Everything on the host, so that its mistakes come before the devices start.
    tokenizer = data.load_tokenizer(experiment.data)
    vocabulary = tokenizer.vocabulary
    dataset = data.load_dataset(experiment.data, "train", tokenizer)
    held_out = data.load_dataset(experiment.data, evaluate_config.split, tokenizer) if evaluate_config.every else None
    objective = experiment.create_objective(vocabulary)
    model = models.create(experiment.create_model_config(vocabulary))

    # Devices.
    mesh = sharding.create_mesh(experiment.mesh)
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    process_slice = sharding.row_slice(mesh, train.batch_size)
    sharding.row_slice(mesh, train.batch_size // train.accumulation_steps)  # each part divides over the mesh too
    leader = jax.process_index() == 0

    # State: shapes first, so that every device makes or reads only its own part.
    optimizer = create_optimizer(experiment.optimizer, schedule, model.logical_axes())
    ema = experiment.optimizer.ema_decay is not None

    def init(key: jax.Array) -> TrainState:
        return create_state(key, model.init, optimizer, objective, ema)

    root = jax.random.key(experiment.seed)
    shapes = jax.eval_shape(init, root)
    rules, dropped = sharding.create_rules(mesh, model.config)
    for line in dropped:
        logger.warning("sharding: %s", line)
    placed = functools.partial(sharding.activations, mesh, rules, experiment.mesh.context_method)
    params_at = sharding.param_shardings(mesh, model.logical_axes(), rules)
    state_at = TrainState(
        step=everywhere,
        params=params_at,
        opt_state=sharding.optimizer_shardings(mesh, optimizer, shapes.opt_state, shapes.params, params_at),
        ema=params_at if ema else None,
        window=jax.tree.map(lambda _: everywhere, shapes.window),
        token_losses=None if shapes.token_losses is None else everywhere,
    )
    abstract = jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where), shapes, state_at
    )
    checkpoints = Checkpoints(workdir, experiment.checkpoint, evaluate_config)
    restored = checkpoints.restore_latest(abstract)
    if restored is None and train.resume is not None:
        theirs = pathlib.Path(train.resume).resolve() / "checkpoints"
        if not saved_steps(theirs):
            raise ValueError(f"train.resume={train.resume!r}: no checkpoint in {theirs}")
        restored = restore(theirs, saved_steps(theirs)[-1], abstract)
    if restored is not None:
        state, record = restored
    else:
        state, record = jax.jit(init, out_shardings=state_at)(root), RunRecord()
        if train.init_from is not None:
            params, _ = restore_params(pathlib.Path(train.init_from), abstract.params)
            # Anew, since a state may hold a copy of the parameters.
            opt_state = jax.jit(optimizer.init, out_shardings=state_at.opt_state)(params)
            state = state.replace(params=params, opt_state=opt_state, ema=average_start(params) if ema else None)
    start = int(state.step)

    # Steps.
    train_step = jax.jit(
        create_train_step(
            model,
            objective,
            optimizer,
            schedule,
            seed=experiment.seed,
            accumulation_steps=train.accumulation_steps,
            label_smoothing=train.label_smoothing,
            ema_decay=experiment.optimizer.ema_decay,
            placed=placed,
        ),
        in_shardings=(state_at, rows),
        out_shardings=state_at,
        donate_argnums=0,
    )
    empty_window = jax.jit(functools.partial(Window.empty, mean_names(objective)), out_shardings=everywhere)
    unigram = evaluation.unigram_baseline(dataset)
    eval_step = jax.jit(
        create_eval_step(
            model,
            experiment.create_objective(vocabulary, **evaluate_config.objective),
            seed=evaluate_config.seed,
            unigram=jax.numpy.asarray(unigram),
            placed=placed,
        ),
        in_shardings=(params_at, rows),
        out_shardings=everywhere,
    )

    # Records.
    if leader:
        (workdir / "config.json").write_text(json.dumps(plain(config), indent=2) + "\n")
    writers = create_writers(workdir, experiment.writers, plain(config), start) if leader else []
    progress = Progress(train.steps, start, experiment.writers.progress) if leader else None
    predicted_share = objective.budget / objective.output_length
    # Of a token of the text: its row may be run in several copies, under other masks.
    flops_per_token = model.flops_per_token(objective.output_length, predicted_share) * objective.copies
    clock = Clock(flops_per_token, list(mesh.devices.flat))
    if progress is not None:
        progress.line(
            f"{model.num_params():,} parameters, {len(dataset):,} rows of {experiment.data.length} tokens, "
            f"{mesh.size} {jax.devices()[0].device_kind} device(s), from step {start} of {train.steps} in {workdir}"
        )

    def write_window(step: int, window: Window) -> None:
        """Wait for the window's sums (in flight since its last step) and write its line."""
        host = jax.device_get(window)
        check_finite(host, checkpoints)
        tokens = int(host.counts["tokens"])
        record.tokens += tokens
        record.predicted += int(host.counts["predicted"])
        metrics = {name: float(total / max(host.weights[name], 1.0)) for name, total in host.sums.items()}
        metrics |= {
            "learning_rate": float(host.learning_rate),
            "tokens_seen": record.tokens,
            "tokens_predicted": record.predicted,
            "flops": record.tokens * flops_per_token,
        }
        metrics |= clock.rates(tokens)
        for writer in writers:
            writer.write(step, {f"train/{name}": value for name, value in metrics.items()})
        if progress is not None:
            progress.train(step, metrics)

    results: dict[str, float] = {}
    pending: tuple[int, Window] | None = None
    try:
        with PreemptionGuard() as guard:
            batches = dataset.train_batches(
                train.batch_size, experiment.seed, *process_slice, start_example=record.next_example
            )
            for step in range(start + 1, train.steps + 1):
                if record.stopped_early:
                    break
                state = train_step(state, sharding.to_global(next(batches), rows))
                record.next_example += train.batch_size
                last = step == train.steps
                evaluates = evaluate_config.every > 0 and (last or step % evaluate_config.every == 0)
                saves = last or (experiment.checkpoint.every > 0 and step % experiment.checkpoint.every == 0)
                preempted = guard.requested(step)

                if last or step % train.log_every == 0:
                    if pending is not None:
                        write_window(*pending)
                    jax.tree.map(lambda array: array.copy_to_host_async(), state.window)
                    pending, state = (step, state.window), state.replace(window=empty_window())
                if pending is not None and (
                    evaluates or saves or preempted or all(leaf.is_ready() for leaf in jax.tree.leaves(pending[1]))
                ):
                    write_window(*pending)
                    pending = None

                improved = False
                if evaluates:
                    results = run_evaluation(eval_step, state.evaluation_params, held_out, evaluate_config, mesh)
                    improved = update_best(record, results, evaluate_config)
                    for writer in writers:
                        writer.write(
                            step, {f"{evaluate_config.split}/{name}": value for name, value in results.items()}
                        )
                    if progress is not None:
                        progress.line(evaluation_line(step, evaluate_config.split, results, improved))
                if saves or preempted or record.stopped_early:
                    # A checkpoint never holds a step that was not finite, and never runs ahead of metrics.jsonl.
                    check_finite(jax.device_get(state.window), checkpoints)
                    for writer in writers:
                        writer.flush()
                    checkpoints.save(step, state, record, results.get(evaluate_config.metric) if evaluates else None)
                if preempted and not last:
                    checkpoints.wait()
                    raise Preempted(step)
                if evaluates or saves:
                    clock.resume()
            # Still under the guard: a SIGTERM now must not cut off the last checkpoint.
            checkpoints.wait()
        if not results and held_out is not None:
            # The run was complete already: say again how good it is, and record nothing twice.
            results = run_evaluation(eval_step, state.evaluation_params, held_out, evaluate_config, mesh)
    finally:
        if progress is not None:
            progress.close()
        for writer in writers:
            writer.close()
        checkpoints.close()
    return results


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


def run_evaluation(
    eval_step: Any, params: Any, dataset: Any, config: EvaluationConfig, mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """Metrics of `params` over the split, each example once, whatever the number of processes."""
    return evaluation.finish(total_sums(eval_step, params, dataset, config, mesh))


def total_sums(
    eval_step: Any, params: Any, dataset: Any, config: EvaluationConfig, mesh: jax.sharding.Mesh
) -> dict[str, np.ndarray]:
    """The sums of `eval_step(params, batch)` over the split, each example once, whatever the number of processes."""
    rows = sharding.batch_sharding(mesh)
    batches: Iterable[Mapping[str, np.ndarray]] = dataset.eval_batches(
        config.batch_size, *sharding.row_slice(mesh, config.batch_size), max_batches=config.max_batches
    )
    parts = [eval_step(params, sharding.to_global(batch, rows)) for batch in batches]
    # One fetch at the end; added in float64, so that the order and number of batches do not show.
    totals: dict[str, Any] = {}
    for part in jax.device_get(parts):
        for name, pair in part.items():
            totals[name] = totals.get(name, 0.0) + np.asarray(pair, np.float64)
    return totals


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
    record.stopped_early = config.patience is not None and record.evaluations_since_best >= config.patience
    return improved


def check_finite(window: Window, checkpoints: Checkpoints) -> None:
    """Raise when a watched metric of the (host) window was NaN or infinite, naming it and the first bad step."""
    step, name = min((int(step), name) for name, step in window.nonfinite.items())
    if step < NEVER:
        good = checkpoints.latest_step()
        raise NonFiniteError(
            f"train/{name} is NaN or infinite at step {step}; the last good checkpoint is "
            f"{'none' if good is None else checkpoints.directory / str(good)}; lower optimizer.learning_rate or "
            "optimizer.clip_norm, or lengthen optimizer.warmup_steps"
        )


def evaluation_line(step: int, split: str, results: Mapping[str, float], improved: bool) -> str:
    line = f"{split} at step {step}: loss {results['loss']:.4f}, "
    if "perplexity" in results:  # not every loss has one, see `evaluation.objective_sums`
        line += f"perplexity {results['perplexity']:.2f}, "
    line += f"accuracy {results['accuracy']:.2%} (top 5 {results['accuracy_top5']:.2%}"
    if "unigram_accuracy" in results:
        line += f"; unigram {results['unigram_accuracy']:.2%}"
    line += ")"
    if "discriminator_loss" in results:
        line += (
            f"; discriminator loss {results['discriminator_loss']:.4f}, "
            f"accuracy {results['discriminator_accuracy']:.2%} with {results['replaced']:.2%} replaced, "
            f"recall {results.get('discriminator_recall', 0.0):.2%}"
        )
    return line + (", best so far" if improved else "")
