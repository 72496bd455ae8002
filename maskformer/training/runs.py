"""A trained run, loaded from its workdir to be measured and asked; and what a recipe would train."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from maskformer import evaluation, paths
from maskformer.data import DataConfig, PackedDataset, Tokenizer
from maskformer.objectives import Objective
from maskformer.training import recipes
from maskformer.training.checkpoints import restore_params
from maskformer.training.compilation import use_cache
from maskformer.training.experiment import ExperimentConfig, resolve
from maskformer.training.program import Placed, Program
from maskformer.training.workdir import read_config


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's program and parameters, on this machine's devices.

    Attributes:
      step: of the checkpoint.
      max_batches: how many batches of `evaluation.batch_size` rows are measured; None for `evaluation.max_batches`.
    """

    placed: Placed
    params: Any
    step: int
    max_batches: int | None = None

    def measure(
        self, name: str, split: str = "test", *, max_batches: int | None = None, **options: Any
    ) -> evaluation.Results:
        """What the measure `name` says of `split`: its metrics, by name. `evaluation.MEASURES` has them all.

        Args:
          name: such as "loss", "nll", "nll_bound" or "pseudo_perplexity".
          split: "train", "validation" or "test".
          max_batches: as the attribute, for this call.
          options: of the measure.

        Raises:
          ValueError: no such measure or option, or it is not defined for this run, and why.
        """
        run = self if max_batches is None else dataclasses.replace(self, max_batches=max_batches)
        return evaluation.get_measure(name)(run, split, **options)

    @property
    def _program(self) -> Program:
        return self.placed.program

    @property
    def experiment(self) -> ExperimentConfig:
        return self._program.experiment

    @property
    def data(self) -> DataConfig:
        return self.experiment.data

    @property
    def seed(self) -> int:
        """Of what an evaluation draws."""
        return self.experiment.evaluation.seed

    @property
    def tokenizer(self) -> Tokenizer:
        return self._program.tokenizer

    @property
    def model(self) -> Any:
        return self._program.model

    @property
    def objective(self) -> Objective:
        """What the run was trained on."""
        return self._program.objective

    @property
    def predicts_tokens(self) -> bool:
        """Whether the run's task trains a model of tokens, whose likelihood and guesses can be asked for."""
        return self._program.task.predicts_tokens

    def evaluated(self, changes: Mapping[str, Any] | None = None) -> Objective:
        """What the run is evaluated on; see `Program.evaluation_objective`."""
        return self._program.evaluation_objective(changes)

    def metrics(self, split: str, changes: Mapping[str, Any] | None = None) -> evaluation.Results:
        """The metrics of the task that trains on `evaluated(changes)`."""
        return self.placed.evaluate(self.params, split, changes, self.max_batches)

    def dataset(self, split: str) -> PackedDataset:
        return self._program.dataset(split)

    def rows(self, split: str = "test") -> tuple[int, int]:
        """How many rows of `split` are measured, and how many it has."""
        config, total = self.experiment.evaluation, len(self.dataset(split))
        batches = config.max_batches if self.max_batches is None else self.max_batches
        return total if batches is None else min(total, batches * config.batch_size), total

    def sums(self, step: Callable[[Any, Any], evaluation.Sums], split: str) -> dict[str, np.ndarray]:
        """The sums of `step(params, batch)` over a split, on all of this run's devices."""
        return self.placed.totals(self.placed.summing(step), self.params, split, self.max_batches)


def prepare(flags: Sequence[str]) -> Program:
    """What a recipe and its overrides would train, without parameters and devices: to be looked at."""
    config, _ = recipes.load_config(flags)
    return Program.of(config)


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
    path = paths.given(workdir)
    config = ml_collections.ConfigDict(read_config(path, sections=("data", "objective", "model", "train")))
    registering, changes = recipes.split_flags(overrides)
    for recipe in registering:
        recipes.register(recipe)
    try:
        experiment = resolve(recipes.override(config, changes))
    except ValueError as error:
        if any(said in str(error) for said in ("unknown mask", "is unknown", "task.name=")):
            raise ValueError(
                f"{error}; what recipes register needs --config=RECIPE.py, once for each (in Python: import them first)"
            ) from error
        raise
    use_cache()
    placed = Program(experiment).on()
    params, step = restore_params(path, placed.params, checkpoint)
    return Run(placed, params, step)
