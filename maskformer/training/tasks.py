"""What is trained: a task joins an objective and a model, and says what is minimised, measured and told.

Nothing else in training knows what kind of run it is. A task has

- `factors`: each term of the loss by name, and its factor in what is minimised;
- `corrupt`: from a batch to the example that is trained on, whose every array leads with the rows;
- `weights`: the denominator of each term, from the example alone, so that they are known before any gradient;
- `sums`: the terms' sums over rows; those of parts of a batch add up to those of the whole;
- `census`: what `sums` of a part has to know of the whole batch for that, where it depends on the parameters;
- `evaluate` and `finish`: sums and weights without dropout, and the metrics made of their totals;
- `describe`: the line that a person reads;
- `initial_state` and `update`: what it carries from step to step beside the parameters.

`config.task.name` picks one; without it the objective says which. A recipe registers one of its own with `builder`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskformer import evaluation, models
from maskformer.checks import nearest, shown
from maskformer.evaluation.predictions import predict, predict_with_routing
from maskformer.models.electra import ElectraConfig
from maskformer.objectives import Corrupted, Objective, move_token_losses, token_cross_entropy, token_loss_sums
from maskformer.objectives.electra import Electra as ElectraObjective
from maskformer.training import routing

Batch = Mapping[str, jax.Array]
Pair = tuple[jax.Array, jax.Array]  # a sum and its weight


class Sums(NamedTuple):
    """Sums over the rows of a batch or of a part of it.

    Attributes:
      terms: the sum of each term of the loss, by the names of `Task.factors`.
      means: what is recorded beside them, by the names of `Task.means`.
      carry: sums that `Task.update` moves the task's state by; None where it has none.
    """

    terms: dict[str, jax.Array]
    means: dict[str, Pair]
    carry: Any = None


class Task:
    """The common part of all tasks; what is here suits a loss that is a mean over rows.

    Attributes:
      objective: what is asked. model: what answers.
      factors: term of the loss -> its factor in what is minimised. One term, "loss", unless a class says otherwise.
      means: names of what `sums` records beside the terms.
      predicts_tokens: its model gives logits over the vocabulary, so that its likelihood and guesses can be asked for.
      trains_routers: it has terms for the routers of a model's experts, without which none is trained.
    """

    factors: Mapping[str, float] = {"loss": 1.0}
    means: tuple[str, ...] = ()
    predicts_tokens = False
    trains_routers = False

    def __init__(self, objective: Objective, model: Any):
        self.objective, self.model = objective, model

    def corrupt(self, key: jax.Array, batch: Batch, step: jax.Array | int, state: Any) -> Any:
        """The example that is trained on: a pytree whose every array leads with the rows.

        Args:
          key: of the run's masks, the same at every step; draws are told apart by `batch["example_id"]` and `epoch`.
          batch: arrays of the data, see `data.batch_layout`.
          step: finished updates.
          state: from `initial_state` and `update`; None in evaluation.
        """
        return batch

    def weights(self, example: Any) -> dict[str, jax.Array]:
        """The denominator of each term, float32, in which no parameter has a part. Here: the number of rows."""
        rows = jax.tree.leaves(example)[0].shape[0]
        return {name: jnp.float32(rows) for name in self.factors}

    def sums(self, params: Any, example: Any, key: jax.Array) -> Sums:
        """The sums of the example's rows; `key` is of dropout. A task with a census takes it as a fourth argument, or
        None, where the example is the whole batch."""
        raise NotImplementedError(f"{type(self).__name__} does not define sums()")

    def census(self, params: Any, example: Any, key: jax.Array) -> Any:
        """Sums over rows, without gradient, that `sums` of a part needs to know of the whole batch; None for most.

        Where a batch is computed in parts (accumulation, `mesh.dcn_gradients`), it is made of all of them before any
        gradient: one more forward pass. Arguments as of `sums`.
        """
        return None

    def evaluate(self, params: Any, example: Any) -> dict[str, jax.Array]:
        """Metric -> float32 [2], its sum and weight over the example's rows, without dropout; or other sums, which
        `finish` makes metrics of."""
        raise NotImplementedError(f"{type(self).__name__} does not define evaluate()")

    def finish(self, totals: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Metrics from the sums of `evaluate` over a whole split; one of weight 0 is left out."""
        return {name: float(total / weight) for name, (total, weight) in totals.items() if weight > 0}

    def describe(self, metrics: Mapping[str, float]) -> str:
        """The metrics of a log line or of an evaluation, in a few words."""
        shown = [name for name in (*self.factors, *self.means) if name in metrics]
        return ", ".join(f"{name} {metrics[name]:.4f}" for name in shown) or "nothing predicted"

    def measured(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[str, ...]:
        """The metrics of an evaluation over batches of these shapes, by name; computes nothing."""

        def sums(params: Any, batch: Batch) -> dict[str, jax.Array]:
            return self.evaluate(params, self.corrupt(jax.random.key(0), batch, 0, None))

        shapes = jax.eval_shape(sums, self.model.param_shapes(), batch)
        return tuple(self.finish({name: np.ones(shape.shape) for name, shape in shapes.items()}))

    def check(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """ValueError where its parts do not fit together, on batches of these shapes; computes nothing."""

        def parts(params: Any, batch: Batch) -> tuple[Any, Any]:
            example = self.corrupt(jax.random.key(0), batch, 0, self.initial_state())
            return self.weights(example), self.sums(params, example, jax.random.key(0))

        weights, sums = jax.eval_shape(parts, self.model.param_shapes(), batch)
        for name, keys, kind, expected in (
            ("weights()", weights, "factors", self.factors),
            ("sums().terms", sums.terms, "factors", self.factors),
            ("sums().means", sums.means, "means", self.means),
        ):
            if set(keys) != set(expected):
                found, wanted = (", ".join(sorted(names)) or "none" for names in (keys, expected))
                raise ValueError(f"task {type(self).__name__}: {name} has {found}; expected those of {kind}: {wanted}")

    def predicted(self, example: Any) -> jax.Array:
        """int32: how many predictions the example asks for. Here: one for each row."""
        return jnp.int32(jax.tree.leaves(example)[0].shape[0])

    def initial_state(self) -> Any:
        """What the task carries from step to step, a pytree; None for nothing."""
        return None

    def update(self, state: Any, carry: Any) -> Any:
        """The state after a step whose sums, over the whole batch, are `carry`."""
        return state

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of a step for each token of the text, whose row may be run in several copies."""
        objective = self.objective
        share = objective.budget / objective.output_length
        return self.model.flops_per_token(objective.output_length, share) * objective.copies


class Tokens(Task):
    """Predicted tokens under cross-entropy: one network, one term, and two more for its routers if it has experts.

    The state is the running loss of every token, where the objective selects by it (adaptive masking).

    Args:
      label_smoothing: share of the target's probability spread evenly over the vocabulary.
      unigram: log-probabilities [vocabulary] of the context-free baseline that evaluation compares with; None for none.

    Raises:
      ValueError: the objective's loss takes no label smoothing.
    """

    means: tuple[str, ...] = ("accuracy",)
    predicts_tokens = True
    trains_routers = True

    def __init__(
        self,
        objective: Objective,
        config: Any,
        *,
        label_smoothing: float = 0.0,
        unigram: np.ndarray | None = None,
    ):
        if objective.makes_pairs:
            raise ValueError(
                f"objective.name={objective.name!r}: makes pairs for an encoder and a decoder, and this task trains a "
                "single stack; set objective.layout='prefix' where it has one, or use one such as 'mlm' or 'prefix_lm'"
            )
        super().__init__(objective, models.create(config))
        objective.check_label_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing
        self.unigram = unigram
        self.routers = routing.Routers(config)
        self.factors = {**self.factors, **self.routers.factors}
        self.means = (*self.means, *self.routers.means)

    def corrupt(self, key: jax.Array, batch: Batch, step: jax.Array | int, state: Any) -> Any:
        return self.objective(key, batch, step=step, token_weights=state)

    def weights(self, example: Any) -> dict[str, jax.Array]:
        return {"loss": self.objective.weight_sum(example), **self.routers.weights(example.segment_ids)}

    def sums(self, params: Any, example: Any, key: jax.Array, census: Any = None) -> Sums:
        if not self.routers:
            return self._of_logits(predict(self.model, self.objective, params, example, key), example)
        logits, routed = predict_with_routing(self.model, self.objective, params, example, key)
        terms, means, carry = self._of_logits(logits, example)
        assigned = routed.assigned if census is None else census
        terms |= self.routers.terms(routed, assigned)
        return Sums(terms, means | self.routers.recorded(routed, assigned), carry)

    def census(self, params: Any, example: Any, key: jax.Array) -> Any:
        """[layers, experts], how many tokens chose each; None without experts."""
        if not self.routers:
            return None
        return predict_with_routing(self.model, self.objective, params, example, key)[1].assigned

    def _of_logits(self, logits: jax.Array, corrupted: Corrupted) -> Sums:
        """The sums of the model's logits [batch, predicted, vocabulary]."""
        logits = self.objective.transform_logits(logits, corrupted)
        targets, weights = corrupted.target_tokens, corrupted.loss_weights
        loss_sum, _ = self.objective.loss(logits, corrupted, self.label_smoothing)
        # The loss needs the largest logit anyway; comparing with it is far cheaper than an argmax.
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        correct = target_logits >= jnp.max(logits, axis=-1)
        token_losses = None
        if self.objective.token_loss_decay is not None:
            used = weights > 0
            losses = jax.lax.stop_gradient(token_cross_entropy(logits, targets, used))
            token_losses = token_loss_sums(targets, losses, used, logits.shape[-1])
        return Sums({"loss": loss_sum}, {"accuracy": (jnp.sum(correct * weights), jnp.sum(weights))}, token_losses)

    def evaluate(self, params: Any, example: Any) -> dict[str, jax.Array]:
        if not self.routers:
            return self._prediction_sums(predict(self.model, self.objective, params, example), example)
        logits, routed = predict_with_routing(self.model, self.objective, params, example)
        return self._prediction_sums(logits, example) | self.routers.evaluation_sums(routed)

    def _prediction_sums(self, logits: jax.Array, corrupted: Corrupted) -> dict[str, jax.Array]:
        unigram = None if self.unigram is None else jnp.asarray(self.unigram)
        return evaluation.objective_sums(self.objective, logits, corrupted, unigram=unigram)

    def finish(self, totals: Mapping[str, np.ndarray]) -> dict[str, float]:
        """As `evaluation.finish`, and of experts their balance and load over the whole split."""
        pairs, balance = self.routers.finish(totals)
        return evaluation.finish(pairs) | balance

    def measured(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[str, ...]:
        # A replacement that never happens has no mean.
        shares = zip(evaluation.KINDS, self.objective.replacement)
        never = tuple(f"_{kind}" for kind, share in shares if not share > 0)
        return tuple(name for name in super().measured(batch) if not name.endswith(never))

    def describe(self, metrics: Mapping[str, float]) -> str:
        return self._describe_predictions(metrics) + routing.describe(metrics)

    def _describe_predictions(self, metrics: Mapping[str, float]) -> str:
        if "loss" not in metrics:
            return "nothing predicted"
        text = f"loss {metrics['loss']:.4f}"
        # A loss over all tokens is there where nothing was predicted, and its accuracy is not.
        if "accuracy" not in metrics:
            return text
        if "accuracy_top5" not in metrics:  # a log line, which shares eighty columns with the progress bar
            return f"{text} acc {metrics['accuracy']:.2%}"
        if "perplexity" in metrics:  # not every loss has one, see `evaluation.objective_sums`
            text += f", perplexity {metrics['perplexity']:.2f}"
        text += f", accuracy {metrics['accuracy']:.2%} (top 5 {metrics['accuracy_top5']:.2%}"
        return text + (f"; unigram {metrics['unigram_accuracy']:.2%})" if "unigram_accuracy" in metrics else ")")

    def predicted(self, example: Any) -> jax.Array:
        return jnp.sum(example.loss_weights > 0, dtype=jnp.int32)

    def initial_state(self) -> Any:
        return self.objective.initial_token_losses()

    def update(self, state: Any, carry: Any) -> Any:
        decay = self.objective.token_loss_decay
        if decay is None:
            return state
        total, count = carry
        return move_token_losses(state, total, count, decay)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ElectraExample:
    """What the generator reads, and what the discriminator's input is made of: the text and the rows' keys."""

    corrupted: Corrupted
    tokens: jax.Array
    keys: jax.Array


class Electra(Tokens):
    """The generator's cross-entropy, and the discriminator's on the generator's samples (Clark et al. 2020, section 2).

    `loss` and `accuracy` are the generator's, as for any masked language model. A token counts as found where its
    discriminator's logit is above 0. `replaced` is the share of the tokens asked about that differ from the text: what
    always answering "original" gets wrong.

    Args: as of `Tokens`; label smoothing is of the generator's predictions.
    """

    means = ("accuracy", "discriminator_accuracy", "discriminator_precision", "discriminator_recall", "replaced")
    objective: ElectraObjective

    def __init__(
        self,
        objective: Objective,
        config: Any,
        *,
        label_smoothing: float = 0.0,
        unigram: np.ndarray | None = None,
    ):
        if not isinstance(config, ElectraConfig):
            raise ValueError(
                f"objective '{objective.name}' trains two networks: make the model from a models.electra.ElectraConfig"
            )
        super().__init__(objective, config, label_smoothing=label_smoothing, unigram=unigram)
        self.factors = {"loss": 1.0, "discriminator_loss": self.objective.discriminator_weight}

    def corrupt(self, key: jax.Array, batch: Batch, step: jax.Array | int, state: Any) -> ElectraExample:
        corrupted = super().corrupt(key, batch, step, state)
        return ElectraExample(corrupted, batch["tokens"], self.objective.row_keys(key, batch))

    def weights(self, example: ElectraExample) -> dict[str, jax.Array]:
        asked = jnp.sum(self.objective.questions(example.corrupted))
        return {**super().weights(example.corrupted), "discriminator_loss": asked}

    def sums(self, params: Any, example: ElectraExample, key: jax.Array, census: None = None) -> Sums:
        generator_key, discriminator_key = jax.random.split(key)
        logits = predict(self.model, self.objective, params, example.corrupted, generator_key)
        terms, means, _ = self._of_logits(logits, example.corrupted)
        detection = self._detection(params, example, logits, discriminator_key)
        discriminator_loss, _ = detection.pop("discriminator_loss")
        return Sums({**terms, "discriminator_loss": discriminator_loss}, {**means, **detection})

    def _detection(
        self, params: Any, example: ElectraExample, logits: jax.Array, dropout_key: jax.Array | None = None
    ) -> dict[str, Pair]:
        """Sums and weights of the discriminator's answers; no gradient flows from here into the `logits`."""
        corrupted = example.corrupted
        asked = self.objective.discriminate(example.keys, example.tokens, corrupted, logits)
        answers = self.model.discriminate(
            params,
            asked.input_tokens,
            positions=corrupted.positions,
            mask=self.objective.attend(corrupted),
            segment_ids=corrupted.segment_ids,
            dropout_key=dropout_key,
        )
        loss_sum, tokens = self.objective.discriminator_loss(answers, asked)
        replaced = asked.labels * asked.loss_weights
        said = (answers > 0) * asked.loss_weights
        found, told = jnp.sum(said * replaced), jnp.sum(said)
        return {
            "discriminator_loss": (loss_sum, tokens),
            "discriminator_accuracy": (tokens - told - jnp.sum(replaced) + 2 * found, tokens),
            "discriminator_precision": (found, told),
            "discriminator_recall": (found, jnp.sum(replaced)),
            "replaced": (jnp.sum(replaced), tokens),
        }

    def evaluate(self, params: Any, example: ElectraExample) -> dict[str, jax.Array]:
        logits = predict(self.model, self.objective, params, example.corrupted)
        sums = self._prediction_sums(logits, example.corrupted)
        detection = self._detection(params, example, logits)
        return sums | {name: jnp.stack(pair) for name, pair in detection.items()}

    def describe(self, metrics: Mapping[str, float]) -> str:
        if "loss" not in metrics or "discriminator_loss" not in metrics:
            return super().describe(metrics)
        if "accuracy_top5" not in metrics:
            return f"loss {metrics['loss']:.4f} disc {metrics['discriminator_loss']:.4f}"
        text = (
            f"{super().describe(metrics)}; discriminator loss {metrics['discriminator_loss']:.4f}, "
            f"accuracy {metrics['discriminator_accuracy']:.2%} with {metrics['replaced']:.2%} replaced"
        )
        # Undefined where nothing was replaced.
        recall = metrics.get("discriminator_recall")
        return text if recall is None else f"{text}, recall {recall:.2%}"

    def predicted(self, example: ElectraExample) -> jax.Array:
        return super().predicted(example.corrupted)


BUILDERS: dict[str, Callable[..., Task]] = {"tokens": Tokens, "electra": Electra}

# What training offers to every task's builder, and is no key of `config.task`.
_OFFERED = ("label_smoothing", "unigram")


def builder() -> Callable[[Callable[..., Task]], Callable[..., Task]]:
    """Registers a task of one's own under its function's name, for configs: `config.task.name`.

    The function is `(objective, config, *, ...) -> Task`, where `config` is the model's; the further parameters are
    keys of `config.task`. One called `label_smoothing` gets `train.label_smoothing`, one called `unigram` the baseline
    of an evaluation (None in training).

    Raises:
      ValueError: the name is taken by one of ours, or the function takes no objective and config.

    >>> @builder()
    ... def two_losses(objective, config, *, factor=2.0):
    ...     return Tokens(objective, config)
    >>> parameters("two_losses")["factor"].default
    2.0
    >>> del BUILDERS["two_losses"]
    """

    def register(function: Callable[..., Task]) -> Callable[..., Task]:
        name = function.__name__
        if name in BUILDERS and BUILDERS[name].__module__.startswith("maskformer."):
            raise ValueError(f"task '{name}' is there already: give the function another name")
        if list(inspect.signature(function).parameters)[:2] != ["objective", "config"]:
            raise ValueError(f"task '{name}': its function's first parameters must be objective and config")
        BUILDERS[name] = function
        return function

    return register


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """The keys of `config.task` that the task `name` takes.

    Raises:
      ValueError: there is no such task.
    """
    if name not in BUILDERS:
        raise ValueError(f"task.name={shown(name)}: expected one of {', '.join(BUILDERS)}{nearest(name, BUILDERS)}")
    takes = list(inspect.signature(BUILDERS[name]).parameters.items())[2:]
    return {key: parameter for key, parameter in takes if key not in _OFFERED}


def create(
    section: Mapping[str, Any],
    objective: Objective,
    config: Any,
    *,
    label_smoothing: float = 0.0,
    unigram: np.ndarray | None = None,
) -> Task:
    """The task of `config.task`, or where that names none, the objective's own.

    Args:
      section: `name`, which may be None, and the task's parameters.
      objective: what is asked.
      config: the model's.
      label_smoothing: `train.label_smoothing`.
      unigram: see `Tokens`.

    Raises:
      ValueError: an unknown task or parameter, one that is wrong, or an objective or setting that the task cannot use.
    """
    values = dict(section)
    name = values.pop("name", None) or objective.task
    known = parameters(name)
    for key in values:
        if key not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            hint = nearest(key, known)
            raise ValueError(f"task.{shown(key)[1:-1]}: task '{name}' has no such parameter; expected {expected}{hint}")
    takes = inspect.signature(BUILDERS[name]).parameters
    if label_smoothing and "label_smoothing" not in takes:
        raise ValueError(f"train.label_smoothing={label_smoothing!r}: task '{name}' does not take it; set it to 0")
    offered = {"label_smoothing": label_smoothing, "unigram": unigram}
    task = BUILDERS[name](objective, config, **values, **{key: offered[key] for key in _OFFERED if key in takes})
    if config.experts and not task.trains_routers:
        raise ValueError(
            f"model.experts={config.experts}: task '{name}' has no terms for their routers (Task.trains_routers); set "
            "model.experts=0, or derive the task from Tokens"
        )
    return task
