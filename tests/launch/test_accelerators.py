import pytest

from launch.accelerators import gpu_hosts, tpu_slice

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
        ("v5p:16x24x24", "--topology 'v5p:16x24x24': expected at most 8960 chips"),
        ("v6e:٤x4", "expected a generation"),
    ],
)
def test_a_slice_that_gke_does_not_have_is_refused_with_the_nearest(topology, message):
    with pytest.raises(ValueError) as error:
        tpu_slice(topology)
    assert message in str(error.value) and "\n" not in str(error.value)


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
