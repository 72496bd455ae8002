"""A set of chips and their wiring, from text such as `v5p:4x4x8` or `h100:8x4`, and its devices where libtpu is there.

Nothing here needs libtpu but `devices`: what the analytic plan asks of a topology follows from its shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maskformer.checks import integer, shown
from maskformer.planning.chips import Chip, chip

# Of one slice; more chips are more slices.
MOST_CHIPS = {"v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256, "tpu7x": 9216}
MOST_SLICES = 256
# Shapes of a torus of three dimensions up to one cube of 64 chips; larger ones are multiples of four.
_SMALL_3D: tuple[tuple[int, ...], ...] = ((1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4))
_SHAPES_2D: tuple[tuple[int, ...], ...] = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# What libtpu calls an accelerator of so many chips (or, of v4 and v5p, cores).
_ACCELERATORS = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1), "tpu7x": ("tpu7x", 2)}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of chips of one kind.

    Attributes:
      chip: the kind.
      shape: chips along each dimension of a slice's torus; of GPUs, (devices of a host, hosts).
      slices: how many such slices, joined by the data-centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        """As a person says it: `2 slices of v6e:8x8`.

        >>> str(parse("v6e:8x8", 2)), str(parse("h100:8x4"))
        ('2 slices of v6e:8x8', 'h100:8x4')
        """
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def slice_devices(self) -> int:
        return self.devices // self.slices

    @property
    def hosts(self) -> int:
        """Machines, of `chip.chips_per_host` chips; fewer chips are on one."""
        return self.slices * max(1, math.prod(self.shape) // self.chip.chips_per_host)

    def rings(self, axes: Mapping[str, int]) -> dict[str, tuple[int, bool]]:
        """(dimensions of the torus, whether they close to rings) under each mesh axis of more than one device.

        Axes get whole dimensions as `jax.experimental.mesh_utils` gives them, the last axis first; one for which no
        whole dimensions are left gets a part of one, which is a line.

        Args:
          axes: devices of each axis within a slice, in the order of the mesh.

        >>> parse("v5p:4x4x8").rings({"data": 8, "fsdp": 16})
        {'fsdp': (2, True), 'data': (1, True)}
        >>> parse("v5e:4x4").rings({"data": 8, "tensor": 2})
        {'tensor': (1, False), 'data': (1, False)}
        """
        left = [size for size in self.shape if size > 1]
        found: dict[str, tuple[int, bool]] = {}
        for name, size in reversed(list(axes.items())):
            # The two cores of a chip share its links.
            wanted = max(1, size // self.chip.devices) if size == self.slice_devices else size
            choices = [
                chosen
                for count in range(len(left), 0, -1)
                for chosen in itertools.combinations(range(len(left)), count)
                if math.prod(left[i] for i in chosen) == wanted
            ]
            if size == 1:
                continue
            if not choices:
                found[name] = (1, False)
                continue
            found[name] = (len(choices[0]), all(self._closes(left[i]) for i in choices[0]))
            left = [size for i, size in enumerate(left) if i not in choices[0]]
        return found

    def _closes(self, size: int) -> bool:
        # v5e and v6e close where a side has all 16 chips; the others at each multiple of a cube's side.
        return size == 16 if self.chip.torus == 2 else size % 4 == 0 and math.prod(self.shape) >= 64

    def smaller_and_larger(self) -> tuple[Topology | None, Topology | None]:
        """The nearest topologies of fewer and of more chips, None where there is none."""
        here = math.prod(self.shape)
        shapes = _shapes(self.chip)
        below = [shape for shape in shapes if math.prod(shape) < here]
        above = [shape for shape in shapes if math.prod(shape) > here]
        smaller = dataclasses.replace(self, shape=below[-1]) if below else None
        if above:
            return smaller, dataclasses.replace(self, shape=above[0])
        return smaller, dataclasses.replace(self, slices=2 * self.slices) if self.slices < MOST_SLICES else None


def parse(text: str, slices: int = 1) -> Topology:
    """The topology of `CHIP:AxBxC`; of GPUs `CHIP:DEVICESxHOSTS`.

    Raises:
      ValueError: no such chip, or no such shape of it; the nearest shape is named.

    >>> parse("v5p:4x4x8").chips, parse("h100:8x4").hosts
    (128, 4)
    >>> parse("v5p:4x5")
    Traceback (most recent call last):
        ...
    ValueError: --topology='v5p:4x5': expected a v5p slice of three sides, such as v5p:2x2x4 (16 chips)
    """
    integer("--slices", slices, 1, MOST_SLICES)
    kind, colon, sides = text.partition(":")
    found = chip(kind)
    numbers = re.fullmatch(r"\d{1,5}(x\d{1,5})*", sides)
    shape = tuple(int(size) for size in sides.split("x")) if numbers else ()
    if found.platform == "gpu" and len(shape) == 1:
        shape = (*shape, 1)
    shapes = _shapes(found)
    if shape not in shapes or not colon:
        dimensions = "DEVICESxHOSTS" if found.platform == "gpu" else f"{('', '', 'two', 'three')[found.torus]} sides"
        what = f"{dimensions} of {found.name}" if found.platform == "gpu" else f"a {found.name} slice of {dimensions}"
        if found.platform == "tpu" and len(shape) == found.torus:
            what = f"a {found.name} slice of a size that there is (several slices: --slices)"
        near = _nearest(shape, shapes)
        raise ValueError(
            f"--topology={shown(text)}: expected {what}, such as {found.name}:{'x'.join(map(str, near))} "
            f"({math.prod(near)} chips)"
        )
    if found.platform == "gpu" and slices > 1:
        raise ValueError(
            f"--slices={slices}: expected 1 for GPUs, whose hosts are in their shape; "
            f"use --topology {found.name}:{shape[0]}x{shape[1] * slices}"
        )
    return Topology(found, shape, slices)


@functools.cache
def _shapes(found: Chip) -> list[tuple[int, ...]]:
    """All shapes of a chip's slices, by number of chips."""
    shapes: list[tuple[int, ...]]
    if found.platform == "gpu":
        shapes = [*((devices, 1) for devices in (1, 2, 4)), *((8, hosts) for hosts in range(1, 2049))]
    elif found.torus == 2:
        shapes = [*_SHAPES_2D]
    else:
        most = MOST_CHIPS[found.name]
        sides = range(4, most // 16 + 1, 4)
        cubes = (
            (a, b, c)
            for a in sides
            if a**3 <= most
            for b in range(a, most // (a * a) + 1, 4)
            for c in range(b, most // (a * b) + 1, 4)
            # A long thin torus is not offered.
            if 64 < a * b * c <= most and c <= 4 * a
        )
        shapes = [*_SMALL_3D, *cubes]
    return sorted(shapes, key=lambda shape: (math.prod(shape), max(shape)))


def _nearest(shape: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    if not shape or 0 in shape:
        return next(one for one in shapes if math.prod(one) >= 4)
    chips = math.prod(shape)
    return min(shapes, key=lambda one: abs(math.log(math.prod(one) / chips)))


def has_compiler() -> bool:
    """Whether libtpu, the TPU's compiler, is installed."""
    return importlib.util.find_spec("libtpu") is not None


def devices(topology: Topology) -> Sequence[Any]:
    """The devices of a TPU topology as libtpu describes them; no TPU is needed.

    Raises:
      ValueError: libtpu does not know it.
    """
    from jax.experimental import topologies

    prefix, each = _ACCELERATORS[topology.chip.name]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Its lock is for a TPU's sake, of which none is used: plans may be made side by side.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ["TPU_ACCELERATOR_TYPE"] = f"{prefix}-{math.prod(topology.shape) * each}"
    # A v4 chip's two cores are one device, as on the machines.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        with _quiet():
            described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--topology={topology.name!r}: libtpu does not know it ({reason})") from error
    return described.devices


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()):
        yield
