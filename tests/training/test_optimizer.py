"""Schedules and decay masks against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskformer import cli
from maskformer.training.optimizer import create_optimizer, create_schedule, decay_mask
from maskformer.training.sections import OptimizerConfig

AXES = {
    "embedding": ("vocab", "embed"),
    "kernel": ("layers", "embed", "mlp"),
    "head_bias": ("layers", "heads", "head_dim"),
    "norm": ("layers", "norm"),
    "bias": ("embed",),
}


def values(steps=100, **changes):
    schedule = create_schedule(OptimizerConfig(learning_rate=2.0, **changes), steps)
    return np.array([float(schedule(step)) for step in range(steps)])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt", "wsd"])
def test_warmup_is_linear_and_ends_at_the_peak(name):
    curve = values(schedule=name, warmup_steps=10)
    np.testing.assert_allclose(curve[:11], 2.0 * np.arange(11) / 10, rtol=1e-6)
    assert curve.max() <= 2.0 * (1 + 1e-6)


def test_each_schedule_follows_its_formula_after_the_warmup():
    after = np.arange(90)
    np.testing.assert_allclose(values(schedule="constant", warmup_steps=10)[10:], 2.0)
    np.testing.assert_allclose(values(schedule="linear", warmup_steps=10)[10:], 2 * (1 - after / 90), atol=1e-6)
    cosine = 2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(math.pi * after / 90)))
    np.testing.assert_allclose(
        values(schedule="cosine", warmup_steps=10, final_fraction=0.1)[10:], cosine, atol=1e-6
    )
    np.testing.assert_allclose(
        values(schedule="inverse_sqrt", warmup_steps=10)[10:], 2 * np.sqrt(10 / np.arange(10, 100)), rtol=1e-6
    )
    wsd = values(schedule="wsd", warmup_steps=10, decay_fraction=0.25)
    np.testing.assert_allclose(wsd[10:76], 2.0)
    np.testing.assert_allclose(wsd[75:], 2 * (1 - np.arange(25) / 25), atol=1e-6)


def test_a_warmup_as_long_as_the_run_is_refused_with_a_fix_that_works():
    with pytest.raises(ValueError, match="warmup_steps=100: expected fewer than train.steps=100"):
        create_schedule(OptimizerConfig(warmup_steps=100), 100)
    for name, steps, fixed in (("cosine", 30, 3), ("inverse_sqrt", 5, 1)):
        with pytest.raises(ValueError, match=f"set --config.optimizer.warmup_steps={fixed} or --config.train.steps"):
            create_schedule(OptimizerConfig(warmup_steps=70, schedule=name), steps)
        create_schedule(OptimizerConfig(warmup_steps=fixed, schedule=name), steps)


def test_a_wrong_config_leaves_no_workdir_behind(tmp_path, capsys):
    flags = ["--config=configs/bert.py:tiny", "--config.train.steps=30", "--config.optimizer.warmup_steps=70"]
    assert cli.main(["train", *flags, f"--workdir={tmp_path / 'run'}"]) == cli.EX_USAGE
    assert "set --config.optimizer.warmup_steps=3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_decay_leaves_vectors_alone_and_kernels_leaves_tables_alone_too():
    assert decay_mask(AXES, "matrices") == {
        "embedding": True, "kernel": True, "head_bias": False, "norm": False, "bias": False
    }
    assert decay_mask(AXES, "kernels")["embedding"] is False
    assert all(decay_mask(AXES, "all").values())


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor"])
def test_weight_decay_alone_shrinks_matrices_by_rate_times_decay(name):
    config = OptimizerConfig(name=name, weight_decay=0.1, clip_norm=None, schedule="constant")
    optimizer = create_optimizer(config, lambda step: 0.5, AXES)
    params = jax.tree.map(lambda axes: jnp.ones((4,) * len(axes)), AXES, is_leaf=lambda x: isinstance(x, tuple))
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["kernel"], 0.95, rtol=1e-6)
    np.testing.assert_allclose(after["bias"], 1.0)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor"])
def test_every_optimizer_descends_a_quadratic(name):
    config = OptimizerConfig(name=name, weight_decay=0.0)
    optimizer = create_optimizer(config, lambda step: 0.02, {"x": ("embed", "mlp")})
    params = {"x": jnp.full((4, 4), 3.0)}
    opt_state = optimizer.init(params)
    for _ in range(20):
        updates, opt_state = optimizer.update({"x": 2 * params["x"]}, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert float(params["x"].max()) < 3.0 - 0.05


def test_clipping_scales_the_whole_gradient_to_the_norm():
    config = OptimizerConfig(name="sgd", momentum=0.0, weight_decay=0.0, clip_norm=1.0)
    optimizer = create_optimizer(config, lambda step: 1.0, {"a": ("embed",), "b": ("embed",)})
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    updates, _ = optimizer.update({"a": jnp.array([30.0]), "b": jnp.array([40.0])}, optimizer.init(params), params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.6, -0.8], rtol=1e-6)
