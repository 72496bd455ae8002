"""Optimizers and schedules by name, all Optax's own; here they are only named, masked and chained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from maskformer.training.matrices import STACKING, per_matrix
from maskformer.training.precision import in_float32, on_master_weights
from maskformer.training.sections import OptimizerConfig, check_warmup


def create_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, from the first update (step 0) to the last (`steps - 1`).

    Raises:
      ValueError: the warm-up is not shorter than the run.

    >>> wsd = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup_steps=2, decay_fraction=0.4)
    >>> schedule = create_schedule(wsd, steps=10)
    >>> [round(float(schedule(step)), 2) for step in range(10)]
    [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    check_warmup(config, steps)
    remaining, final = steps - warmup, peak * config.final_fraction
    if config.schedule == "constant":
        body = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        body = optax.linear_schedule(peak, final, remaining)
    elif config.schedule == "cosine":
        body = optax.cosine_decay_schedule(peak, remaining, alpha=config.final_fraction)
    elif config.schedule == "inverse_sqrt":
        # During the warm-up the joined schedule evaluates its body too, at negative steps.
        body = lambda step: peak * jnp.sqrt(warmup / (warmup + jnp.maximum(step, 0)))
    else:
        decay_steps = min(max(round(config.decay_fraction * steps), 1), remaining)
        body = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay_steps)],
            [remaining - decay_steps],
        )
    if not warmup:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), body], [warmup])


def decay_mask(logical_axes: Any, decay: str) -> Any:
    """Which parameters weight decay applies to: a bool for each leaf of `logical_axes`.

    Biases, norms and other vectors are left alone unless `decay` is "all"; "kernels" leaves embedding tables
    (those with a `vocab`, `positions` or `token_types` axis) alone too.
    """

    def decays(axes: tuple[str | None, ...]) -> bool:
        dimensions = [axis for axis in axes if axis not in STACKING]
        table = any(axis in ("vocab", "positions", "token_types") for axis in dimensions)
        # A bias of a head-shaped projection is [heads, head_dim]: two axes, and still a vector of `width`.
        vector = len(dimensions) < 2 or set(dimensions) <= {"heads", "kv_heads", "head_dim"}
        return decay == "all" or (not vector and not (decay == "kernels" and table))

    return jax.tree.map(decays, logical_axes, is_leaf=lambda axes: isinstance(axes, tuple))


def create_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, logical_axes: Any
) -> optax.GradientTransformation:
    """The gradient transformation of `config`: clipping, then the named optimizer with masked decoupled decay.

    Gradients, state and updates are float32 (or wider) whatever the parameters' dtype, clipping's norm among them.

    Args:
      config: which optimizer, and its numbers.
      schedule: learning rate as a function of the step.
      logical_axes: names of each parameter's axes, as `Model.logical_axes` gives them: they tell what decays, and which
        arrays are stacks of matrices.
    """
    mask = decay_mask(logical_axes, config.decay)
    if config.name == "adamw":
        update = optax.adamw(
            schedule, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=mask
        )
    elif config.name == "lion":
        update = optax.lion(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=mask)
    elif config.name == "sgd":
        # Decay is added after the momentum, so that it stays decoupled from the gradient as in the others.
        update = optax.chain(
            optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity(),
            optax.add_decayed_weights(config.weight_decay, mask),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        # Optax's adafactor adds its decay after the learning rate; ours is multiplied by it, as in the others.
        adafactor = optax.adafactor(learning_rate=None, multiply_by_parameter_scale=True, clipping_threshold=1.0)
        update = optax.chain(
            per_matrix(adafactor, logical_axes),
            # adafactor already points downhill; turn it round so that decay and rate apply as elsewhere.
            optax.scale(-1.0),
            optax.add_decayed_weights(config.weight_decay, mask),
            optax.scale_by_learning_rate(schedule),
        )
    if config.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return on_master_weights(update) if config.master_weights else in_float32(update)
