"""Logical axis names become shardings only where a mesh and rules are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maskformer import models
from maskformer.models.partitioning import partition_spec

RULES = {
    "batch": "data",
    "length": None,
    "activation_embed": None,
    "activation_heads": "tensor",
    "activation_kv_heads": "tensor",
    "activation_mlp": "tensor",
    "activation_vocab": "tensor",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    **dict.fromkeys(
        ("embed", "embed_factor", "embed_out", "experts", "head_dim", "label", "layers", "norm", "positions", "router",
         "token_types")
    ),
}


def test_without_rules_constrain_is_the_identity():
    x = jnp.ones((2, 3))
    assert models.constrain(x, "batch", "no such name") is x


def test_the_rules_name_every_axis_of_the_model():
    assert set(models.PARAMETER_AXES) | set(models.ACTIVATION_AXES) == set(RULES)


def test_a_sharded_model_constrains_its_activations_and_computes_the_same():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices; tests/conftest.py simulates them")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))
    config = models.EncoderConfig(vocab_size=21, vocab_multiple=2, layers=2, width=16, heads=2, max_length=8)
    model = models.create(config)
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 21)
    key = jax.random.key(2)

    def loss(params, tokens):
        return jnp.sum(jnp.sin(model.apply(params, tokens, dropout_key=key)))

    def sharded_loss(params, tokens):
        with models.logical_rules(mesh, RULES):
            return loss(params, tokens)

    shardings = jax.tree.map(
        lambda axes: NamedSharding(mesh, partition_spec(axes, RULES)),
        model.logical_axes(),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    placed = jax.device_put(params, shardings), jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    step = jax.jit(jax.value_and_grad(sharded_loss))
    assert step.lower(*placed).as_text().count("sharding_constraint") >= 5
    one, eight = jax.jit(jax.value_and_grad(loss))(params, tokens), step(*placed)
    for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


def test_a_name_without_a_rule_and_a_mesh_axis_used_twice_are_refused():
    with pytest.raises(ValueError, match="logical axis 'mlp': no sharding rule"):
        partition_spec(("mlp",), {})
    with pytest.raises(ValueError, match="'embed' and 'mlp' of one array both map to mesh axis 'tensor'"):
        partition_spec(("embed", "mlp"), {"embed": "tensor", "mlp": ("tensor",)})
