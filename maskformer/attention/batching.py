"""What `jax.vmap` does with a kernel, where its own rule would be wrong or slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def map_by_map(function: Callable[..., Any], block_map: Callable[[Any], Any]) -> Callable[..., Any]:
    """``function`` under a vmap that goes from one block map to the next, each with its own tiles.

    Mapped together, the loops over the tiles of a row would run as long as the longest, and every branch would.

    Args:
      function: of arrays.
      block_map: picks the block map from a structure like the arguments.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size, batched, *arguments):
        if any(jax.tree.leaves(block_map(batched))):
            pick = lambda i: jax.tree.map(lambda x, some: x[i] if some else x, arguments, tuple(batched))
            results = jax.lax.map(lambda i: mapped(*pick(i)), jnp.arange(size))
        else:
            axes = jax.tree.map(lambda some: 0 if some else None, tuple(batched))
            results = jax.vmap(function, in_axes=axes, axis_size=size)(*arguments)
        return results, jax.tree.map(lambda _: True, results)

    return mapped


@jax.custom_vjp
def alike(arrays: Any) -> Any:
    """The same pytree of arrays; under `jax.vmap` all have the mapped axis if one has."""
    return _batch_alike(arrays)


alike.defvjp(lambda arrays: (_batch_alike(arrays), None), lambda _, cotangents: (cotangents,))


@jax.custom_vjp
def cotangent_like(output: jax.Array, query: jax.Array) -> jax.Array:
    """The output, whose cotangent has the mapped axis under `jax.vmap` if the query has."""
    return output


cotangent_like.defvjp(
    lambda output, query: (output, query),
    lambda query, cotangent: (_batch_alike((cotangent, query))[0], None),
)


def _batch_alike(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, _all_batched(*leaves))


@jax.custom_batching.custom_vmap
def _all_batched(*arrays):
    return arrays


@_all_batched.def_vmap
def _(size, batched, *arrays):
    arrays = [x if has_axis else jnp.broadcast_to(x, (size, *x.shape)) for x, has_axis in zip(arrays, batched)]
    return _all_batched(*arrays), (True,) * len(arrays)
