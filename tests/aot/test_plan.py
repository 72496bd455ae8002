"""`maskformer plan` against libtpu: the topologies it describes, and programs that the real compiler compiles."""

import os

import pytest

pytest.importorskip("libtpu", reason="needs the extra [tpu]")
# The chip is described by libtpu, which must not look for one on this machine.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maskformer import planning
from maskformer.planning import topologies
from maskformer.planning.compiled import out_of_memory
from maskformer.training.throughput import peak_flops
from tests.planning.cases import config_of

pytestmark = pytest.mark.aot

TINY = ("--config=configs/gpt.py:tiny,seq=128,vocab=1024", "--config.train.batch_size=64", "--config.model.layers=4")


@pytest.mark.parametrize("name, slices", [
    ("v4:2x2x4", 1), ("v5e:4x4", 1), ("v5e:8x16", 1), ("v5p:2x2x4", 1), ("v5p:4x4x8", 1), ("v6e:8x8", 2),
    ("tpu7x:2x2x2", 1),
])  # fmt: skip
def test_libtpu_has_the_devices_and_hosts_that_the_plan_counts(name, slices):
    topology = topologies.parse(name, slices)
    devices = topologies.devices(topology)
    assert len(devices) == topology.devices
    assert len({(getattr(one, "slice_index", 0), one.process_index) for one in devices}) == topology.hosts


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_predicted_and_measured_mfu_are_shares_of_one_peak(name):
    topology = topologies.parse(name)
    for device in topologies.devices(topology):
        assert peak_flops(device) == topology.chip.flops


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_compiler_leaves_to_a_program_what_the_plan_calls_usable(name):
    topology = topologies.parse(name)
    mesh = Mesh(np.array(topologies.devices(topology)), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    # 30 arrays of 4 GiB on each device.
    x = jax.ShapeDtypeStruct((mesh.size * 2**10, 2**20), jnp.float32, sharding=rows)
    step = jax.jit(lambda x: [jnp.sort(x * number, axis=0) for number in range(1, 31)], out_shardings=rows)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        step.lower(x).compile()
    _, available = out_of_memory(str(error.value))
    assert available == round(topology.chip.usable)


@pytest.mark.slow
def test_a_compiled_plan_confirms_the_estimate():
    made = planning.plan(config_of(TINY), planning.parse_topology("v5e:2x2"), compile=True)
    compiled, memory = made.compiled, made.chosen.memory
    assert made.fits and "(compiled)" in made.verdict
    assert memory.arguments == pytest.approx(compiled.arguments, rel=0.02)
    (flow,) = made.chosen.traffic
    # Beside the gradients, a few scalars.
    assert sum(one.payload_bytes for one in compiled.collectives) == pytest.approx(flow.payload_bytes, abs=200)
    assert {one.axis for one in compiled.collectives} == {"data"}


@pytest.mark.slow
def test_what_the_compiler_finds_no_room_for_is_a_verdict():
    flags = ("--config=configs/bert.py:large,seq=512", "--config.train.batch_size=4096")
    made = planning.plan(config_of(flags), planning.parse_topology("v5e:4x4"), compile=True)
    assert not made.fits and made.compiled.available == round(made.topology.chip.usable)
    assert made.compiled.needed == pytest.approx(made.chosen.memory.peak, rel=0.1)
    assert made.changes and "the compiler says" in made.verdict
