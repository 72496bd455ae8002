"""Meshes of eight simulated devices: values and gradients equal to one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskformer as mf
from maskformer import masks
from maskformer.attention import Placement, placements, platform
from tests.attention import cases

LENGTH = 64
AXES = ("data", "tensor", "context")
IDS = jnp.asarray(np.repeat(np.arange(8), 8)[None] // np.array([[1], [3], [5], [8]]), jnp.int32)
LENGTHS = jnp.array([0, 64, 25, 3])

MASKS = {
    "packed causal": lambda: masks.causal() & masks.segments(IDS) & masks.key_padding(lengths=LENGTHS),
    "per head": lambda: masks.per_head([masks.causal(), masks.sliding_window(5), masks.everything(), masks.nothing()]),
}
PLACEMENTS = {
    "data and tensor": ((2, 4, 1), {}, "reference"),
    "data and tensor, blockwise": ((4, 2, 1), {}, "blockwise"),
    "all_gather": ((2, 1, 4), dict(context="context"), "blockwise"),
    "ring": ((1, 2, 4), dict(context="context", context_method="ring"), None),
    "ring, unbalanced": ((2, 1, 4), dict(context="context", context_method="ring", balanced=False), None),
}


def placed(name):
    sizes, options, _ = PLACEMENTS[name]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(sizes), AXES)
    return Placement(mesh, batch="data", heads="tensor", **options)


def step(mask, placement, implementation):
    """Output, logsumexp and the gradients of every differentiable argument, with every option in use."""

    def loss(arrays):
        q, k, v, bias, sink_logits, table = arrays
        with placements.use(placement):
            output, residual = mf.dot_product_attention(
                q, k, v, mask=mask, bias=bias, sink_logits=sink_logits,
                score_mod=mf.attention.score_mods.relative_bias(table), logits_soft_cap=4.0,
                dropout_rate=0.3, dropout_key=jax.random.key(3),
                implementation=implementation, return_residual=True,
            )  # fmt: skip
        total = (output * jnp.cos(jnp.arange(output.size)).reshape(output.shape)).sum()
        return total + jnp.where(jnp.isfinite(residual), jnp.sin(residual), 0).sum(), (output, residual)

    q, k, v, _ = cases.arrays(batch=4, q_len=LENGTH, kv_len=LENGTH, heads=4, kv_heads=4)
    bias = jax.random.normal(jax.random.key(1), (4, 1, LENGTH, LENGTH))
    arrays = (q, k, v, bias, jnp.array([0.0, 1.0, -1.0, 0.5]), jax.random.normal(jax.random.key(2), (4, 9)))
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


@pytest.fixture(scope="module")
def one_device():
    return {name: step(build(), None, "reference") for name, build in MASKS.items()}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "ring, unbalanced" else n for n in PLACEMENTS]
)
def test_a_mesh_computes_what_one_device_computes(tiny_tiles, one_device, name, mask):
    found = step(MASKS[mask](), placed(name), PLACEMENTS[name][2])
    for actual, expected in zip(jax.tree.leaves(found), jax.tree.leaves(one_device[mask])):
        finite = np.isfinite(np.asarray(expected))
        assert (np.asarray(actual)[~finite] == np.asarray(expected)[~finite]).all()
        np.testing.assert_allclose(np.asarray(actual)[finite], np.asarray(expected)[finite], rtol=2e-5, atol=1e-5)


# Masks that say nothing of a length.
ANY_LENGTH = ["none", "causal window or sinks", "predicate", "not causal", "empty first rows", "nothing", "per head"]


@pytest.mark.slow
@pytest.mark.parametrize("mask", ANY_LENGTH)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_mask_on_every_mesh_computes_what_one_device_computes(tiny_tiles, name, mask):
    build = cases.CASES[mask][0]
    found, expected = step(build(), placed(name), PLACEMENTS[name][2]), step(build(), None, "reference")
    for actual, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        finite = np.isfinite(np.asarray(wanted))
        assert (np.asarray(actual)[~finite] == np.asarray(wanted)[~finite]).all()
        np.testing.assert_allclose(np.asarray(actual)[finite], np.asarray(wanted)[finite], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_a_callers_own_shard_map_computes_what_one_device_computes(tiny_tiles, mask):
    """With JAX's check of what varies over the mesh: replicated arguments get the sum of all devices' gradients."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = jax.sharding.PartitionSpec

    def attend(arrays):
        q, k, v, bias, sink_logits, ids = arrays
        one = MASKS["per head"]() if mask == "per head" else masks.causal() & masks.segments(ids)
        options = dict(bias=bias, sink_logits=sink_logits, logits_soft_cap=4.0)
        return mf.dot_product_attention(q, k, v, mask=one, implementation="blockwise", **options)

    q, k, v, d_output = cases.arrays(batch=4, q_len=LENGTH, kv_len=LENGTH, heads=4, kv_heads=4)
    bias = jax.random.normal(jax.random.key(1), (1, 1, LENGTH, LENGTH))
    arrays = [q, k, v, bias, jnp.array([0.0, 1.0, -1.0, 0.5]), IDS]
    specs = [spec("data")] * 3 + [spec()] * 2 + [spec("data")]
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=spec("data"))

    def step(function):
        loss = lambda differentiable: (function([*differentiable, IDS]) * d_output).sum()
        return jax.jit(jax.value_and_grad(loss))(arrays[:5])

    found, expected = step(sharded), step(attend)
    for actual, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-5)


