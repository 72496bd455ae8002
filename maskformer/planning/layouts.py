"""How a topology's devices are parted among the mesh axes: from a config's `mesh` section, without a device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from maskformer.planning.topologies import Topology
from maskformer.training.axes import axes_across, axis_sizes
from maskformer.training.sections import MeshConfig, TrainConfig
from maskformer.training.sharding import BATCH_AXES


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices along each mesh axis.

    Attributes:
      sizes: axis -> devices, in the order of the mesh.
      across: axis -> how many of them are on different slices (or, of GPUs, hosts); 1 is left out.
    """

    sizes: Mapping[str, int]
    across: Mapping[str, int]

    @property
    def shards(self) -> int:
        """Of a batch's rows."""
        return math.prod(self.sizes[axis] for axis in BATCH_AXES)

    @property
    def inner(self) -> dict[str, int]:
        """Devices of each axis within a slice or host."""
        return {axis: size // self.across.get(axis, 1) for axis, size in self.sizes.items()}

    def __str__(self) -> str:
        """The axes of more than one device.

        >>> str(Layout({"data": 2, "fsdp": 64, "tensor": 1}, {"data": 2})), str(Layout({"data": 1}, {}))
        ('data=2 fsdp=64', 'data=1')
        """
        return " ".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1) or "data=1"

    def flags(self, mesh: MeshConfig) -> str:
        """The flags that change a config's mesh into this one.

        >>> layout = Layout({"stage": 1, "data": 2, "fsdp": 64, "expert": 1, "tensor": 1, "context": 1}, {"data": 2})
        >>> layout.flags(MeshConfig()), layout.flags(MeshConfig(data=1, fsdp=128))
        ('--config.mesh.fsdp=64', '--config.mesh.data=2 --config.mesh.fsdp=64')
        """
        # An axis of -1 takes what the others leave.
        changed = [axis for axis, size in self.sizes.items() if mesh.sizes[axis] not in (-1, size)]
        return " ".join(f"--config.mesh.{axis}={self.sizes[axis]}" for axis in changed)


def resolve(config: MeshConfig, topology: Topology) -> Layout:
    """The layout of a config's mesh on a topology.

    Raises:
      ValueError: its axes do not multiply to the devices, or do not lie on the slices; the nearest that do are named.
    """
    sizes = axis_sizes(config, topology.devices, f" of {topology}")
    if topology.chip.platform == "gpu" and not config.dcn:
        return Layout(sizes, _across_hosts(sizes, topology))
    groups, what = (topology.hosts, "hosts") if topology.chip.platform == "gpu" else (topology.slices, "slices")
    return Layout(sizes, axes_across(config, sizes, groups, what, default=groups > 1))


def _across_hosts(sizes: Mapping[str, int], topology: Topology) -> dict[str, int]:
    """GPU hosts are filled from the last axis on, as processes number their devices."""
    left, across = topology.shape[0], {}
    for axis, size in reversed(list(sizes.items())):
        inside = math.gcd(size, left)
        left //= inside
        if size > inside:
            across[axis] = size // inside
    return across


def check_batch(train: TrainConfig, layout: Layout) -> None:
    """ValueError where a training batch, or a part of an accumulated one, does not divide over the layout."""
    # With `train.rows_per_device` a batch is divided among the devices first, and its parts follow from that.
    part = train.batch_size // train.accumulation_steps
    if part % layout.shards:
        nearest = max(1, round(part / layout.shards)) * layout.shards * train.accumulation_steps
        parts = f" in {train.accumulation_steps} parts" if train.accumulation_steps > 1 else ""
        raise ValueError(
            f"train.batch_size={train.batch_size}{parts}: does not divide over the {layout.shards} shards of {layout}; "
            f"set --config.train.batch_size={nearest}"
        )


def mesh_section(mesh: MeshConfig, layout: Layout) -> dict[str, Any]:
    """The `mesh` section of a config with this layout."""
    return {**dataclasses.asdict(mesh), **layout.sizes}
