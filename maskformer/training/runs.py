"""A trained run, loaded from its workdir to be measured and asked; and what a recipe would start with."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from maskformer import evaluation, models, objectives
from maskformer.data import DataConfig, PackedDataset, Tokenizer, load_dataset, load_tokenizer
from maskformer.models.partitioning import Rules
from maskformer.training import recipes, sharding
from maskformer.training.checkpoints import restore_params
from maskformer.training.config import ExperimentConfig, change_objective, resolve
from maskformer.training.loop import total_sums
from maskformer.training.step import create_eval_step, masking_key

Step = Callable[[Any, Any], evaluation.Sums]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's config, tokenizer, model and parameters, on this machine's devices."""

    experiment: ExperimentConfig
    tokenizer: Tokenizer
    model: models.Model | models.ElectraModel
    mesh: jax.sharding.Mesh
    rules: Rules
    params: Any
    params_at: Any
    step: int

    def measure(
        self, name: str, split: str = "test", *, max_batches: int | None = None, **options: Any
    ) -> evaluation.Results:
        """What the measure `name` says of `split`: its metrics, by name. `evaluation.MEASURES` has them all.

        Args:
          name: such as "loss", "nll", "nll_bound" or "pseudo_perplexity".
          split: "train", "validation" or "test".
          max_batches: batches of `evaluation.batch_size` rows; None for `evaluation.max_batches`.
          options: of the measure.

        Raises:
          ValueError: no such measure or option, or it is not defined for this run, and why.
        """
        run = self
        if max_batches is not None:
            shorter = dataclasses.replace(self.experiment.evaluation, max_batches=max_batches)
            run = dataclasses.replace(self, experiment=dataclasses.replace(self.experiment, evaluation=shorter))
        return evaluation.get_measure(name)(run, split, **options)

    @property
    def data(self) -> DataConfig:
        """Where the text comes from."""
        return self.experiment.data

    @property
    def seed(self) -> int:
        """Of what an evaluation draws."""
        return self.experiment.evaluation.seed

    @functools.cached_property
    def objective(self) -> objectives.Objective:
        """What the run was trained on."""
        return self.experiment.create_objective(self.tokenizer.vocabulary)

    def evaluated(self, changes: Mapping[str, Any]) -> objectives.Objective:
        """What it is evaluated on: its objective with those of `evaluation.objective` and with `changes`.

        Another `name` is another objective with its own defaults.
        """
        changed = change_objective(self.experiment.objective, self.experiment.evaluation.objective)
        experiment = dataclasses.replace(self.experiment, objective=changed)
        return experiment.create_objective(self.tokenizer.vocabulary, **changes)

    def metrics_step(self, objective: objectives.Objective, unigram: np.ndarray) -> Step:
        """`params, batch -> sums` of every metric of `objective`."""
        return create_eval_step(self.model, objective, seed=self.seed, unigram=jax.numpy.asarray(unigram))

    def dataset(self, split: str) -> PackedDataset:
        """The rows of `split`."""
        return load_dataset(self.data, split, self.tokenizer)

    def rows(self, split: str = "test") -> tuple[int, int]:
        """How many rows of `split` are evaluated, and how many it has."""
        config, total = self.experiment.evaluation, len(self.dataset(split))
        return total if config.max_batches is None else min(total, config.max_batches * config.batch_size), total

    def sums(self, step: Step, split: str) -> dict[str, np.ndarray]:
        """The sums of `step(params, batch)` over a split, on all of this run's devices."""

        def placed_step(params: Any, batch: Any) -> evaluation.Sums:
            with sharding.activations(self.mesh, self.rules, self.experiment.mesh.context_method):
                return step(params, batch)

        compiled = jax.jit(
            placed_step,
            in_shardings=(self.params_at, sharding.batch_sharding(self.mesh)),
            out_shardings=sharding.replicated(self.mesh),
        )
        return total_sums(compiled, self.params, self.dataset(split), self.experiment.evaluation, self.mesh)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run would start with, before any parameter exists: to be looked at."""

    experiment: ExperimentConfig
    tokenizer: Tokenizer
    objective: objectives.Objective
    model: models.Model | models.ElectraModel

    @property
    def objective_key(self) -> jax.Array:
        """The key that the run's masks come from."""
        return masking_key(self.experiment.seed)

    def first_batch(self, rows: int, number: int = 0) -> dict[str, np.ndarray]:
        """Batch `number` of `rows` rows of the training stream."""
        dataset = load_dataset(self.experiment.data, "train", self.tokenizer)
        return next(dataset.train_batches(rows, self.experiment.seed, start_example=number * rows))


def prepare(flags: Sequence[str]) -> Setup:
    """Everything that a recipe and its overrides describe, short of parameters and devices."""
    config, _ = recipes.load_config(flags)
    experiment = resolve(config)
    tokenizer = load_tokenizer(experiment.data)
    objective = experiment.create_objective(tokenizer.vocabulary)
    model = models.create(experiment.create_model_config(tokenizer.vocabulary))
    return Setup(experiment, tokenizer, objective, model)


def load(workdir: str | os.PathLike[str], overrides: Sequence[str] = (), checkpoint: str = "best") -> Run:
    """The run in `workdir`, its parameters sharded over this machine's devices.

    Args:
      workdir: folder of a run.
      overrides: flags such as `--config.evaluation.seed=1`; `--config=RECIPE.py` makes known what the run's recipe
        registers, and changes nothing else.
      checkpoint: "best" or "latest".

    Raises:
      ValueError: no run there, a bad override, or a mask of the run's own that nobody has registered.
      CheckpointError: no checkpoint yet.
    """
    path = pathlib.Path(workdir)
    if not (path / "config.json").is_file():
        raise ValueError(f"workdir={os.fspath(workdir)!r}: no config.json there; expected the folder of a run")
    config = ml_collections.ConfigDict(json.loads((path / "config.json").read_text()))
    registering, changes = recipes.split_flags(overrides)
    for recipe in registering:
        recipes.register(recipe)
    try:
        experiment = resolve(recipes.override(config, changes))
    except ValueError as error:
        if not registering and ("unknown mask" in str(error) or "is unknown" in str(error)):
            raise ValueError(
                f"{error}; what a recipe registers needs --config=RECIPE.py (in Python: import the recipe first)"
            ) from error
        raise
    tokenizer = load_tokenizer(experiment.data)
    model = models.create(experiment.create_model_config(tokenizer.vocabulary))
    mesh = sharding.create_mesh(experiment.mesh)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rules, _ = sharding.create_rules(mesh, model.config)
    params_at = sharding.param_shardings(mesh, model.logical_axes(), rules)
    abstract = jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where), shapes, params_at
    )
    params, step = restore_params(path, abstract, checkpoint)
    return Run(experiment, tokenizer, model, mesh, rules, params, params_at, step)
