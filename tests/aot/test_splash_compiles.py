"""The splash path compiled by the real TPU compiler, forward and backward, for chips that are not here."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("libtpu", reason="needs the extra [tpu]")

from jax.experimental import topologies

import maskformer as mf
from maskformer import masks
from maskformer.attention import placements, platform

pytestmark = pytest.mark.aot

TOPOLOGIES = {"v5e": ("v5e:2x4", "v5litepod-8"), "v5p": ("v5p:2x2x2", "v5p-16")}

MASKS = {
    "causal": lambda segment_ids: masks.causal(),
    "causal window": lambda segment_ids: masks.causal() & masks.sliding_window(300),
    "packed causal": lambda segment_ids: masks.causal() & masks.segments(segment_ids),
    "packed bidirectional": lambda segment_ids: masks.segments(segment_ids, padding=0),
    "per head": lambda segment_ids: masks.per_head([masks.causal(), masks.sliding_window(64)] * 4),
}


@pytest.fixture(scope="module", params=list(TOPOLOGIES))
def devices(request):
    name, accelerator = TOPOLOGIES[request.param]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ["TPU_ACCELERATOR_TYPE"] = accelerator
    return np.array(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def training_step(mask_of, placement=None):
    def loss(query, key, value, segment_ids):
        with platform.assume("tpu"), placements.use(placement):
            output = mf.dot_product_attention(query, key, value, mask=mask_of(segment_ids))
        return output.astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def structs(shardings, length=2048, batch=4, heads=8, kv_heads=4, head_dim=128):
    arrays = [
        ((batch, length, heads, head_dim), jnp.bfloat16),
        ((batch, length, kv_heads, head_dim), jnp.bfloat16),
        ((batch, length, kv_heads, head_dim), jnp.bfloat16),
        ((batch, length), jnp.int32),
    ]
    return [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for (shape, dtype), sharding in zip(arrays, shardings, strict=True)
    ]


@pytest.mark.parametrize("name", MASKS)
def test_forward_and_backward_compile_for_one_chip(devices, name):
    one = jax.sharding.SingleDeviceSharding(devices.flat[0])
    compiled = training_step(MASKS[name]).lower(*structs([one] * 4)).compile()
    assert compiled.as_text().count("splash") >= 3  # the forward, the dQ and the dK dV kernels
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30


@pytest.mark.parametrize("name", ["causal", "packed causal"])
def test_forward_and_backward_compile_for_a_mesh_of_data_and_tensor(devices, name):
    mesh = jax.sharding.Mesh(devices.reshape(4, 2), ("data", "tensor"))
    spec = jax.sharding.PartitionSpec
    wide = jax.sharding.NamedSharding(mesh, spec("data", None, "tensor", None))
    ids = jax.sharding.NamedSharding(mesh, spec("data", None))
    placement = placements.Placement(mesh, batch="data", heads="tensor")
    compiled = training_step(MASKS[name], placement).lower(*structs([wide] * 3 + [ids])).compile()
    text = compiled.as_text()
    assert text.count("splash") >= 3
    assert "all-gather" not in text


TRANSFORMED = {
    "causal": lambda segment_ids: masks.causal(),
    "packed causal": lambda segment_ids: masks.causal() & masks.segments(segment_ids),
    "stored": lambda segment_ids: masks.causal() | masks.segments(segment_ids),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_forward_and_backward_compile_under_vmap_scan_and_remat(devices, name):
    def loss(query, key, value, segment_ids):
        def attend(total, scale):
            again = jax.checkpoint(lambda *a: mf.dot_product_attention(*a, mask=TRANSFORMED[name](segment_ids)))
            return total + (scale * again(query, key, value)).astype(jnp.float32).sum(), None

        with platform.assume("tpu"):
            return jax.lax.scan(attend, 0.0, jnp.ones(2, query.dtype))[0]

    step = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))))
    one = jax.sharding.SingleDeviceSharding(devices.flat[0])
    arguments = [
        jax.ShapeDtypeStruct((3, *struct.shape), struct.dtype, sharding=one)
        for struct in structs([one] * 4, length=256, batch=2, heads=4, kv_heads=2, head_dim=64)
    ]
    assert step.lower(*arguments).compile().as_text().count("splash") >= 3


POSITIONS = {
    "chunked": masks.chunked(48, 1) & masks.strided(3),
    "block diffusion": masks.block_diffusion(16, 128),
    "neighborhood": masks.neighborhood((16, 16), (5, 5)),
    "a predicate": masks.predicate(lambda q, k: (jnp.sin(q * 0.3) > 0) | ((q ^ k) & 7 < 3)),
    "a predicate that closes over an array": masks.predicate(lambda q, k: (jnp.arange(256) % 3 > 0)[k] & (k <= q)),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_masks_of_positions_compile_in_the_kernel(devices, name):
    one = jax.sharding.SingleDeviceSharding(devices.flat[0])
    # A division asks Pallas which TPU it is for.
    device = devices.flat[0]
    described = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=described)):
        lowered = training_step(lambda segment_ids: POSITIONS[name]).lower(*structs([one] * 4, length=256))
    assert lowered.compile().as_text().count("splash") >= 3


def test_a_sharded_sequence_runs_the_kernels_on_gathered_keys(devices):
    mesh = jax.sharding.Mesh(devices.reshape(2, 4), ("data", "context"))
    spec = jax.sharding.PartitionSpec
    wide = jax.sharding.NamedSharding(mesh, spec("data", "context", None, None))
    ids = jax.sharding.NamedSharding(mesh, spec("data", None))
    placement = placements.Placement(mesh, batch="data", context="context")
    compiled = training_step(MASKS["packed causal"], placement).lower(*structs([wide] * 3 + [ids])).compile()
    text = compiled.as_text()
    assert text.count("splash") >= 3
    assert "all-gather" in text
