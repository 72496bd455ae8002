"""Products of groups of rows with a matrix each, as ragged as the groups are.

On TPU this is XLA's own ragged product. Elsewhere that one multiplies every row by every matrix and masks; here the
rows are walked in tiles instead (Gale et al. 2023), of which each group adds one at the most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TILE = 256  # rows; fewer waste less at the ends of groups, and more keep a processor busier


@jax.custom_vjp
def grouped_product(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Each row by the matrix of its group; it may be differentiated, vmapped, and run under `jax.shard_map`.

    Args:
      rows: [rows, inputs], the first `sizes[0]` of group 0, and so on.
      matrices: [groups, inputs, outputs].
      sizes: int32 [groups]; together at most the number of rows.

    Returns:
      [rows, outputs] in the dtype of the rows. What stands behind the last group is unspecified.

    >>> rows, matrices = jnp.arange(4.0)[:, None], jnp.array([1.0, 10.0])[:, None, None]
    >>> grouped_product(rows, matrices, jnp.array([1, 3]))[:, 0]
    Array([ 0., 10., 20., 30.], dtype=float32)
    """
    return _by_matrices(rows, matrices, sizes)


def _forward(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Any]:
    return _by_matrices(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows, matrices, sizes = saved
    to_rows = _by_matrices(gradient, matrices.swapaxes(1, 2), sizes)
    return to_rows, _outer(rows, gradient, sizes).astype(matrices.dtype), None


grouped_product.defvjp(_forward, _backward)


# JAX does not vmap its ragged product. Over the slices of a mesh each device has one of them anyway.
@jax.custom_batching.sequential_vmap
def _by_matrices(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(rows, matrices, sizes, tpu=_ragged_by_matrices, default=_tiled_by_matrices)


@jax.custom_batching.sequential_vmap
def _outer(rows: jax.Array, others: jax.Array, sizes: jax.Array) -> jax.Array:
    """[groups, inputs, outputs]: the sum over the rows of each group of `row[:, None] * other`."""
    return jax.lax.platform_dependent(rows, others, sizes, tpu=_ragged_outer, default=_tiled_outer)


def _ragged_by_matrices(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(rows, matrices, sizes, preferred_element_type=rows.dtype)


def _ragged_outer(rows: jax.Array, others: jax.Array, sizes: jax.Array) -> jax.Array:
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jax.lax.ragged_dot_general(rows, others, sizes, dimensions, preferred_element_type=wide)


def _tiled_by_matrices(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    def add(out: jax.Array, group: jax.Array, start: jax.Array, mine: jax.Array, tile: jax.Array) -> jax.Array:
        matrix = jax.lax.dynamic_index_in_dim(matrices, group, keepdims=False)
        before = jax.lax.dynamic_slice_in_dim(out, start, tile.shape[0])
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, tile @ matrix, before), start, 0)

    return _over_tiles(add, jnp.zeros((rows.shape[0], matrices.shape[2]), rows.dtype), rows, sizes)


def _tiled_outer(rows: jax.Array, others: jax.Array, sizes: jax.Array) -> jax.Array:
    wide = jnp.promote_types(rows.dtype, jnp.float32)

    def add(out: jax.Array, group: jax.Array, start: jax.Array, mine: jax.Array, tile: jax.Array) -> jax.Array:
        other = jax.lax.dynamic_slice_in_dim(others, start, tile.shape[0])
        product = jax.lax.dot_general(
            jnp.where(mine, tile, 0), jnp.where(mine, other, 0), (((0,), (0,)), ((), ())), preferred_element_type=wide
        )
        return out.at[group].add(product)

    shape = (sizes.shape[0], rows.shape[1], others.shape[1])
    return _over_tiles(add, jnp.zeros(shape, wide), rows, sizes)


def _over_tiles(add: Callable[..., jax.Array], out: jax.Array, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    """`out = add(out, group, start, mine, tile)` for every part of a group in a tile: rows from `start` on, of which
    `mine` [tile, 1] says which are the group's."""
    groups, count = sizes.shape[0], rows.shape[0]
    size = min(TILE, count)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    # A group has a part in each tile that it reaches into.
    first = starts // size
    parts = jnp.where(sizes > 0, (ends - 1) // size - first + 1, 0)
    last = jnp.cumsum(parts)

    def step(number: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(last, number, side="right").astype(jnp.int32)
        tile = first[group] + number - (last[group] - parts[group])
        # The last tile is cut short by the end, where it is moved back: its rows are told by their numbers.
        start = jnp.minimum(tile * size, count - size)
        row = start + jnp.arange(size)
        mine = (row >= jnp.maximum(starts[group], tile * size)) & (row < ends[group])
        return add(out, group, start, mine[:, None], jax.lax.dynamic_slice_in_dim(rows, start, size))

    return jax.lax.fori_loop(0, last[groups - 1], step, out)
