"""Ragged products: by tiles, by XLA's own, and by a loop over the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskformer.models import grouped

GENERATOR = np.random.default_rng(0)
ROWS, MATRICES, OTHERS = (
    GENERATOR.normal(size=shape).astype(np.float32) for shape in ((700, 8), (4, 8, 6), (700, 6))
)
SIZES = {"uneven": [300, 0, 5, 200], "none": [0, 0, 0, 0], "one": [0, 700, 0, 0], "at the edges": [256, 256, 100, 88]}


def loop(sizes):
    """Outputs of the rows in a group, and the outer sums of each, in float64."""
    group = np.repeat(np.arange(4), sizes)
    rows, others = ROWS.astype(np.float64), OTHERS.astype(np.float64)
    out = np.array([rows[i] @ MATRICES[g] for i, g in enumerate(group)]).reshape(-1, 6)
    sums = np.zeros(MATRICES.shape)
    for i, g in enumerate(group):
        sums[g] += np.outer(rows[i], others[i])
    return out, sums


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_both_ways_equal_a_loop_over_the_rows(sizes):
    out, sums = loop(sizes)
    total, sizes = sum(sizes), jnp.array(sizes)
    for by_matrices, outer in (
        (grouped._tiled_by_matrices, grouped._tiled_outer),
        (grouped._ragged_by_matrices, grouped._ragged_outer),
    ):
        np.testing.assert_allclose(jax.jit(by_matrices)(ROWS, MATRICES, sizes)[:total], out, atol=1e-5)
        np.testing.assert_allclose(jax.jit(outer)(ROWS, OTHERS, sizes), sums, atol=2e-4)


def test_gradients_are_those_of_the_ragged_product_also_when_vmapped():
    sizes = jnp.array([SIZES["uneven"], SIZES["at the edges"]])
    rows = jnp.stack([ROWS, ROWS[::-1]])

    def loss(product):
        def one(rows, sizes, matrices):
            inside = jnp.arange(700)[:, None] < sizes.sum()
            return jnp.sum(jnp.sin(jnp.where(inside, product(rows, matrices, sizes), 0)))

        return one

    def ours(rows, matrices):
        return jnp.sum(jax.vmap(loss(grouped.grouped_product), (0, 0, None))(rows, sizes, matrices))

    def theirs(rows, matrices):
        return sum(loss(jax.lax.ragged_dot)(rows[i], sizes[i], matrices) for i in range(2))

    for a, b in zip(*(jax.jit(jax.grad(f, (0, 1)))(rows, MATRICES) for f in (ours, theirs)), strict=True):
        # What stands behind the last group has no meaning, and whoever calls masks it.
        inside = jnp.arange(700)[:, None] < sizes.sum(1)[:, None, None] if a.ndim == 3 and a.shape[1] == 700 else True
        np.testing.assert_allclose(jnp.where(inside, a, 0), jnp.where(inside, b, 0), atol=1e-4)


def test_a_tpu_gets_the_product_of_its_compiler():
    lowered = jax.jit(grouped.grouped_product).trace(ROWS, MATRICES, jnp.array(SIZES["uneven"]))
    assert "ragged_dot" in lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert "ragged_dot" not in lowered.lower(lowering_platforms=("cpu",)).as_text()
