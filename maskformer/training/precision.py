"""Running sums in float32 whatever the parameters' dtype: optimizer states, averages, master weights.

A bfloat16 number has eight significant bits: adding less than 1/512 of it changes nothing. Everything that grows by
small steps is therefore kept in float32 (or in the parameters' own dtype where that is wider), and rounded where it is
used. For float32 parameters nothing here changes a bit, or costs anything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def widened(tree: Any) -> Any:
    """`tree` with its floating-point arrays in float32, or as they are where they are wider.

    >>> widened({"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.int32)})["a"].dtype
    dtype('float32')
    """
    return jax.tree.map(lambda leaf: leaf.astype(_wide(leaf.dtype)), tree)


def widened_shapes(tree: Any) -> Any:
    """What `widened` makes of arrays of these `jax.ShapeDtypeStruct`s, where they are."""
    return jax.tree.map(lambda leaf: leaf.update(dtype=_wide(leaf.dtype)), tree)


def average_start(params: Any) -> Any:
    """The moving average before the first update: a copy of `params` in float32, sharing no buffer with them."""
    return jax.tree.map(lambda leaf: jnp.array(_as_stored(leaf), copy=True), params)


def average(mean: Any, params: Any, decay: float) -> Any:
    """`decay * mean + (1 - decay) * params` in the dtype of `mean`, which `average_start` began."""
    return optax.incremental_update(jax.tree.map(_as_stored, params), mean, 1.0 - decay)


def norm(tree: Any) -> jax.Array:
    """Euclidean norm over all arrays of `tree`, summed in float32."""
    return optax.tree.norm(widened(tree))


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on float32 gradients and parameters, so that its state and its updates are float32 too.

    `optax.apply_updates` then adds in float32 and rounds once, to the parameters' dtype.
    """

    def init(params: Any) -> optax.OptState:
        return inner.init(widened(params))

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        return inner.update(widened(updates), state, widened(params))

    return optax.GradientTransformation(init, update)


class MasterState(NamedTuple):
    """The float32 copy of the parameters that is trained, and the state of the optimizer that trains it."""

    weights: Any
    inner: optax.OptState


def trained_weights(params: Any, opt_state: optax.OptState) -> Any:
    """The weights that are trained: the float32 copy where there is one, else the parameters themselves."""
    return opt_state.weights if isinstance(opt_state, MasterState) else params


def on_master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` trains a float32 copy of the parameters; the parameters are its rounding (Micikevicius et al. 2018).

    An update is the difference between the new rounding and the parameters as they are. So parameters that were
    changed from elsewhere return to the copy: whoever replaces parameters begins the state anew with `init`.
    """

    def init(params: Any) -> MasterState:
        weights = average_start(params)
        return MasterState(weights, inner.init(weights))

    def update(updates: Any, state: MasterState, params: Any = None) -> tuple[Any, MasterState]:
        updates, inner_state = inner.update(widened(updates), state.inner, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        # In float32, where parameter + (rounded - parameter) is the rounded weight again, unless it fell to less than
        # 1/2**15 of itself in this one step; the next step then makes good.
        change = jax.tree.map(
            lambda weight, param: weight.astype(param.dtype).astype(weight.dtype) - param.astype(weight.dtype),
            weights,
            params,
        )
        return change, MasterState(weights, inner_state)

    return optax.GradientTransformation(init, update)


def _as_stored(leaf: jax.Array) -> jax.Array:
    """`leaf` widened, and rounded to its own dtype for certain: XLA may leave out a rounding that is widened again."""
    wide = leaf.astype(_wide(leaf.dtype))
    if wide.dtype == leaf.dtype:
        return wide
    own = jnp.finfo(leaf.dtype)
    return jax.lax.reduce_precision(wide, exponent_bits=own.nexp, mantissa_bits=own.nmant)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
