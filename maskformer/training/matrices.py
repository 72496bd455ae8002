"""Optimizers that measure a whole matrix, on parameters that hold several or that are shaped by heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Axes = tuple[str | None, ...]

# Axes along which a parameter is a stack of the papers' arrays, in the order in which they lead its axes.
STACKING = ("layers", "experts")


def matrix_shape(axes: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter as papers write it: the heads and their channels are one side of one matrix.

    >>> matrix_shape(("embed", "heads", "head_dim"), (768, 12, 64))
    (768, 768)
    >>> matrix_shape(("layers", "kv_heads", "head_dim"), (6, 2, 64))
    (6, 128)
    >>> matrix_shape(("layers", "experts", "embed", "mlp"), (6, 8, 64, 128))
    (6, 8, 64, 128)
    """
    sides: list[int] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis == "head_dim" and sides:
            sides[-1] *= size
        else:
            sides.append(size)
    return tuple(sides)


def per_matrix(inner: optax.GradientTransformation, logical_axes: Any) -> optax.GradientTransformation:
    """`inner` on one matrix (or vector) of the papers at a time: one layer of a stack, one of its experts, its heads
    side by side.

    For transformations whose update of a weight depends on its neighbours (factored moments, norms of a parameter, of
    its update), as those of Adafactor do. The state has `inner`'s structure with a tree like the parameters' in the
    place of each array; an array that has a value for each weight has its parameter's shape, the others lead with
    the layers and the experts.

    Args:
      inner: treats every array of its tree alone.
      logical_axes: names of each parameter's axes, as `Model.logical_axes` gives them.
    """
    named: list[Axes] = jax.tree.leaves(logical_axes, is_leaf=lambda node: isinstance(node, tuple))
    structure = jax.tree.structure(jax.eval_shape(inner.init, jax.ShapeDtypeStruct((1,), jnp.float32)))

    def on_layers(axes: Axes, function: Callable[..., Any]) -> Callable[..., Any]:
        for axis in STACKING:
            function = jax.vmap(function) if axis in axes else function
        return function

    def reshaped(tree: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(new) if leaf.shape == old else leaf, tree)

    def joined(states: list[Any], params: Any) -> optax.OptState:
        """From a state for each parameter to a state of trees."""
        columns = [[leaves[field] for leaves in map(jax.tree.leaves, states)] for field in range(structure.num_leaves)]
        return structure.unflatten([jax.tree.structure(params).unflatten(column) for column in columns])

    def init(params: Any) -> optax.OptState:
        states = []
        # Optax also asks with an empty tree, to learn which parts of a state are shaped like the parameters.
        for axes, param in zip(named, jax.tree.leaves(params), strict=bool(jax.tree.leaves(params))):
            shape = matrix_shape(axes, param.shape)
            state = on_layers(axes, inner.init)(param.reshape(shape))
            states.append(reshaped(state, shape, param.shape))
        return joined(states, params)

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        tree = jax.tree.structure(params)
        columns = [tree.flatten_up_to(field) for field in structure.flatten_up_to(state)]
        new_updates, states = [], []
        for axes, gradient, param, *fields in zip(
            named, tree.flatten_up_to(updates), jax.tree.leaves(params), *columns, strict=True
        ):
            shape = matrix_shape(axes, param.shape)
            before = reshaped(structure.unflatten(fields), param.shape, shape)
            change, after = on_layers(axes, inner.update)(gradient.reshape(shape), before, param.reshape(shape))
            new_updates.append(change.reshape(param.shape))
            states.append(reshaped(after, shape, param.shape))
        return tree.unflatten(new_updates), joined(states, params)

    return optax.GradientTransformation(init, update)
