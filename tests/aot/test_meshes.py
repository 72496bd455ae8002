"""Meshes over the real wiring of TPU pods: every layout is there, and the processes read each row that they need.

Nothing is compiled: libtpu only says which devices there are, where they stand, and which process has which.
"""

import itertools
import math
import os

import numpy as np
import pytest

pytest.importorskip("libtpu", reason="needs the extra [tpu]")

from jax.experimental import topologies

from maskformer.training import sharding
from maskformer.training.sections import MeshConfig

pytestmark = pytest.mark.aot

# (topology, accelerator type); more than 4 chips are more than one host.
TOPOLOGIES = [
    ("v4:2x2x4", "v4-32"), ("v5e:4x4", "v5litepod-16"), ("v5e:8x16", "v5litepod-128"), ("v5p:2x2x4", "v5p-32"),
    ("v5p:4x4x8", "v5p-256"), ("v6e:4x8", "v6e-32"), ("v6e:16x16", "v6e-256"),
]  # fmt: skip
BIG = [("v5e:16x16", "v5litepod-256"), ("v5p:8x8x16", "v5p-2048")]


def devices_of(topology, accelerator):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ["TPU_ACCELERATOR_TYPE"] = accelerator
    # A v4 chip's two cores are one device, as on the machines.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def layouts(count):
    """Sizes of fsdp, tensor and context; data takes what remains."""
    powers = [1, 2, 4, 8, count]
    return [
        sizes for sizes in itertools.product(powers, [1, 2, 4, 8], [1, 2, 4]) if count % math.prod(sizes) == 0
    ]


def check(topology, accelerator):
    devices = devices_of(topology, accelerator)
    processes = sorted({device.process_index for device in devices})
    assert len(processes) > 1
    for fsdp, tensor, context in layouts(len(devices)):
        mesh = sharding.create_mesh(MeshConfig(fsdp=fsdp, tensor=tensor, context=context), devices)
        assert mesh.size == len(devices) and {id(device) for device in mesh.devices.flat} == set(map(id, devices))
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        size = 3 * shards
        times_read = np.zeros(size, int)
        for process in processes:
            placement = sharding.place_batch(mesh, size, process)
            assert (np.diff(placement.rows) > 0).all()
            times_read[placement.rows] += 1
            # Exactly the rows of this process's devices.
            own = {
                row
                for shard, holders in enumerate(mesh.devices.reshape(shards, -1))
                if any(device.process_index == process for device in holders)
                for row in range(3 * shard, 3 * shard + 3)
            }
            assert set(placement.rows.tolist()) == own
        # A row is read by as many processes as hold a part of it, which is one where no axis splits it.
        holders = [{device.process_index for device in group} for group in mesh.devices.reshape(shards, -1)]
        assert times_read.tolist() == [len(holders[row // 3]) for row in range(size)]
        if tensor * context == 1:
            assert (times_read == 1).all()


@pytest.mark.parametrize("topology, accelerator", TOPOLOGIES)
def test_every_layout_of_a_pod_is_a_mesh_whose_rows_are_read_once(topology, accelerator):
    check(topology, accelerator)


@pytest.mark.slow
@pytest.mark.parametrize("topology, accelerator", BIG)
def test_so_it_is_up_to_two_thousand_cores(topology, accelerator):
    check(topology, accelerator)
