"""Meshes: axes that cross slices, and who reads which rows, on devices that only say where they are."""

import dataclasses
import itertools

import numpy as np
import pytest

from maskformer.training import sharding
from maskformer.training.sections import MeshConfig


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

    id: int
    process_index: int
    slice_index: int
    platform: str
    coords: tuple[int, ...]
    core_on_chip: int = 0
    device_kind: str = "of a test"


def slices(count, processes=2, each=2, platform="tpu"):
    """`count` slices of `processes` processes with `each` devices, wired in a line."""
    size = each * processes
    return [
        Device(index, index // each, index // size, platform, (index % size, 0, 0)) for index in range(count * size)
    ]


@pytest.fixture(autouse=True)
def plain_meshes(monkeypatch):
    # A real `Mesh` holds devices of a backend.
    class Mesh:
        def __init__(self, devices, axis_names):
            self.devices, self.axis_names = devices, axis_names
            self.shape = dict(zip(axis_names, devices.shape))

    monkeypatch.setattr(sharding, "Mesh", Mesh)
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: None)


def slices_along(mesh, axis):
    """How many slices a line of devices along an axis meets, of the line that meets most."""
    indices = np.vectorize(lambda device: device.slice_index, otypes=[int])(mesh.devices)
    lines = np.moveaxis(indices, mesh.axis_names.index(axis), -1).reshape(-1, mesh.shape[axis])
    return max(len(set(line)) for line in lines.tolist())


@pytest.mark.parametrize(
    "dcn", [{"data": 4}, {"fsdp": 4}, {"stage": 4}, {"data": 2, "fsdp": 2}, {"stage": 2, "data": 2}]
)
def test_an_axis_meets_as_many_slices_as_dcn_says(dcn):
    sizes = {"data": 2, "fsdp": 2, "stage": 2, **dcn, "tensor": -1}
    mesh = sharding.create_mesh(MeshConfig(**sizes, dcn=dcn), slices(4, 4))
    assert {axis: slices_along(mesh, axis) for axis in mesh.axis_names} == dict.fromkeys(mesh.axis_names, 1) | dcn


def test_several_slices_of_a_pod_are_crossed_by_data_where_nothing_is_said():
    mesh = sharding.create_mesh(MeshConfig(fsdp=4), slices(2))
    assert slices_along(mesh, "data") == 2 and slices_along(mesh, "fsdp") == 1


def test_where_data_does_not_divide_over_the_slices_an_axis_is_asked_for():
    with pytest.raises(ValueError, match=r"mesh\.data=1: does not divide over the 2 slices.*mesh\.dcn"):
        sharding.create_mesh(MeshConfig(fsdp=-1, data=1), slices(2))
    mesh = sharding.create_mesh(MeshConfig(fsdp=-1, data=1, dcn={"fsdp": 2}), slices(2))
    assert slices_along(mesh, "fsdp") == 2


@pytest.mark.parametrize("axis", ["tensor", "context", "expert"])
def test_an_axis_that_talks_in_every_layer_may_not_cross_slices(axis):
    with pytest.raises(ValueError, match=rf"mesh\.dcn\.{axis}=2: {axis} exchanges activations.*data, stage, fsdp"):
        MeshConfig(dcn={axis: 2})


def test_an_unknown_axis_is_told_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'data'"):
        MeshConfig(dcn={"dta": 2})


def test_dcn_has_to_multiply_to_the_slices_that_there_are():
    with pytest.raises(ValueError, match=r"mesh\.dcn=.*: multiplies to 4, and there are 2 slices.*dcn\.data=2"):
        sharding.create_mesh(MeshConfig(dcn={"data": 4}), slices(2))
    with pytest.raises(ValueError, match=r"mesh\.dcn\.fsdp=2: expected a divisor of mesh\.fsdp=1"):
        sharding.create_mesh(MeshConfig(dcn={"fsdp": 2}), slices(2))


def test_processes_are_the_slices_where_there_are_none():
    devices = slices(1, processes=2, each=4, platform="cpu")
    mesh = sharding.create_mesh(MeshConfig(tensor=4, dcn={"data": 2}), devices)
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    assert processes.reshape(2, 4).tolist() == [[0] * 4, [1] * 4]


def test_each_row_is_read_by_every_process_that_holds_a_part_of_it():
    devices = slices(2, processes=4, each=2)
    for sizes in itertools.product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2), (1, 2)):
        stage, fsdp, expert, tensor, context = sizes
        if 16 % np.prod(sizes) or 16 // np.prod(sizes) % 2:
            continue
        config = MeshConfig(stage=stage, fsdp=fsdp, expert=expert, tensor=tensor, context=context)
        mesh = sharding.create_mesh(config, devices)
        shards = int(np.prod([mesh.shape[axis] for axis in sharding.BATCH_AXES]))
        readers = [set() for _ in range(2 * shards)]
        for process in range(8):
            for row in sharding.place_batch(mesh, 2 * shards, process).rows:
                readers[row].add(process)
        for index in np.ndindex(mesh.devices.shape):
            at = dict(zip(mesh.axis_names, index))
            shard = np.ravel_multi_index(
                [at[axis] for axis in sharding.BATCH_AXES], [mesh.shape[axis] for axis in sharding.BATCH_AXES]
            )
            for row in (2 * shard, 2 * shard + 1):
                assert mesh.devices[index].process_index in readers[row]
        assert sum(map(len, readers)) == sum(
            len(sharding.place_batch(mesh, 2 * shards, process).rows) for process in range(8)
        )
        if stage * tensor * context == 1:
            assert all(len(of_row) == 1 for of_row in readers)


def test_the_hosts_of_one_slice_of_a_pod_are_no_slices():
    with pytest.raises(ValueError, match=r"mesh\.dcn=\{'data': 2\}: multiplies to 2, and there are 1 slices"):
        sharding.create_mesh(MeshConfig(dcn={"data": 2}), slices(1, processes=2))
