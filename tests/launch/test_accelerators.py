import contextlib

import pytest

from launch import tpu_resource
from launch.accelerators import gpu_hosts, tpu_slice
from maskformer.planning import topologies

# Topology, machine, hosts, chips of a host, as "Plan TPUs in GKE" of Google Cloud's documentation lists them.
TPUS = [
    ("v4:2x2x1", "ct4p-hightpu-4t", 1, 4),
    ("v4:2x2x4", "ct4p-hightpu-4t", 4, 4),
    ("v4:4x4x8", "ct4p-hightpu-4t", 32, 4),
    ("v5e:1x1", "ct5lp-hightpu-1t", 1, 1),
    ("v5e:2x2", "ct5lp-hightpu-4t", 1, 4),
    ("v5e:2x4", "ct5lp-hightpu-8t", 1, 8),
    ("v5e:4x4", "ct5lp-hightpu-4t", 4, 4),
    ("v5e:16x16", "ct5lp-hightpu-4t", 64, 4),
    ("v5p:2x2x1", "ct5p-hightpu-4t", 1, 4),
    ("v5p:2x4x4", "ct5p-hightpu-4t", 8, 4),
    ("v5p:8x8x16", "ct5p-hightpu-4t", 256, 4),
    ("v6e:2x4", "ct6e-standard-8t", 1, 8),
    ("v6e:8x16", "ct6e-standard-4t", 32, 4),
    ("tpu7x:1x1x1", "tpu7x-standard-1t", 1, 1),
    ("tpu7x:2x2x2", "tpu7x-standard-4t", 2, 4),
    ("tpu7x:4x4x4", "tpu7x-standard-4t", 16, 4),
]


@pytest.mark.parametrize(("topology", "machine", "hosts", "chips"), TPUS)
def test_a_slice_has_the_machines_that_google_lists(topology, machine, hosts, chips):
    target = tpu_slice(topology)
    assert (target.machine, target.hosts, target.chips) == (machine, hosts, chips)
    assert target.selector["cloud.google.com/gke-tpu-topology"] == topology.split(":")[1]


def test_a_slice_of_eight_chips_is_two_hosts_of_four_on_request():
    target = tpu_slice("v6e:2x4", chips_per_host=4)
    assert (target.machine, target.hosts, target.chips) == ("ct6e-standard-4t", 2, 4)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v6e", "--topology 'v6e': expected a generation and a shape in chips, for example v6e:4x4"),
        ("v6:4x4", "--topology v6:4x4: unknown TPU 'v6'; did you mean 'v6e'?"),
        ("x:4x4", "--topology x:4x4: unknown TPU 'x': expected one of v4, v5e, v5p, v6e, tpu7x"),
        ("v6e:4x6", "--topology 'v6e:4x6': expected one of 1x1, 2x2"),
        ("v5p:4x4", "--topology 'v5p:4x4': expected three sides"),
        ("v5p:4x4x6", "--topology 'v5p:4x4x6': expected 2x2x1, 2x2x2, 2x2x4, 2x4x4 or sides that are multiples of 4"),
        ("v5p:0x4x4", "expected 2x2x1"),
        ("v5p:8x4x4", "--topology 'v5p:8x4x4': expected the sides in order: v5p:4x4x8"),
        ("v5p:16x16x28", "--topology 'v5p:16x16x28': expected at most 6144 chips"),
        ("v6e:٤x4", "expected a generation"),
    ],
)
def test_a_slice_that_gke_does_not_have_is_refused_with_the_nearest(topology, message):
    with pytest.raises(ValueError) as error:
        tpu_slice(topology)
    assert message in str(error.value) and "\n" not in str(error.value)


def planned(name):
    """Every topology of one slice that a plan takes, from the smallest of four chips on."""
    topology = topologies.parse(f"{name}:{'2x2' if name in ('v5e', 'v6e') else '2x2x1'}")
    while topology is not None and topology.slices == 1:
        yield topology.name
        _, topology = topology.smaller_and_larger()


@pytest.mark.parametrize("name", topologies.MOST_CHIPS)
def test_every_slice_that_can_be_planned_can_be_launched_on_as_many_hosts(name):
    shapes = [topology for topology in map(topologies.parse, planned(name)) if topology.chips >= 4]
    assert len(shapes) > 5
    for topology in shapes:
        assert tpu_slice(topology.name, min(topology.chips, 4)).hosts == topology.hosts
        with contextlib.suppress(ValueError):  # no accelerator type has it
            # Of eight flat chips a TPU VM is one machine, and GKE has both.
            expected = 1 if topology.chips == 8 and "2x4" in topology.name else topology.hosts
            assert tpu_resource.hosts(tpu_resource.accelerator(topology.name)) == expected


def test_every_accelerator_type_can_be_planned():
    for name, kind in tpu_resource.KINDS.items():
        for shape in kind.shapes:
            assert topologies.parse(f"{name}:{shape}").name == f"{name}:{shape}"


def test_chips_of_a_host_are_those_that_gke_has():
    with pytest.raises(ValueError, match="--chips-per-host 8: expected 4, which is what GKE has for v6e:4x4"):
        tpu_slice("v6e:4x4", chips_per_host=8)


@pytest.mark.parametrize(
    ("gpu", "machine", "label"),
    [
        ("l4:4", "g2-standard-48", "nvidia-l4"),
        ("a100:16", "a2-megagpu-16g", "nvidia-tesla-a100"),
        ("h100:8", "a3-highgpu-8g", "nvidia-h100-80gb"),
        ("h100-mega:8", "a3-megagpu-8g", "nvidia-h100-mega-80gb"),
        ("h200:8", "a3-ultragpu-8g", "nvidia-h200-141gb"),
        ("b200:8", "a4-highgpu-8g", "nvidia-b200"),
    ],
)
def test_gpus_have_the_machines_that_google_lists(gpu, machine, label):
    target = gpu_hosts(gpu, hosts=3)
    assert (target.machine, target.hosts, target.chips) == (machine, 3, int(gpu.split(":")[1]))
    assert target.selector == {"cloud.google.com/gke-accelerator": label}


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        ("h100", "--gpu 'h100': expected a name and how many on each host"),
        ("h10:8", "--gpu h10:8: unknown GPU 'h10'; did you mean 'h100'?"),
        ("b200:4", "--gpu 'b200:4': expected 8 on each host"),
    ],
)
def test_gpus_that_gke_does_not_have_are_refused(gpu, message):
    with pytest.raises(ValueError) as error:
        gpu_hosts(gpu)
    assert message in str(error.value)
