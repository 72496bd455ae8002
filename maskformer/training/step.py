"""One update and one evaluation batch, as pure functions of arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maskformer import objectives
from maskformer.evaluation import metrics
from maskformer.models import ElectraModel, Model
from maskformer.objectives import Corrupted, Objective
from maskformer.training.losses import Batch, LossSums, create_loss, detection_sums, predict
from maskformer.training.state import TrainState


def masking_key(seed: int) -> jax.Array:
    """The key of a run's training masks."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def create_train_step(
    model: Model | ElectraModel,
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

    What is minimised is the sum of the loss's terms (one, or ELECTRA's two), each a factor times a mean over the whole
    batch, on any number of devices and in any number of accumulation steps. No denominator depends on a logit: the
    whole batch is corrupted first, which gives them all, and the parts' gradients are then summed under fixed scales.
    (A mean over micro-batch means would weigh a row by how few positions its neighbours predict.)

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
    loss = create_loss(model, objective, objective_key, label_smoothing)

    def gradient_sums(
        params: Any, rows: tuple[Batch, Corrupted], scales: dict[str, jax.Array], dropout_key: jax.Array
    ) -> tuple[Any, LossSums]:
        def scaled(params: Any) -> tuple[jax.Array, LossSums]:
            sums = loss.sums(params, *rows, dropout_key)
            return sum(scales[name] * term for name, term in sums.terms.items()), sums

        with placed():
            (_, sums), gradients = jax.value_and_grad(scaled, has_aux=True)(params)
        return gradients, sums

    def accumulate(
        params: Any, rows: tuple[Batch, Corrupted], scales: dict[str, jax.Array], dropout_key: jax.Array
    ) -> tuple[Any, LossSums]:
        if accumulation_steps == 1:
            return gradient_sums(params, rows, scales, dropout_key)

        # Part i takes every accumulation_steps-th row, so that each device keeps to the rows it already holds.
        def split(rows: jax.Array) -> jax.Array:
            return rows.reshape(-1, accumulation_steps, *rows.shape[1:]).swapaxes(0, 1)

        def add(total: Any, part: tuple[jax.Array, tuple[Batch, Corrupted]]) -> tuple[Any, None]:
            index, rows = part
            new = gradient_sums(params, rows, scales, jax.random.fold_in(dropout_key, index))
            return jax.tree.map(jnp.add, total, new), None

        parts = (jnp.arange(accumulation_steps), jax.tree.map(split, rows))
        first = jax.tree.map(lambda rows: rows[0], parts[1])
        shapes = jax.eval_shape(gradient_sums, params, first, scales, dropout_key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, parts)[0]

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        corrupted = objective(objective_key, batch, step=state.step, token_weights=state.token_losses)
        weights = loss.weights(corrupted)
        # A batch in which nothing is predicted has no gradient; it must not divide by zero.
        scales = {name: factor / jnp.maximum(weights[name], 1.0) for name, factor in loss.factors.items()}
        dropout_key = jax.random.fold_in(dropout_root, state.step)
        gradients, sums = accumulate(state.params, (batch, corrupted), scales, dropout_key)

        grad_norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
        token_losses = state.token_losses
        if sums.token_losses is not None and objective.token_loss_decay is not None:
            token_losses = objectives.move_token_losses(token_losses, *sums.token_losses, objective.token_loss_decay)
        window = state.window.add(
            state.step,
            means={
                **{name: (term, weights[name]) for name, term in sums.terms.items()},
                **sums.means,
                "joint_loss": (sum(scales[name] * term for name, term in sums.terms.items()), jnp.ones(())),
                "grad_norm": (grad_norm, jnp.ones(())),
            },
            counts={
                "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.int32),
                "predicted": jnp.sum(corrupted.loss_weights > 0, dtype=jnp.int32),
            },
            learning_rate=schedule(state.step),
        )
        return TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            window=window,
            token_losses=token_losses,
        )

    return train_step


def create_eval_step(
    model: Model | ElectraModel,
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
        batch = {**batch, "epoch": jnp.zeros_like(batch["epoch"])}
        corrupted = objective(key, batch, step=0)
        with placed():
            logits = predict(model, objective, params, corrupted)
            sums = metrics.objective_sums(objective, logits, corrupted, unigram=unigram)
            if isinstance(objective, objectives.Electra) and isinstance(model, ElectraModel):
                pairs = detection_sums(model, objective, key, params, batch, corrupted, logits)
                sums |= {name: jnp.stack(pair) for name, pair in pairs.items()}
        return sums

    return eval_step
