"""A trained run, loaded from its workdir: to evaluate it, and to ask it."""

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

from maskformer import data, evaluation, models, objectives
from maskformer.objectives.sequence import CausalLM
from maskformer.training import recipes
from maskformer.training.checkpoints import restore_params
from maskformer.training.config import ExperimentConfig, resolve
from maskformer.training.program import Placed, Program
from maskformer.training.step import create_eval_step, masking_key
from maskformer.training.tasks import predict


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's config, tokenizer, model and parameters, on this machine's devices."""

    placed: Placed
    params: Any
    step: int

    @property
    def experiment(self) -> ExperimentConfig:
        return self.placed.program.experiment

    @property
    def tokenizer(self) -> data.Tokenizer:
        return self.placed.program.tokenizer

    @property
    def model(self) -> Any:
        return self.placed.program.model

    def evaluate(
        self, split: str = "test", objective: Mapping[str, Any] | None = None, *, max_batches: int | None = None
    ) -> dict[str, float]:
        """Metrics over `split` under the run's objective or another one, with fixed masks and its attention.

        Args:
          split: "train", "validation" or "test".
          objective: changes to the objective beyond those of `evaluation.objective`, such as `{"rate": 0.4}`. Another
            name, as in `{"name": "causal_lm"}`, is another objective with its own defaults.
          max_batches: batches of `evaluation.batch_size` rows; None for `evaluation.max_batches`.

        Raises:
          ValueError: the objective is not defined for this run: its tokenizer lacks a token, its model positions.
        """
        task = self.placed.program.evaluation_task(objective)
        step = create_eval_step(task, seed=self.experiment.evaluation.seed)
        return task.finish(self._sums(step, split, max_batches))

    def nll(self, split: str = "test", *, markers: bool = True, max_batches: int | None = None) -> dict[str, float]:
        """The exact negative log-likelihood of `split` under a model that predicts the next token.

        A model trained with a prefix, or to fill in the middle, is run as a causal one: with a prefix of one token.

        Args:
          split: "train", "validation" or "test".
          markers: whether the prediction of special tokens such as [SEP] counts.
          max_batches: batches of `evaluation.batch_size` rows; None for `evaluation.max_batches`.

        Returns:
          `nll` (nats per predicted token), `perplexity`, `bits_per_byte`, `tokens`, `bytes`.

        Raises:
          ValueError: the model never predicted the next token.
        """
        vocabulary = self.tokenizer.vocabulary
        objective = self.experiment.create_objective(vocabulary)
        if not objective.predicts_next:
            raise ValueError(
                f"nll: this run's objective is {objective.name!r}, whose model never predicted the next token; use "
                "nll_bound, or evaluate under objective 'causal_lm'"
            )
        if not isinstance(objective, CausalLM):
            objective = objectives.create("causal_lm", vocabulary, self.experiment.data.length)
        counted = self._split_bytes(split)
        step = evaluation.create_nll_step(
            functools.partial(predict, self.model, objective),
            objective,
            ignored=() if markers else _markers(vocabulary),
            token_bytes=counted.table,
        )
        return evaluation.finish_nll(self._sums(step, split, max_batches), counted)

    def nll_bound(
        self,
        split: str = "test",
        *,
        samples: int = 8,
        estimator: str = "count",
        markers: bool | None = None,
        max_batches: int | None = None,
    ) -> dict[str, float]:
        """An upper bound on the negative log-likelihood of `split` under a model that fills in masks, by sampling.

        Args:
          split: "train", "validation" or "test".
          samples: maskings of each row, an even number; the standard error falls with its square root.
          estimator: "count" (LLaDA) or "time" (MDLM); see `evaluation.create_bound_step`.
          markers: whether special tokens such as [CLS] and [SEP] are part of the text, hidden and counted. By default
            as in training: they are under `diffusion`, unless it has `keep_markers`, and are not under `mlm`.
          max_batches: batches of `evaluation.batch_size` rows; None for `evaluation.max_batches`.

        Returns:
          `nll_bound` (nats per counted token), `nll_bound_stderr`, `perplexity_bound`, `bits_per_byte_bound`, `tokens`,
          `bytes`.

        Raises:
          ValueError: the model never saw [MASK], or a bad argument.
        """
        objective = self._objective_with_masks("nll_bound")
        vocabulary = self.tokenizer.vocabulary
        if markers is None:
            visible = objective.never_hidden
        else:
            visible = vocabulary.ids(("pad",)) if markers else _markers(vocabulary)
        counted = self._split_bytes(split)
        step = evaluation.create_bound_step(
            functools.partial(predict, self.model, objective),
            mask_token=vocabulary.require("mask", objective.name),
            vocabulary_size=vocabulary.size,
            seed=self.experiment.evaluation.seed,
            samples=samples,
            estimator=estimator,
            visible=visible,
            token_bytes=counted.table,
        )
        return evaluation.finish_bound(self._sums(step, split, max_batches), counted)

    def pseudo_perplexity(
        self,
        split: str = "test",
        *,
        within_word_l2r: bool = False,
        every: int = 1,
        max_batches: int | None = None,
    ) -> dict[str, float]:
        """The pseudo-perplexity of `split`: each text token hidden in turn, and predicted from all others.

        Costs as many passes over a row as its longest segment has tokens to score. Special tokens are never hidden.

        Args:
          split: "train", "validation" or "test".
          within_word_l2r: hide with a token the later pieces of its word, which would give it away (Kauf & Ivanova
            2023).
          every: score every `every`-th text token only.
          max_batches: batches of `evaluation.batch_size` rows; None for `evaluation.max_batches`.

        Returns:
          `pseudo_nll` (nats per scored token), `pseudo_perplexity`, `pseudo_bits_per_byte`, `scored`, `tokens` (all
          text tokens of the rows), `bytes`.

        Raises:
          ValueError: the model never saw [MASK], or a bad argument.
        """
        objective = self._objective_with_masks("pseudo_perplexity")
        vocabulary = self.tokenizer.vocabulary
        counted = self._split_bytes(split)
        step = evaluation.create_pseudo_step(
            functools.partial(predict, self.model, objective),
            mask_token=vocabulary.require("mask", objective.name),
            vocabulary_size=vocabulary.size,
            segments=_most_segments(data.load_dataset(self.experiment.data, split, self.tokenizer)),
            visible=_markers(vocabulary),
            within_word_l2r=within_word_l2r,
            every=every,
            token_bytes=counted.table,
        )
        return evaluation.finish_pseudo(self._sums(step, split, max_batches), counted)

    def _split_bytes(self, split: str) -> evaluation.SplitBytes:
        return evaluation.split_bytes(self.experiment.data, split, self.tokenizer)

    def _objective_with_masks(self, metric: str) -> objectives.Objective:
        """The run's objective, if training under it showed the model [MASK] in place of what it had to predict."""
        objective = self.experiment.create_objective(self.tokenizer.vocabulary)
        if not objective.shows_mask:
            raise ValueError(
                f"{metric}: this run's objective is {objective.name!r}, whose model never saw [MASK]; it is defined "
                "after mlm and its relatives, and after diffusion"
            )
        return objective

    def _sums(
        self, step: Callable[[Any, Any], evaluation.Sums], split: str, max_batches: int | None = None
    ) -> dict[str, np.ndarray]:
        """The sums of `step(params, batch)` over a split, on all of this run's devices."""

        return self.placed.totals(self.placed.summing(step), self.params, split, max_batches)

    def rows(self, split: str = "test", *, max_batches: int | None = None) -> tuple[int, int]:
        """How many rows of `split` are evaluated, and how many it has."""
        config = self.experiment.evaluation
        total = len(data.load_dataset(self.experiment.data, split, self.tokenizer))
        batches = config.max_batches if max_batches is None else max_batches
        return total if batches is None else min(total, batches * config.batch_size), total

    def fill(self, text: str, top: int = 5) -> list[list[evaluation.Guess]]:
        """Guesses for each [MASK] in `text`, by the generator where there are two networks."""
        config = self.experiment.data
        objective = self.experiment.create_objective(self.tokenizer.vocabulary)
        if not objective.shows_mask:
            raise ValueError(
                f"fill: this run's objective is {objective.name!r}, which never saw [MASK]; fill works after mlm and "
                "its relatives, and after diffusion"
            )
        tokens, _ = self.tokenizer.encode(text, start_token=config.start_token, end_token=config.end_token)
        return evaluation.fill_masks(self.model, self.params, self.tokenizer, tokens, top)

    def example_texts(self, count: int, seed: int = 0) -> list[str]:
        """Passages of the test split with one whole word of each masked."""
        dataset = data.load_dataset(self.experiment.data, "test", self.tokenizer)
        generator = np.random.default_rng(seed)
        texts = []
        for row in generator.permutation(len(dataset))[:count]:
            example = dataset.rows.read(np.array([row]))
            tokens, words = np.array(example["tokens"][0]), np.flatnonzero(example["word_starts"][0])
            # A word of one piece, with text on both sides, is a fair question.
            whole = [w for w in words[4:24] if w + 1 in words and self.tokenizer.token(tokens[w]).isalpha()]
            if not whole:
                continue
            place = int(generator.choice(whole))
            tokens[place] = self.tokenizer.vocabulary.require("mask", "fill")
            # From the beginning of a word.
            first, last = int(words[words >= max(place - 16, 1)][0]), place + 12
            text = self.tokenizer.decode([t for t in tokens[first:last] if not self._is_frame(t)], skip_special=False)
            texts.append(text)
        return texts

    def _is_frame(self, token: int) -> bool:
        vocabulary = self.tokenizer.vocabulary
        return token in (vocabulary.cls, vocabulary.sep, vocabulary.pad)


