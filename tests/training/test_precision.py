"""Small steps are not lost: states, averages and master weights of narrow parameters against float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from maskformer.training import default_config, precision, resolve
from maskformer.training.optimizer import create_optimizer
from maskformer.training.sections import OPTIMIZERS, OptimizerConfig, check_master_weights

AXES = {"table": ("vocab", "embed"), "query": ("layers", "embed", "heads", "head_dim"), "norm": ("layers", "norm")}
SHAPES = {"table": (130, 128), "query": (2, 128, 4, 32), "norm": (2, 128)}


def optimizer_of(name, logical_axes=None, rate=0.01, **changes):
    config = OptimizerConfig(**{"name": name, "clip_norm": None, "weight_decay": 0.1, **changes})
    return create_optimizer(config, lambda step: rate, logical_axes or {"x": ("embed", "mlp")})


def train(optimizer, params, gradients):
    """The parameters and state after each of the stacked `gradients`."""

    def step(carry, gradient):
        params, opt_state = carry
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.jit(lambda *carry: jax.lax.scan(step, carry, gradients)[0])(params, optimizer.init(params))


def drawn(steps=40, dtype=jnp.bfloat16):
    generator = np.random.default_rng(0)
    params, gradients = generator.normal(size=(3, 4)), generator.normal(size=(steps, 3, 4))
    return {"x": jnp.asarray(params, dtype)}, {"x": jnp.asarray(gradients, dtype)}


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_running_sum_is_float32_whatever_the_parameters_are(name, dtype, master):
    params = {key: jax.ShapeDtypeStruct(shape, dtype) for key, shape in SHAPES.items()}
    optimizer = optimizer_of(name, AXES, master_weights=master)
    state = jax.eval_shape(optimizer.init, params)
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and set(floats) == {jnp.dtype("float32")}
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (after, updates)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), (state, jax.tree.map(lambda p: p.update(dtype=jnp.float32), params))
    )


def adamw(x, gradients, b1=0.9, b2=0.999):
    """Kingma & Ba 2015, algorithm 1, with the decay of Loshchilov & Hutter 2019, algorithm 2, in float64."""
    m = v = 0.0
    for t, gradient in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        x = x - 0.01 * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8) + 0.1 * x)
    return x, [m, v]


def lion(x, gradients, b1=0.9, b2=0.999):
    """Chen et al. 2023, algorithm 2, in float64."""
    m = 0.0
    for gradient in gradients:
        x = x - 0.01 * (np.sign(b1 * m + (1 - b1) * gradient) + 0.1 * x)
        m = b2 * m + (1 - b2) * gradient
    return x, [m]


def sgd(x, gradients):
    """Heavy-ball momentum (Polyak 1964) with decoupled decay, in float64."""
    m = 0.0
    for gradient in gradients:
        m = 0.9 * m + gradient
        x = x - 0.01 * (m + 0.1 * x)
    return x, [m]


@pytest.mark.parametrize("oracle", [adamw, lion, sgd])
def test_moments_and_master_weights_of_bfloat16_are_those_of_the_equations(oracle):
    params, gradients = drawn()
    after, state = train(optimizer_of(oracle.__name__, master_weights=True), params, gradients)
    expected, moments = oracle(*(np.asarray(tree["x"], np.float64) for tree in (params, gradients)))
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3, 4)]
    for leaf, wanted in zip(leaves, [expected, *moments], strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(after["x"], leaves[0].astype(jnp.bfloat16))


def test_updates_of_float32_parameters_are_those_of_optax_to_the_bit():
    params, gradients = drawn(dtype=jnp.float32)
    rate = optax.constant_schedule(0.01)
    for name, theirs in (
        ("adamw", optax.adamw(rate, 0.9, 0.999, 1e-8, weight_decay=0.1)),
        ("lion", optax.lion(rate, 0.9, 0.999, weight_decay=0.1)),
    ):
        ours = train(optimizer_of(name), params, gradients)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(train(theirs, params, gradients)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_thousand_updates_too_small_for_bfloat16_arrive_with_master_weights():
    params, gradients = {"x": jnp.ones((4, 4), jnp.bfloat16)}, {"x": jnp.ones((1000, 4, 4), jnp.bfloat16)}
    still = dict(rate=1e-4, momentum=0.0, weight_decay=0.0)
    assert float(train(optimizer_of("sgd", **still), params, gradients)[0]["x"].min()) == 1.0
    after, state = train(optimizer_of("sgd", master_weights=True, **still), params, gradients)
    np.testing.assert_allclose(state.weights["x"], 0.9, rtol=1e-4)
    assert after["x"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(after["x"], np.float32(0.9).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_gradient_stays_in_every_dtype(name):
    for dtype in (jnp.float16, jnp.bfloat16):
        params = {"x": jnp.ones((2, 2), dtype)}
        optimizer = optimizer_of(name, weight_decay=0.0)
        updates, _ = optimizer.update({"x": jnp.zeros((2, 2), dtype)}, optimizer.init(params), params)
        np.testing.assert_array_equal(updates["x"], 0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_layers_in_one_stack_are_updated_as_two_layers_alone(name):
    generator = np.random.default_rng(0)
    kernel, axes = generator.normal(size=(2, 128, 4, 32)).astype(np.float32), ("embed", "heads", "head_dim")
    kernel *= np.array([0.02, 2.0], np.float32).reshape(2, 1, 1, 1)
    gradients = generator.normal(size=(3, 2, 128, 4, 32)).astype(np.float32)
    stacked, _ = train(optimizer_of(name, {"x": ("layers", *axes)}), {"x": kernel}, {"x": gradients})
    alone = {"0": kernel[0], "1": kernel[1]}, {"0": gradients[:, 0], "1": gradients[:, 1]}
    expected, _ = train(optimizer_of(name, {"0": axes, "1": axes}), *alone)
    for layer in range(2):
        np.testing.assert_allclose(stacked["x"][layer], expected[str(layer)], rtol=1e-6, atol=1e-8)


def test_the_norm_that_clips_and_is_reported_is_summed_in_float32():
    gradients = {"x": jnp.full((71, 73), 1.0078125, jnp.bfloat16)}
    exact = 1.0078125 * np.sqrt(71 * 73)
    np.testing.assert_allclose(precision.norm(gradients), exact, rtol=1e-6)
    optimizer = optimizer_of("sgd", rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=1.0)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    np.testing.assert_allclose(updates["x"], -1.0078125 / exact, rtol=1e-6)


def test_the_average_of_bfloat16_parameters_follows_them():
    path = jnp.linspace(0.5, 1.5, 1000).astype(jnp.bfloat16)
    start = precision.average_start({"x": path[0]})
    mean, _ = jax.lax.scan(lambda mean, x: (precision.average(mean, {"x": x}, 0.999), None), start, path)
    expected = float(path[0])
    for value in np.asarray(path, np.float64):
        expected = 0.999 * expected + 0.001 * value
    np.testing.assert_allclose(mean["x"], expected, rtol=1e-5)


def test_the_average_of_float32_parameters_is_optax_to_the_bit_and_starts_as_a_copy():
    params, gradients = drawn(dtype=jnp.float32)
    mean = precision.average_start(params)
    assert mean["x"].unsafe_buffer_pointer() != params["x"].unsafe_buffer_pointer()
    for value in gradients["x"]:
        expected = optax.incremental_update({"x": value}, mean, 1.0 - 0.99)
        mean = precision.average(mean, {"x": value}, 0.99)
        np.testing.assert_array_equal(mean["x"], expected["x"])


def test_the_largest_decays_that_are_accepted_move_parameters_and_averages():
    params, gradients = {"x": jnp.ones((2, 2))}, {"x": jnp.ones((1, 2, 2))}
    largest = dict(b1=0.99999994, b2=0.99999994, momentum=0.99999994)
    for name in OPTIMIZERS:
        after, _ = train(optimizer_of(name, weight_decay=0.0, **largest), params, gradients)
        assert np.isfinite(after["x"]).all() and (after["x"] < 1.0).all(), name
    mean = precision.average({"x": jnp.zeros(())}, {"x": jnp.ones(())}, 0.99999994)
    assert 0.0 < float(mean["x"]) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_master_weights_of_parameters_that_are_no_narrower_are_refused(dtype):
    with pytest.raises(ValueError, match=f"expected False with model.param_dtype='{dtype}'"):
        check_master_weights(OptimizerConfig(master_weights=True), dtype)
    check_master_weights(OptimizerConfig(master_weights=False), dtype)


def test_master_weights_of_float32_parameters_are_refused():
    config = default_config()
    config.optimizer.master_weights = True
    with pytest.raises(ValueError, match=r"optimizer.master_weights=True: .* --config.model.param_dtype=bfloat16"):
        resolve(config)
    config.model.param_dtype = "bfloat16"
    assert resolve(config).optimizer.master_weights
