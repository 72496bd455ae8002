"""From a config to everything that trains: first what needs no device, then the same placed on a mesh.

    program = Program.of(config)          # tokenizer, objective, task, shapes: made when they are asked for
    placed = program.on(mesh)             # shardings, and the jitted steps
    placed.lower_train().compile()        # ahead of time, from shapes alone

`train_and_evaluate` runs one, `runs.load` gives one its trained parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from maskformer import data, evaluation
from maskformer.objectives import Objective, Vocabulary
from maskformer.training import sharding, tasks
from maskformer.training.experiment import ExperimentConfig, change_objective, resolve
from maskformer.training.optimizer import create_optimizer, create_schedule
from maskformer.training.state import TrainState, Window, create_state
from maskformer.training.step import create_eval_step, create_train_step, masking_key

Totals = dict[str, np.ndarray]

# Batches of an evaluation that may wait for the devices: so soon does one that is told to stop.
_AHEAD = 4


class Stopped(Exception):
    """An evaluation was told to stop, and has no result."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What a config describes, as far as it needs no device. Every part is made once, when it is first asked for."""

    experiment: ExperimentConfig

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Program:
        """The program of a recipe's `ConfigDict`, or of the mapping of a run's `config.json`.

        Raises:
          ValueError: the config is wrong; one line.
        """
        return cls(resolve(config))

    @functools.cached_property
    def tokenizer(self) -> data.Tokenizer:
        return data.load_tokenizer(self.experiment.data)

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary

    @functools.cached_property
    def objective(self) -> Objective:
        """What is trained on."""
        return self.experiment.create_objective(self.vocabulary)

    @functools.cached_property
    def model_config(self) -> Any:
        return self.experiment.create_model_config(self.objective)

    @functools.cached_property
    def task(self) -> tasks.Task:
        return self.experiment.create_task(self.objective, self.model_config)

    @property
    def model(self) -> Any:
        return self.task.model

    def evaluation_objective(self, changes: Mapping[str, Any] | None = None) -> Objective:
        """What is evaluated: the objective as `evaluation.objective` changes it, and then `changes`.

        Raises:
          ValueError: it is not defined for this tokenizer, or its rows are too long for the model.
        """
        experiment = self.experiment
        changed = change_objective(experiment.objective, experiment.evaluation.objective)
        objective = dataclasses.replace(experiment, objective=changed).create_objective(
            self.vocabulary, **(changes or {})
        )
        longest = self.model_config.max_length
        if objective.output_length > longest:
            raise ValueError(
                f"objective.name={objective.name!r}: makes rows of {objective.output_length} tokens, and the run's "
                f"model was built for {longest}; evaluate under an objective that keeps their length"
            )
        return objective

    def evaluation_task(self, changes: Mapping[str, Any] | None = None) -> tasks.Task:
        """The task of `evaluation_objective`, beside the context-free baseline."""
        return self.experiment.create_task(
            self.evaluation_objective(changes), self.model_config, trained=self.objective, unigram=self.unigram
        )

    @functools.cached_property
    def _datasets(self) -> dict[str, data.PackedDataset]:
        return {}

    def dataset(self, split: str) -> data.PackedDataset:
        """The packed rows of a split; reads, tokenizes and packs its text where no cache has them."""
        if split not in self._datasets:
            self._datasets[split] = data.load_dataset(self.experiment.data, split, self.tokenizer)
        return self._datasets[split]

    @functools.cached_property
    def unigram(self) -> np.ndarray:
        """Log-probabilities [vocabulary] of the training split, the baseline that ignores the context."""
        return evaluation.unigram_baseline(self.dataset("train"))

    def first_batch(self, rows: int, number: int = 0) -> dict[str, np.ndarray]:
        """Batch `number` of `rows` rows of the training stream, on the host."""
        return next(self.dataset("train").train_batches(rows, self.experiment.seed, start_example=number * rows))

    @property
    def masking_key(self) -> jax.Array:
        """The key that the run's masks come from; on a device."""
        return masking_key(self.experiment.seed)

    def prepare_data(self) -> None:
        """Make everything that comes from the text, so that its mistakes come before the devices start."""
        self.dataset("train")
        if self.experiment.evaluation.every:
            self.dataset(self.experiment.evaluation.split)

    @functools.cached_property
    def schedule(self) -> optax.Schedule:
        return create_schedule(self.experiment.optimizer, self.experiment.train.steps)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return create_optimizer(self.experiment.optimizer, self.schedule, self.model.logical_axes())

    @property
    def averages(self) -> bool:
        """Whether averaged parameters are kept beside the others."""
        return self.experiment.optimizer.ema_decay is not None

    def init(self) -> TrainState:
        """A fresh state; call it under `jit`, so that each device makes only its own part."""
        return create_state(jax.random.key(self.experiment.seed), self.task, self.optimizer, self.averages)

    @functools.cached_property
    def state_shapes(self) -> TrainState:
        """The state, with `jax.ShapeDtypeStruct` leaves; computes nothing."""
        return jax.eval_shape(self.init)

    def on(self, mesh: Mesh | None = None) -> Placed:
        """The program on a mesh; by default the mesh of the config, over all devices.

        Raises:
          ValueError: the mesh, the batch and the devices do not fit.
        """
        return Placed(self, sharding.create_mesh(self.experiment.mesh) if mesh is None else mesh)