def test_a_sharded_batch_is_not_gathered():
    placement = placed("data and tensor, blockwise")
    spec = jax.sharding.NamedSharding(placement.mesh, jax.sharding.PartitionSpec("data", None, "tensor", None))
    ids = jax.sharding.NamedSharding(placement.mesh, jax.sharding.PartitionSpec("data", None))

    def loss(q, k, v, ids):
        with placements.use(placement):
            return mf.dot_product_attention(q, k, v, mask=masks.segments(ids), implementation="blockwise").sum()

    shape = jax.ShapeDtypeStruct((4, LENGTH, 4, 8), jnp.float32, sharding=spec)
    rows = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32, sharding=ids)
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape, rows).compile().as_text()
    assert "all-gather" not in text


def test_zigzag_gives_every_device_the_same_causal_work():
    from maskformer.attention.context import Dealing

    dealing = Dealing("context", 4, 2)
    work = [sum(start + 8 for start in dealing.starts(device, 8)) for device in range(4)]
    assert len(set(work)) == 1
    owners = sorted(start for device in range(4) for start in dealing.starts(device, 8))
    assert owners == list(range(0, 64, 8))


def test_a_mesh_that_does_not_divide_the_call_says_which_dimension():
    placement = placed("data and tensor")
    q = jnp.zeros((3, LENGTH, 4, 8))
    with placements.use(placement), pytest.raises(ValueError, match="batch: 3 is not divisible by mesh axes data"):
        mf.dot_product_attention(q, q, q)


def test_a_sharded_sequence_refuses_a_dense_backend_by_name():
    q = jnp.zeros((4, LENGTH, 4, 8))
    with placements.use(placed("ring")):
        with pytest.raises(ValueError, match="blockwise alone can compute"):
            mf.dot_product_attention(q, q, q, implementation="reference")
        explanation = mf.explain(masks.causal(), q, q, q)
    assert explanation.backend == "blockwise"
    assert "ring" in explanation.why
    assert explanation.devices == 4 and "of which 4 devices cut their parts" in str(explanation)


def test_gathered_keys_take_the_platforms_own_backend():
    q = jax.ShapeDtypeStruct((4, 4096, 4, 64), jnp.bfloat16)
    with placements.use(placed("all_gather")), platform.assume("tpu"):
        explanation = mf.explain(masks.causal() & masks.sliding_window(1024), q, q, q)
        refused = mf.explain(masks.causal(), q, q, q, dropout_rate=0.1, dropout_key=0)
    assert explanation.backend == "splash" and "all_gather over mesh axis 'context'" in explanation.why
    assert refused.backend == "blockwise" and refused.passed_over["splash"] == "the kernel has no dropout"


def test_placement_names_an_axis_that_the_mesh_lacks():
    with pytest.raises(ValueError, match="not 'model'"):
        Placement(placed("ring").mesh, heads="model")
