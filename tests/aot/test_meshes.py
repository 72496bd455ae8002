"""Meshes over the real wiring of TPU pods: every layout is there, and the processes read each row that they need.

Nothing is compiled: libtpu only says which devices there are, where they stand, and which process has which.
"""

import itertools
import math
import os
import random

import numpy as np
import pytest

pytest.importorskip("libtpu", reason="needs the extra [tpu]")

from jax.experimental import topologies

from maskformer.training import sharding
from maskformer.training.sections import MeshConfig

pytestmark = pytest.mark.aot

FLAT = ["2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"]  # v5e, v6e
CUBIC = ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"]
TOPOLOGIES = [f"{kind}:{shape}" for kind in ("v5e", "v6e") for shape in FLAT]
TOPOLOGIES += [f"{kind}:{shape}" for kind in ("v4", "v5p", "tpu7x") for shape in CUBIC]
SEVERAL = [("v5e:4x8", 2), ("v5p:2x2x4", 4), ("v6e:8x8", 2), ("v6e:16x16", 4), ("tpu7x:2x2x2", 2)]
FEW = 60


def devices_of(topology, slices=1):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nobody's chips are taken
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5p-8"  # any will do: the topology is asked for by name
    # A v4 chip's two cores are one device, as on the machines.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    if slices > 1:
        options["num_slices"] = slices
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    chips = slices * math.prod(map(int, topology.partition(":")[2].split("x")))
    assert len(devices) == chips * (2 if topology.startswith("tpu7x") else 1)
    return devices


def layouts(count, data_multiple=1):
    """All sizes of the six axes that multiply to `count`, a power of two."""
    powers = [2**exponent for exponent in range(count.bit_length())]
    for stage, fsdp, expert, tensor, context in itertools.product(powers, repeat=5):
        rest, remainder = divmod(count, stage * fsdp * expert * tensor * context)
        if rest and not remainder and rest % data_multiple == 0:
            yield MeshConfig(stage=stage, data=rest, fsdp=fsdp, expert=expert, tensor=tensor, context=context)


def some(configs, count):
    """The extremes and others at random, always the same."""
    configs = list(configs)
    extremes = [config for config in configs if len([size for size in config.sizes.values() if size > 1]) <= 1]
    rest = [config for config in configs if config not in extremes]
    return extremes + random.Random(0).sample(rest, min(count, len(rest)))


def check(devices, config):
    mesh = sharding.create_mesh(config, devices)
    assert dict(mesh.shape) == config.sizes and {*map(id, mesh.devices.flat)} == {*map(id, devices)}
    shards = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    # Who has which shard, by the compiler's own account of the sharding.
    indices = sharding.batch_sharding(mesh).devices_indices_map((2 * shards,))
    wanted = {}
    for device, (rows,) in indices.items():
        wanted.setdefault(device.process_index, set()).update(range(*rows.indices(2 * shards)))
    times_read = np.zeros(2 * shards, int)
    for process, rows in wanted.items():
        placement = sharding.place_batch(mesh, 2 * shards, process)
        assert placement.rows.tolist() == sorted(rows)
        times_read[placement.rows] += 1
    assert (times_read >= 1).all()
    if config.stage * config.tensor * config.context == 1:
        assert (times_read == 1).all()
    return mesh


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_layout_of_a_pod_is_a_mesh_whose_rows_are_read_once(topology):
    devices = devices_of(topology)
    for config in some(layouts(len(devices)), FEW):
        check(devices, config)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_so_is_every_layout(topology):
    devices = devices_of(topology)
    for config in layouts(len(devices)):
        check(devices, config)


@pytest.mark.parametrize("topology, slices", SEVERAL)
def test_over_several_slices_only_data_crosses_them(topology, slices):
    devices = devices_of(topology, slices)
    for config in some(layouts(len(devices), data_multiple=slices), FEW):
        mesh = check(devices, config)
        where = np.vectorize(lambda device: device.slice_index, otypes=[int])(mesh.devices)
        for number, axis in enumerate(mesh.axis_names):
            lines = np.moveaxis(where, number, -1).reshape(-1, mesh.shape[axis])
            crossed = max(len(set(line)) for line in lines.tolist())
            assert crossed == (slices if axis == "data" else 1)