class Placed:
    """A program on a mesh.

    Attributes:
      program, mesh: what is placed where.
      rows, everywhere: shardings of a batch's rows, and of what every device holds.
      pipeline: how layers run in stages; None for one stage.
      dropped: a line for each axis that does not divide over the mesh and is held by every device.
      state: the state as `jax.ShapeDtypeStruct`s with shardings, for restoring and lowering.
    """

    def __init__(self, program: Program, mesh: Mesh):
        self.program, self.mesh = program, mesh
        experiment = program.experiment
        self.rows, self.everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self.rules, self.dropped = sharding.create_rules(mesh, program.model_config.axis_sizes)
        self.pipeline = sharding.create_pipeline(mesh, experiment.mesh)
        if self.pipeline is not None:
            sharding.check_stacks(self.pipeline, program.model.logical_axes(), program.model.param_shapes())
        self._activations = functools.partial(
            sharding.activations, mesh, self.rules, experiment.mesh.context_method, pipeline=self.pipeline
        )
        self._activations_of_a_slice = functools.partial(self._activations, batch=sharding.BATCH_AXES)
        self.params_at = sharding.param_shardings(mesh, program.model.logical_axes(), self.rules)
        # Where the optimizer has its state, and the gradients of a step are added up.
        self._optimizer_at = self.params_at
        if experiment.mesh.shard_optimizer:
            self._optimizer_at, whole = sharding.split_over_data(mesh, program.model.param_shapes(), self.params_at)
            self.dropped += whole

    def check_batch(self) -> None:
        """ValueError where a batch of the run, or a part of an accumulated one, does not divide over the mesh, or over
        its stages."""
        train, evaluation = self.program.experiment.train, self.program.experiment.evaluation
        part = train.batch_size // self.accumulation_steps
        sharding.place_batch(self.mesh, train.batch_size)
        sharding.place_batch(self.mesh, part)
        if evaluation.every:
            sharding.place_batch(self.mesh, evaluation.batch_size, field="evaluation.batch_size")
        if self.pipeline is not None:
            accumulated = " / train.accumulation_steps" if self.accumulation_steps > 1 else ""
            self.pipeline.check_microbatches(part, f"train.batch_size{accumulated}")
            if evaluation.every:
                self.pipeline.cut(evaluation.batch_size, "evaluation.batch_size")
        if train.rows_per_device is not None:
            parts, shards = self.accumulation_steps, sharding.shards_of_batch(self.mesh)
            at_once = train.batch_size // shards // parts
            if 2 * at_once < min(train.rows_per_device, parts * at_once):
                self.dropped.append(
                    f"train.batch_size={train.batch_size} gives a device {parts * at_once} rows, which run {at_once} "
                    f"at a time in {parts} parts, far below train.rows_per_device={train.rows_per_device}: choose a "
                    "batch that divides better"
                )

    @functools.cached_property
    def accumulation_steps(self) -> int:
        """In how many parts a training batch runs here: `train.rows_per_device` makes it follow the mesh."""
        train = self.program.experiment.train
        sharding.place_batch(self.mesh, train.batch_size)
        return train.parts(sharding.shards_of_batch(self.mesh))

    def describe_pipeline(self) -> str | None:
        """The schedule of a training step over the stages, and its bubble, on one line; None for one stage."""
        part = self.program.experiment.train.batch_size // self.accumulation_steps
        return None if self.pipeline is None else self.pipeline.describe(part)

    @functools.cached_property
    def state(self) -> TrainState:
        shapes = self.program.state_shapes
        return jax.tree.map(
            lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where), shapes, self._state_at
        )

    @functools.cached_property
    def _state_at(self) -> TrainState:
        shapes, optimizer = self.program.state_shapes, self.program.optimizer
        return TrainState(
            step=self.everywhere,
            params=self.params_at,
            opt_state=sharding.optimizer_shardings(
                self.mesh, optimizer, shapes.opt_state, shapes.params, self._optimizer_at
            ),
            ema=self._optimizer_at if self.program.averages else None,
            window=jax.tree.map(lambda _: self.everywhere, shapes.window),
            task=jax.tree.map(lambda _: self.everywhere, shapes.task),
        )

    @property
    def params(self) -> Any:
        """The parameters as `jax.ShapeDtypeStruct`s with shardings; computes nothing."""
        return jax.tree.map(
            lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
            self.program.model.param_shapes(),
            self.params_at,
        )

    def init(self) -> TrainState:
        """A fresh state, made where it will live."""
        return jax.jit(self.program.init, out_shardings=self._state_at)()

    def init_optimizer(self, params: Any) -> optax.OptState:
        """The optimizer's state before the first update of `params`."""
        return jax.jit(self.program.optimizer.init, out_shardings=self._state_at.opt_state)(params)

    @functools.cached_property
    def train_step(self) -> Callable[[TrainState, Any], TrainState]:
        """`state, batch -> state`, which takes the place of the state it is given."""
        program, experiment = self.program, self.program.experiment
        slices = self.mesh.shape.get(sharding.SLICE_AXIS, 1)
        shapes = program.model.param_shapes()
        step = create_train_step(
            program.task,
            program.optimizer,
            program.schedule,
            seed=experiment.seed,
            accumulation_steps=self.accumulation_steps,
            ema_decay=experiment.optimizer.ema_decay,
            placed=self._activations if slices == 1 else self._activations_of_a_slice,
            slices=slices,
            gradients_at=self._optimizer_at if experiment.mesh.shard_optimizer else None,
            sent_at=None if slices == 1 else sharding.slice_shardings(self.mesh, shapes, self.params_at),
            received_at=None if slices == 1 else self._optimizer_at,
        )
        return jax.jit(
            step, in_shardings=(self._state_at, self.rows), out_shardings=self._state_at, donate_argnums=0
        )

    def lower_train(self) -> jax.stages.Lowered:
        """The train step lowered from shapes alone; `.compile()` it ahead of time."""
        experiment = self.program.experiment
        layout = data.batch_layout(experiment.train.batch_size, experiment.data.length)
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.rows) for name, (shape, dtype) in layout.items()
        }
        return self.train_step.lower(self.state, batch)  # type: ignore[attr-defined]

    @functools.cached_property
    def empty_window(self) -> Callable[[], Window]:
        return jax.jit(functools.partial(Window.empty, self.program.task), out_shardings=self.everywhere)

    def train_batches(self, start_example: int) -> Iterable[Mapping[str, jax.Array]]:
        """The endless stream of training batches from a global example on, each array over all devices."""
        experiment = self.program.experiment
        placement = sharding.place_batch(self.mesh, experiment.train.batch_size)
        batches = self.program.dataset("train").train_batches(
            placement.size, experiment.seed, placement.rows, start_example=start_example
        )
        return (sharding.to_global(batch, placement) for batch in batches)

    @functools.cached_property
    def _evaluations(self) -> dict[str, tuple[tasks.Task, Callable[[Any, Any], Any]]]:
        return {}

    def evaluation(self, changes: Mapping[str, Any] | None = None) -> tuple[tasks.Task, Callable[[Any, Any], Any]]:
        """`Program.evaluation_task(changes)` and its compiled step `params, batch -> sums`, each made once."""
        key = json.dumps(changes or {}, sort_keys=True)
        if key not in self._evaluations:
            task = self.program.evaluation_task(changes)
            step = create_eval_step(task, seed=self.program.experiment.evaluation.seed)
            self._evaluations[key] = task, self.summing(step)
        return self._evaluations[key]

    def evaluate(
        self,
        params: Any,
        split: str | None = None,
        changes: Mapping[str, Any] | None = None,
        max_batches: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> dict[str, float]:
        """Metrics of `params` over a split, each example once, whatever the number of processes.

        Args:
          split: None for `evaluation.split`.
          changes: to the evaluated objective, see `Program.evaluation_objective`.
          max_batches, stop: see `totals`.

        Raises:
          Stopped: `stop` said so.
        """
        task, step = self.evaluation(changes)
        split = self.program.experiment.evaluation.split if split is None else split
        return task.finish(self.totals(step, params, split, max_batches, stop))

    def summing(self, step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """`step(params, batch) -> sums`, compiled for this mesh."""

        def placed_step(params: Any, batch: Any) -> Any:
            with self._activations():
                return step(params, batch)

        return jax.jit(placed_step, in_shardings=(self.params_at, self.rows), out_shardings=self.everywhere)

    def totals(
        self,
        compiled: Callable[[Any, Any], Any],
        params: Any,
        split: str,
        max_batches: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Totals:
        """The sums of `compiled(params, batch)`, from `summing`, over a split, each example once.

        Args:
          max_batches: batches of `evaluation.batch_size` rows; None for `evaluation.max_batches`.
          stop: asked after each batch, with one answer on all processes, whether to give up; None never does.

        Raises:
          Stopped: `stop` said so.
        """
        config = self.program.experiment.evaluation
        placement = sharding.place_batch(self.mesh, config.batch_size, field="evaluation.batch_size")
        batches = self.program.dataset(split).eval_batches(
            placement.size, placement.rows, config.max_batches if max_batches is None else max_batches
        )
        # An average may lie split as the optimizer's state does; where it lies as parameters do, nothing moves.
        params = jax.device_put(params, self.params_at)
        parts = []
        for batch in batches:
            parts.append(compiled(params, sharding.to_global(batch, placement)))
            if stop is not None:
                jax.block_until_ready(parts[-_AHEAD:][0])
                if stop():
                    raise Stopped
        # One fetch at the end; added in float64, so that the order and number of batches do not show.
        totals: dict[str, Any] = {}
        for part in jax.device_get(parts):
            for name, pair in part.items():
                totals[name] = totals.get(name, 0.0) + np.asarray(pair, np.float64)
        return totals

