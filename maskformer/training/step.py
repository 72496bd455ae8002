"""One update and one evaluation batch, as pure functions of arrays."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maskformer.training.precision import average, norm, trained_weights, widened
from maskformer.training.sharding import SLICE_AXIS
from maskformer.training.state import TrainState
from maskformer.training.tasks import Batch, Sums, Task

# A context in which the model is traced, which says where activations live.
Placed = Callable[[], contextlib.AbstractContextManager[None]]


def masking_key(seed: int) -> jax.Array:
    """The key of a run's training masks."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def create_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    accumulation_steps: int = 1,
    ema_decay: float | None = None,
    placed: Placed = contextlib.nullcontext,
    gradients_at: Any = None,
    slices: int = 1,
    sent_at: Any = None,
    received_at: Any = None,
) -> Callable[[TrainState, Batch], TrainState]:
    """The update `state, batch -> state`, to be jitted with the state donated.

    What is minimised is the sum of the task's terms, each a factor times a mean over the whole batch, on any number of
    devices and in any number of accumulation steps. No denominator depends on a parameter: the whole batch is corrupted
    first, which gives them all, and the parts' gradients are then summed under fixed scales. (A mean over micro-batch
    means would weigh a row by how few positions its neighbours predict.)

    Args:
      task, optimizer: what is trained, and how.
      schedule: the learning rate, which the optimizer already follows; here it is only recorded.
      seed: of masking and dropout.
      accumulation_steps: parts that the batch is run in.
      ema_decay: of the averaged parameters; None keeps no average.
      placed: by default the compiler decides where activations live.
      gradients_at: shardings of the summed gradients; None leaves them to the compiler, which may keep each whole.
      slices: of several, each adds up the gradients of its own rows, and they are sent to the others in bfloat16.
      sent_at, received_at: of several slices, shardings of their sums, [slices, ...], when they are sent, and of the
        whole sum.
    """
    key, dropout_root = masking_key(seed), jax.random.fold_in(jax.random.key(seed), 1)

    def gradient_sums(
        params: Any, example: Any, scales: Mapping[str, jax.Array], dropout_key: jax.Array, *census: Any
    ) -> tuple[Any, Sums]:
        def scaled(params: Any) -> tuple[jax.Array, Sums]:
            sums = task.sums(params, example, dropout_key, *census)
            return sum(scales[name] * term for name, term in sums.terms.items()), sums

        with placed():
            (_, sums), gradients = jax.value_and_grad(scaled, has_aux=True)(params)
        gradients = widened(gradients)
        if gradients_at is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, gradients_at)
        return gradients, sums

    def accumulate(
        params: Any, example: Any, scales: Mapping[str, jax.Array], dropout_key: jax.Array
    ) -> tuple[Any, Sums]:
        def count(rows: Any, key: jax.Array) -> Any:
            with placed():
                return task.census(params, rows, key)

        def of_all_slices(census: Any) -> tuple[Any, ...]:
            if not jax.tree.leaves(census):
                return ()
            return (census if slices == 1 else jax.lax.psum(census, SLICE_AXIS),)

        if accumulation_steps == 1:
            census = () if slices == 1 else of_all_slices(count(example, dropout_key))
            return gradient_sums(params, example, scales, dropout_key, *census)

        # Part i takes every accumulation_steps-th row, so that each device keeps to the rows it already holds.
        def split(rows: jax.Array) -> jax.Array:
            return rows.reshape(-1, accumulation_steps, *rows.shape[1:]).swapaxes(0, 1)

        parts = (jnp.arange(accumulation_steps), jax.tree.map(split, example))

        def total(of_part: Callable[[Any, jax.Array], Any]) -> Any:
            def add(total: Any, part: tuple[jax.Array, Any]) -> tuple[Any, None]:
                index, rows = part
                new = of_part(rows, jax.random.fold_in(dropout_key, index))
                return jax.tree.map(jnp.add, total, new), None

            shapes = jax.eval_shape(of_part, jax.tree.map(lambda rows: rows[0], parts[1]), dropout_key)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            return jax.lax.scan(add, zeros, parts)[0] if jax.tree.leaves(zeros) else zeros

        census = of_all_slices(total(count))
        return total(lambda rows, key: gradient_sums(params, rows, scales, key, *census))

    def over_slices(
        params: Any, example: Any, scales: Mapping[str, jax.Array], dropout_key: jax.Array
    ) -> tuple[Any, Sums]:
        if slices == 1:
            return accumulate(params, example, scales, dropout_key)
        # Rows of a slice are one run of the batch, so that none moves. A slice is a part of the mesh and of no array
        # that the model sees: the sums of all slices stand side by side until here.
        of_slices = jax.tree.map(lambda rows: rows.reshape(slices, -1, *rows.shape[1:]), example)
        keys = jax.vmap(functools.partial(jax.random.fold_in, dropout_key))(jnp.arange(slices))
        each = jax.vmap(accumulate, in_axes=(None, 0, None, 0), axis_name=SLICE_AXIS, spmd_axis_name=SLICE_AXIS)
        gradients, sums = each(params, of_slices, scales, keys)
        # Added up in float32, a part on each device of a slice, so that none sends what its neighbour does.
        gradients = jax.lax.with_sharding_constraint(gradients, sent_at)
        sent = jax.tree.map(lambda leaf: jnp.sum(leaf.astype(jnp.bfloat16), axis=0), gradients)
        received = jax.tree.map(lambda leaf, summed: summed.astype(leaf.dtype), gradients, sent)
        received = jax.lax.with_sharding_constraint(received, received_at)
        return received, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        example = task.corrupt(key, batch, state.step, state.task)
        weights = task.weights(example)
        # A term that nothing is asked for has no gradient; it must not divide by zero.
        scales = {
            name: jnp.where(weights[name] > 0, factor / jnp.where(weights[name] > 0, weights[name], 1.0), 0.0)
            for name, factor in task.factors.items()
        }
        gradients, sums = over_slices(state.params, example, scales, jax.random.fold_in(dropout_root, state.step))

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = average(state.ema, trained_weights(params, opt_state), ema_decay)
        one = jnp.ones(())
        window = state.window.add(
            state.step,
            means={
                **{name: (term, weights[name]) for name, term in sums.terms.items()},
                **sums.means,
                "joint_loss": (sum(scales[name] * term for name, term in sums.terms.items()), one),
                "grad_norm": (norm(gradients), one),
            },
            counts={
                "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.int32),
                "predicted": task.predicted(example),
            },
            learning_rate=schedule(state.step),
        )
        return TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            window=window,
            task=task.update(state.task, sums.carry),
        )

    return train_step


def create_eval_step(task: Task, *, seed: int) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Metric sums of one batch under masks that depend on `seed` and `example_id` only, without dropout.

    Args:
      task: as for training, of the objective at the rate to evaluate.
      seed: of the evaluation masks.
    """
    key = jax.random.key(seed)

    def eval_step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        # A scheduled rate is evaluated at its start; a recipe pins the rate in `evaluation.objective`.
        batch = {**batch, "epoch": jnp.zeros_like(batch["epoch"])}
        return task.evaluate(params, task.corrupt(key, batch, 0, None))

    return eval_step
