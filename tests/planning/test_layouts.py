"""Layouts: a config's mesh on a topology, and the nearest one where it does not divide."""

import math
import re

import pytest

from maskformer.planning import topologies
from maskformer.planning.layouts import check_batch, resolve
from maskformer.training.sections import MeshConfig, TrainConfig


@pytest.mark.parametrize("name, slices, mesh, sizes, across", [
    ("v5p:4x4x8", 1, {"fsdp": 16}, {"data": 8, "fsdp": 16}, {}),
    ("v6e:8x8", 2, {"fsdp": 64}, {"data": 2, "fsdp": 64}, {"data": 2}),
    ("v6e:8x8", 2, {"data": 1, "fsdp": -1, "dcn": {"fsdp": 2}}, {"fsdp": 128}, {"fsdp": 2}),
    ("h100:8x4", 1, {"tensor": 8}, {"data": 4, "tensor": 8}, {"data": 4}),
    ("h100:8x4", 1, {"data": 1, "fsdp": 32}, {"fsdp": 32}, {"fsdp": 4}),
    ("h100:8x4", 1, {"fsdp": 4, "tensor": 2}, {"data": 4, "fsdp": 4, "tensor": 2}, {"data": 4}),
])  # fmt: skip
def test_a_mesh_takes_all_devices_and_its_outer_axes_cross_slices(name, slices, mesh, sizes, across):
    layout = resolve(MeshConfig(**mesh), topologies.parse(name, slices))
    assert {axis: size for axis, size in layout.sizes.items() if size > 1} == sizes
    assert dict(layout.across) == across


@pytest.mark.parametrize("mesh, nearest", [
    ({"tensor": 3}, "tensor=4"), ({"data": 2, "tensor": 3}, "tensor=8"), ({"fsdp": 5}, "fsdp=4"),
    ({"data": 9}, "data=16"),
])  # fmt: skip
def test_a_mesh_that_does_not_divide_names_the_nearest_that_does(mesh, nearest):
    topology = topologies.parse("v5e:4x4")
    with pytest.raises(ValueError, match="do not multiply to the 16 devices") as error:
        resolve(MeshConfig(**mesh), topology)
    assert str(error.value).endswith(f"set --config.mesh.{nearest}") and "\n" not in str(error.value)
    axis, size = nearest.split("=")
    resolve(MeshConfig(**{**mesh, axis: int(size)}), topology)


def test_slices_that_no_axis_crosses_are_refused_by_name():
    two = topologies.parse("v6e:8x8", 2)
    said = r"mesh\.data=1.*does not divide over the 2 slices; set --config\.mesh\.data=2"
    with pytest.raises(ValueError, match=said):
        resolve(MeshConfig(data=1, fsdp=128), two)
    with pytest.raises(ValueError, match=r"multiplies to 4, and there are 2 slices; set --config\.mesh\.dcn\.data=2"):
        resolve(MeshConfig(dcn={"data": 4}), two)


def test_a_batch_that_does_not_divide_names_the_nearest_that_does():
    layout = resolve(MeshConfig(fsdp=16), topologies.parse("v5p:4x4x8"))
    check_batch(TrainConfig(batch_size=256), layout)
    for train in (TrainConfig(batch_size=200), TrainConfig(batch_size=256, accumulation_steps=4)):
        with pytest.raises(ValueError, match="the 128 shards") as error:
            check_batch(train, layout)
        nearest = int(re.search(r"batch_size=(\d+)$", str(error.value))[1])
        check_batch(TrainConfig(batch_size=nearest, accumulation_steps=train.accumulation_steps), layout)


def test_flags_make_the_config_that_layout():
    topology = topologies.parse("v5p:4x4x8")
    layout = resolve(MeshConfig(fsdp=16, tensor=4), topology)
    for mesh in (MeshConfig(), MeshConfig(data=128), MeshConfig(data=1, fsdp=-1), MeshConfig(tensor=8, context=2)):
        changes = dict(re.findall(r"--config\.mesh\.(\w+)=(\d+)", layout.flags(mesh)))
        changed = MeshConfig(**{**mesh.sizes, **{axis: int(size) for axis, size in changes.items()}})
        again = resolve(changed, topology)
        assert again == layout and math.prod(again.sizes.values()) == 128


def test_dcn_is_followed_on_hosts_of_gpus_and_refused_where_a_pod_has_one_slice():
    hosts = topologies.parse("h100:8x4")
    assert resolve(MeshConfig(tensor=8), hosts).across == {"data": 4}
    crossed = resolve(MeshConfig(data=1, fsdp=-1, tensor=2, dcn={"fsdp": 4}), hosts)
    assert crossed.across == {"fsdp": 4} and crossed.inner["fsdp"] == 4
    with pytest.raises(ValueError, match=r"mesh\.dcn=\{'data': 2\}: multiplies to 2, and there are 4 hosts"):
        resolve(MeshConfig(dcn={"data": 2}), hosts)
    with pytest.raises(ValueError, match=r"mesh\.dcn=\{'data': 2\}: multiplies to 2, and there are 1 slices"):
        resolve(MeshConfig(dcn={"data": 2}), topologies.parse("v5e:4x4"))
