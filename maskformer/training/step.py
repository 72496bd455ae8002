"""One update and one evaluation batch, as pure functions of arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maskformer.evaluation import metrics
from maskformer.models import Model
from maskformer.objectives import Corrupted, Objective
from maskformer.training.state import TrainState

Batch = dict[str, jax.Array]
GradientSums = tuple[Any, dict[str, jax.Array]]


def masking_key(seed: int) -> jax.Array:
    """The key of a run's training masks."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def predict(
    model: Model, objective: Objective, params: Any, corrupted: Corrupted, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Logits at the positions that the objective predicts; without a dropout key, deterministic."""
    return model.apply(
        params,
        corrupted.input_tokens,
        positions=corrupted.positions,
        mask=objective.attend(corrupted),
        predict_positions=corrupted.predict_positions,
        segment_ids=corrupted.segment_ids,
        dropout_key=dropout_key,
    )


def loss_sums(
    model: Model,
    objective: Objective,
    params: Any,
    objective_key: jax.Array,
    dropout_key: jax.Array,
    batch: Batch,
    step: jax.Array,
    label_smoothing: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of the loss over the predicted positions of `batch`, with the sums that a mean of it needs."""
    corrupted = objective(objective_key, batch, step=step)
    logits = predict(model, objective, params, corrupted, dropout_key)
    weights = corrupted.loss_weights
    loss_sum, weight_sum = objective.loss(logits, corrupted, label_smoothing)
    # The loss needs the largest logit anyway; comparing with it is far cheaper than an argmax.
    target_logits = jnp.take_along_axis(logits, corrupted.target_tokens[..., None], axis=-1)[..., 0]
    correct = target_logits >= jnp.max(logits, axis=-1)
    return loss_sum, {
        "weight": weight_sum,
        "correct": jnp.sum(correct * weights),
        "weights": jnp.sum(weights),
        "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.int32),
        "predicted": jnp.sum(weights > 0, dtype=jnp.int32),
    }


def create_train_step(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    accumulation_steps: int = 1,
    label_smoothing: float = 0.0,
    ema_decay: float | None = None,
    placed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Callable[[TrainState, Batch], TrainState]:
    """The update `state, batch -> state`, to be jitted with the state donated.

    The gradient is that of `loss_sum / weight_sum` over the whole batch, on any number of devices and in any number
    of accumulation steps: gradients of the sums are added, and divided once by the total weight. (A mean over
    micro-batch means would weigh a row by how few positions its neighbours predict.)

    Args:
      model, objective, optimizer: what is trained, on what, how.
      schedule: the learning rate, which the optimizer already follows; here it is only recorded.
      seed: of masking and dropout.
      accumulation_steps: parts that the batch is run in.
      label_smoothing: share of the target's probability spread evenly over the vocabulary.
      ema_decay: of the averaged parameters; None keeps no average.
      placed: makes the context that the model is traced in, which says where activations live; by default the
        compiler decides.
    """
    objective_key, dropout_root = masking_key(seed), jax.random.fold_in(jax.random.key(seed), 1)

    def gradient_sums(params: Any, batch: Batch, dropout_key: jax.Array, step: jax.Array) -> GradientSums:
        def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            return loss_sums(model, objective, params, objective_key, dropout_key, batch, step, label_smoothing)

        with placed():
            (loss_sum, sums), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return gradients, {**sums, "loss": loss_sum}

    def accumulate(params: Any, batch: Batch, dropout_key: jax.Array, step: jax.Array) -> GradientSums:
        if accumulation_steps == 1:
            return gradient_sums(params, batch, dropout_key, step)

        # Part i takes every accumulation_steps-th row, so that each device keeps to the rows it already holds.
        def split(rows: jax.Array) -> jax.Array:
            return rows.reshape(-1, accumulation_steps, *rows.shape[1:]).swapaxes(0, 1)

        def add(total: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, rows = part
            new = gradient_sums(params, rows, jax.random.fold_in(dropout_key, index), step)
            return jax.tree.map(jnp.add, total, new), None

        parts = (jnp.arange(accumulation_steps), jax.tree.map(split, batch))
        first = jax.tree.map(lambda rows: rows[0], parts[1])
        shapes = jax.eval_shape(gradient_sums, params, first, dropout_key, step)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, parts)[0]

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        gradients, sums = accumulate(state.params, batch, jax.random.fold_in(dropout_root, state.step), state.step)
        # A batch in which nothing is predicted has no gradient; it must not divide by zero.
        scale = 1.0 / jnp.maximum(sums["weight"], 1.0)
        gradients = jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), gradients)
        grad_norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
        window = state.window.add(
            state.step,
            means={
                "loss": (sums["loss"], sums["weight"]),
                "accuracy": (sums["correct"], sums["weights"]),
                "grad_norm": (grad_norm, jnp.ones(())),
            },
            counts={"tokens": sums["tokens"], "predicted": sums["predicted"], "steps": jnp.ones((), jnp.int32)},
            learning_rate=schedule(state.step),
        )
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema, window=window)

    return train_step


def create_eval_step(
    model: Model,
    objective: Objective,
    *,
    seed: int,
    unigram: jax.Array | None = None,
    placed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Callable[[Any, Batch], metrics.Sums]:
    """Metric sums of one batch under masks that depend on `seed` and `example_id` only, without dropout.

    Args:
      model, objective: as for training; the objective at the rate to evaluate.
      seed: of the evaluation masks.
      unigram: log-probabilities [vocabulary] of the context-free baseline, or None for none.
      placed: as for training.
    """
    key = jax.random.key(seed)

    def eval_step(params: Any, batch: Batch) -> metrics.Sums:
        # A scheduled rate is evaluated at its start; a recipe pins the rate in `evaluation.objective`.
        corrupted = objective(key, {**batch, "epoch": jnp.zeros_like(batch["epoch"])}, step=0)
        with placed():
            logits = predict(model, objective, params, corrupted)
        return metrics.prediction_sums(
            logits, corrupted.target_tokens, corrupted.loss_weights, corrupted.kinds, unigram=unigram
        )

    return eval_step
