"""What Google's machines hold: the hosts and chips of a TPU slice, the GPUs of a machine, by the names GKE gives them.

From "Plan TPUs in GKE", "GPU machine types" and the page of each TPU of Google Cloud's documentation (2026-10).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping

from launch.job import check


@dataclasses.dataclass(frozen=True)
class Target:
    """The machines of one JobSet's Job: `hosts` alike, of `chips` accelerators each, one process on each host.

    Args:
      resource: what a container asks for, `google.com/tpu` or `nvidia.com/gpu`.
      machine: the machine type of Compute Engine, for whoever makes the node pool.
      selector: labels that GKE gives to nodes of this kind.
      chips: accelerators of a host.
      hosts: hosts of a slice, or of all the job on GPU.
    """

    resource: str
    machine: str
    selector: Mapping[str, str]
    chips: int
    hosts: int

    @property
    def tpu(self) -> bool:
        return self.resource == "google.com/tpu"


@dataclasses.dataclass(frozen=True)
class _Generation:
    accelerator: str
    machine: str  # "{}" is the number of chips of a host
    largest: int  # chips of the largest slice
    flat: bool  # chips lie in two dimensions, not in three


_TPUS = {
    "v4": _Generation("tpu-v4-podslice", "ct4p-hightpu-{}t", 4096, flat=False),
    "v5e": _Generation("tpu-v5-lite-podslice", "ct5lp-hightpu-{}t", 256, flat=True),
    "v5p": _Generation("tpu-v5p-slice", "ct5p-hightpu-{}t", 6144, flat=False),  # of a pod of 8960
    "v6e": _Generation("tpu-v6e-slice", "ct6e-standard-{}t", 256, flat=True),
    "tpu7x": _Generation("tpu7x", "tpu7x-standard-{}t", 9216, flat=False),
}
# Shapes of all that is flat.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# Name -> GKE's label, and the machine for each number of GPUs of a host.
_GPUS: Mapping[str, tuple[str, Mapping[int, str]]] = {
    "l4": ("nvidia-l4", {1: "g2-standard-12", 2: "g2-standard-24", 4: "g2-standard-48", 8: "g2-standard-96"}),
    "a100": ("nvidia-tesla-a100", {count: f"a2-highgpu-{count}g" for count in (1, 2, 4, 8)} | {16: "a2-megagpu-16g"}),
    "a100-80gb": ("nvidia-a100-80gb", {count: f"a2-ultragpu-{count}g" for count in (1, 2, 4, 8)}),
    "h100": ("nvidia-h100-80gb", {count: f"a3-highgpu-{count}g" for count in (1, 2, 4, 8)}),
    "h100-mega": ("nvidia-h100-mega-80gb", {8: "a3-megagpu-8g"}),
    "h200": ("nvidia-h200-141gb", {8: "a3-ultragpu-8g"}),
    "b200": ("nvidia-b200", {8: "a4-highgpu-8g"}),
    "gb200": ("nvidia-gb200", {4: "a4x-highgpu-4g"}),
}


def tpu_slice(topology: str, chips_per_host: int | None = None) -> Target:
    """The machines of one slice of TPUs.

    Args:
      topology: generation and shape in chips, as `maskformer plan` takes it: `v6e:4x4`, `v5p:2x2x4`.
      chips_per_host: 4 where two hosts of 4 chips are meant by `2x4`, which is one host of 8 otherwise.

    Raises:
      ValueError: a generation or a shape that GKE does not have.

    >>> target = tpu_slice("v6e:4x4")
    >>> target.machine, target.hosts, target.chips
    ('ct6e-standard-4t', 4, 4)
    """
    field = "--topology"
    match = re.fullmatch("([a-z0-9]+):([0-9]{1,4}(?:x[0-9]{1,4}){1,2})", topology)
    if match is None:
        raise ValueError(f"{field} {topology!r:.120}: expected a generation and a shape in chips, for example v6e:4x4")
    name, shape = match.groups()
    if name not in _TPUS:
        raise ValueError(f"{field} {topology}: unknown TPU {name!r}{_nearest(name, _TPUS)}")
    generation = _TPUS[name]
    sides = [int(side) for side in shape.split("x")]
    chips = math.prod(sides)
    if generation.flat:
        check(shape in FLAT, field, topology, f"one of {', '.join(FLAT)}")
    else:
        check(len(sides) == 3, field, topology, "three sides, for example 2x2x4")
        # From 64 chips on a slice is made of cubes of 4x4x4; smaller ones are parts of one cube.
        fine = shape in ("2x2x1", "2x2x2", "2x2x4", "2x4x4") or (name == "tpu7x" and shape == "1x1x1")
        fine = fine or all(side and side % 4 == 0 for side in sides)
        check(fine, field, topology, "2x2x1, 2x2x2, 2x2x4, 2x4x4 or sides that are multiples of 4")
        in_order = "x".join(str(side) for side in sorted(sides))
        check(shape == in_order or chips < 64, field, topology, f"the sides in order: {name}:{in_order}")
    check(chips <= generation.largest, field, topology, f"at most {generation.largest} chips")
    offered = [8, 4] if shape == "2x4" else [min(chips, 4)]
    per_host = offered[0] if chips_per_host is None else chips_per_host
    words = " or ".join(str(count) for count in offered)
    check(per_host in offered, "--chips-per-host", per_host, f"{words}, which is what GKE has for {topology}")
    selector = {
        "cloud.google.com/gke-tpu-accelerator": generation.accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    return Target("google.com/tpu", generation.machine.format(per_host), selector, per_host, chips // per_host)


def gpu_hosts(gpu: str, hosts: int = 1) -> Target:
    """Machines with GPUs.

    Args:
      gpu: name and number on each host, `h100:8`.
      hosts: how many machines.

    Raises:
      ValueError: a GPU, or a number of it on one machine, that GKE does not have.

    >>> gpu_hosts("h100:8", hosts=2).machine
    'a3-highgpu-8g'
    """
    field = "--gpu"
    match = re.fullmatch("([a-z0-9-]+):([0-9]{1,3})", gpu)
    if match is None:
        raise ValueError(f"{field} {gpu!r:.120}: expected a name and how many on each host, for example h100:8")
    name, count = match[1], int(match[2])
    if name not in _GPUS:
        raise ValueError(f"{field} {gpu}: unknown GPU {name!r}{_nearest(name, _GPUS)}")
    label, machines = _GPUS[name]
    check(count in machines, field, gpu, f"{' or '.join(str(size) for size in machines)} on each host")
    return Target("nvidia.com/gpu", machines[count], {"cloud.google.com/gke-accelerator": label}, count, hosts)


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f": expected one of {', '.join(names)}"
