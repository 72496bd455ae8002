"""Adafactor against the paper's equations, matrix by matrix, whatever our parameters look like in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskformer.training import sharding
from maskformer.training.optimizer import create_optimizer
from maskformer.training.sections import MeshConfig, OptimizerConfig

# Logical axes, shape in memory, and the shape of the matrix or vector that it is on paper.
LAYOUTS = {
    "query": (("embed", "heads", "head_dim"), (160, 4, 32), (160, 128)),
    "key": (("embed", "kv_heads", "head_dim"), (160, 2, 32), (160, 64)),
    "out": (("heads", "head_dim", "embed"), (4, 32, 160), (128, 160)),
    "many_heads": (("embed", "heads", "head_dim"), (16, 128, 128), (16, 16384)),
    "many_head_biases": (("heads", "head_dim"), (128, 128), (16384,)),
    "up": (("embed", "mlp"), (160, 256), (160, 256)),
    "norm": (("norm",), (160,), (160,)),
}
RATE = 0.02


def adafactor(params, gradients):
    """Algorithms 4 and 5 of Shazeer & Stern 2018 in float64: the parameter after each of the gradients.

    A matrix with a side below 128 keeps all of its second moments, as in Mesh TensorFlow's and Optax's.
    """
    x, rows, columns, v = np.asarray(params, np.float64), 0.0, 0.0, 0.0
    factored = x.ndim == 2 and min(x.shape) >= 128
    for t, gradient in enumerate(gradients, start=1):
        decay = 1 - t**-0.8
        square = np.asarray(gradient, np.float64) ** 2 + 1e-30
        if factored:
            rows = decay * rows + (1 - decay) * square.sum(1)
            columns = decay * columns + (1 - decay) * square.sum(0)
            v = np.outer(rows, columns) / rows.sum()
        else:
            v = decay * v + (1 - decay) * square
        u = gradient / np.sqrt(v)
        u = u / max(1.0, np.sqrt(np.mean(u**2)))
        x = x - RATE * max(1e-3, np.sqrt(np.mean(x**2))) * u
    return x


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def trained():
    """Parameters before and after three updates, with the gradients, compiled once.

    Layers differ by a factor of 100 in their weights, and against it in their gradients.
    """
    axes = {name: ("layers", *axes) for name, (axes, _, _) in LAYOUTS.items()}
    shapes = {name: (2, *shape) for name, (_, shape, _) in LAYOUTS.items()}
    axes |= {"deeper": ("layers", "embed", "mlp"), "table": ("vocab", "embed")}
    shapes |= {"deeper": (3, 4, 4), "table": (130, 128)}
    scales = {
        name: np.geomspace(0.02, 2.0, shape[0], dtype=np.float32).reshape(-1, *[1] * (len(shape) - 1))
        if name != "table" else 1.0
        for name, shape in shapes.items()
    }
    before = {name: draw(0, *shape) * scales[name] for name, shape in shapes.items()}
    gradients = [{name: draw(t, *shape) / scales[name] for name, shape in shapes.items()} for t in (1, 2, 3)]
    config = OptimizerConfig(name="adafactor", weight_decay=0.0, clip_norm=None)
    optimizer = create_optimizer(config, lambda step: RATE, axes)

    @jax.jit
    def step(gradient, opt_state, params):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    after, opt_state = before, optimizer.init(jax.tree.map(jnp.asarray, before))
    for gradient in gradients:
        after, opt_state = step(gradient, opt_state, after)
    return before, gradients, after


def assert_follows(before, gradients, after):
    expected = adafactor(before, gradients)
    moved = np.abs(expected - before).max()
    np.testing.assert_allclose(after, expected, rtol=1e-6, atol=1e-5 * moved)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layer_of_a_stack_is_one_matrix_of_the_paper(name, trained):
    before, gradients, after = trained
    matrix = LAYOUTS[name][2]
    for layer in range(2):
        assert_follows(
            before[name][layer].reshape(matrix),
            [gradient[name][layer].reshape(matrix) for gradient in gradients],
            np.asarray(after[name])[layer].reshape(matrix),
        )


def test_an_embedding_table_is_one_matrix(trained):
    before, gradients, after = trained
    assert_follows(before["table"], [gradient["table"] for gradient in gradients], after["table"])


def test_stacks_of_different_depths_stand_side_by_side(trained):
    before, gradients, after = trained
    for layer in range(3):
        rows = [gradient["deeper"][layer] for gradient in gradients]
        assert_follows(before["deeper"][layer], rows, after["deeper"][layer])


def test_statistics_stay_small_and_lie_where_their_parameters_do():
    mesh = sharding.create_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    axes = {name: ("layers", *axes) for name, (axes, _, _) in LAYOUTS.items()}
    shapes = {name: jax.ShapeDtypeStruct((2, *shape), jnp.float32) for name, (_, shape, _) in LAYOUTS.items()}
    at = sharding.param_shardings(mesh, axes, sharding.RULES)
    params = {name: draw(0, *shape.shape) for name, shape in shapes.items()}
    optimizer = create_optimizer(OptimizerConfig(name="adafactor"), lambda step: RATE, axes)
    abstract = jax.eval_shape(optimizer.init, shapes)
    state_at = sharding.optimizer_shardings(mesh, optimizer, abstract, shapes, at)
    placed = jax.device_put(params, at)
    state = jax.jit(optimizer.init, out_shardings=state_at)(placed)
    for name in ("key", "many_heads", "many_head_biases", "norm"):  # whole second moments
        moments = [leaf for leaf in named(state, name) if leaf.shape == shapes[name].shape]
        assert [leaf.sharding.spec for leaf in moments] == [at[name].spec]
    for name in ("query", "out", "up"):
        assert sum(leaf.size for leaf in named(state, name)) < 2 * sum(shapes[name].shape[1:]) + 2 * 130
    after, _ = jax.jit(optimizer.update, out_shardings=(at, state_at))(placed, state, placed)
    alone, _ = jax.jit(lambda params: optimizer.update(params, optimizer.init(params), params))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), after, alone)


def named(state, name):
    return [leaf for path, leaf in jax.tree.leaves_with_path(state) if any(getattr(k, "key", 0) == name for k in path)]
