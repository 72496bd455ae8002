"""Topologies from text: what there is of each chip, how it is wired, and the nearest where something is wrong."""

import pytest

from maskformer.planning import topologies
from maskformer.planning.chips import CHIPS


def test_chips_hosts_and_devices_follow_from_the_shape():
    counts = {
        name: (found.chips, found.hosts, found.devices)
        for name in ("v4:4x4x4", "v5e:4x4", "v5e:1x1", "v5p:4x4x8", "v6e:16x16", "tpu7x:2x2x2", "h100:8x4", "b200:8")
        for found in [topologies.parse(name)]
    }
    assert counts == {
        "v4:4x4x4": (64, 16, 64), "v5e:4x4": (16, 4, 16), "v5e:1x1": (1, 1, 1), "v5p:4x4x8": (128, 32, 128),
        "v6e:16x16": (256, 64, 256), "tpu7x:2x2x2": (8, 2, 16), "h100:8x4": (32, 4, 32), "b200:8": (8, 1, 8),
    }  # fmt: skip
    two = topologies.parse("v6e:8x8", 2)
    assert (two.chips, two.hosts, two.slice_devices) == (128, 32, 64)


@pytest.mark.parametrize("text, says", [
    ("v5p:4x5", "'v5p:4x5': expected a v5p slice of three sides, such as v5p:2x2x4 (16 chips)"),
    ("v5e:4x4x4", "expected a v5e slice of two sides, such as v5e:8x8 (64 chips)"),
    ("v5e:3x5", "such as v5e:4x4 (16 chips)"),
    ("v5p", "expected a v5p slice of three sides"),
    ("v5p:", "expected a v5p slice of three sides"),
    ("v5p:0x4x4", "expected a v5p slice of a size that there is"),
    ("v9:4x4", "chip 'v9': expected one of v4, v5e"),
    ("h10:8x4", "did you mean 'h100'?"),
    ("h100:6x4", "expected DEVICESxHOSTS of h100, such as h100:8x3 (24 chips)"),
    ("", "chip ''"),
])  # fmt: skip
def test_a_wrong_topology_is_one_line_with_the_nearest(text, says):
    with pytest.raises(ValueError) as error:
        topologies.parse(text)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("slices, topology, says", [
    (0, "v5e:4x4", "--slices=0: expected an integer of at least 1"),
    (2, "h100:8x4", "use --topology h100:8x8"),
])
def test_slices_are_a_number_of_tpu_slices(slices, topology, says):
    with pytest.raises(ValueError, match=says):
        topologies.parse(topology, slices)


def test_the_nearest_that_is_named_can_be_had():
    for name, chip in CHIPS.items():
        for shape in [(1,), (3, 5), (7, 7, 7), (100, 100), (64, 64, 64)]:
            text = f"{name}:{'x'.join(map(str, shape))}"
            try:
                topologies.parse(text)
            except ValueError as error:
                near = str(error).rpartition("such as ")[2].partition(" ")[0]
                assert topologies.parse(near).chip is chip


def test_larger_and_smaller_topologies_are_neighbours():
    smaller, larger = topologies.parse("v5e:4x4").smaller_and_larger()
    assert (smaller.name, larger.name) == ("v5e:2x4", "v5e:4x8")
    _, beyond = topologies.parse("v5e:16x16").smaller_and_larger()
    assert str(beyond) == "2 slices of v5e:16x16"
    assert topologies.parse("v5e:1x1").smaller_and_larger()[0] is None


def test_axes_get_whole_sides_of_the_torus_from_the_last_on():
    pod = topologies.parse("v5p:4x4x8")
    assert pod.rings({"data": 8, "fsdp": 4, "tensor": 4}) == {
        "tensor": (1, True), "fsdp": (1, True), "data": (1, True),
    }  # fmt: skip
    assert pod.rings({"data": 128, "tensor": 1}) == {"data": (3, True)}
    # A part of a side is a line, and v5e's sides close at 16 only.
    assert pod.rings({"data": 64, "tensor": 2})["tensor"] == (1, False)
    assert topologies.parse("v5e:8x16").rings({"data": 16, "fsdp": 8}) == {"fsdp": (1, False), "data": (1, True)}