def _most_segments(dataset: data.PackedDataset) -> int:
    """The most segments that a row of the split has; it is what fixes the shape of a pass."""
    most = 1
    for part in np.array_split(np.arange(len(dataset)), -(-len(dataset) // 1024)):
        most = max(most, int(dataset.rows.read(part)["segment_ids"].max()))
    return most


def _markers(vocabulary: objectives.Vocabulary) -> tuple[int, ...]:
    """Ids that stand for no text. An unknown word is text."""
    return vocabulary.ids(("pad", "mask", "cls", "sep", "bos", "eos", "sentinels", "special"))


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run would start with, before any parameter exists: to be looked at."""

    experiment: ExperimentConfig
    tokenizer: data.Tokenizer
    objective: objectives.Objective
    model: Any

    @property
    def objective_key(self) -> jax.Array:
        """The key that the run's masks come from."""
        return masking_key(self.experiment.seed)

    def first_batch(self, rows: int, number: int = 0) -> dict[str, np.ndarray]:
        """Batch `number` of `rows` rows of the training stream."""
        dataset = data.load_dataset(self.experiment.data, "train", self.tokenizer)
        return next(dataset.train_batches(rows, self.experiment.seed, start_example=number * rows))


def prepare(flags: Sequence[str]) -> Setup:
    """Everything that a recipe and its overrides describe, short of parameters and devices."""
    config, _ = recipes.load_config(flags)
    experiment = resolve(config)
    tokenizer = data.load_tokenizer(experiment.data)
    objective = experiment.create_objective(tokenizer.vocabulary)
    model = models.create(experiment.create_model_config(tokenizer.vocabulary))
    return Setup(experiment, tokenizer, objective, model)


def load(workdir: str | os.PathLike[str], overrides: Sequence[str] = (), checkpoint: str = "best") -> Run:
    """The run in `workdir`, its parameters sharded over this machine's devices.

    Args:
      workdir: folder of a run.
      overrides: flags such as `--config.evaluation.seed=1`; `--config=RECIPE.py` makes known the masks that the run's
        recipe registers, and changes nothing else.
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
    placed = Program(experiment).on()
    params, step = restore_params(path, placed.params, checkpoint)
    return Run(placed, params, step)
