"""How many devices lie along each axis of a mesh, and which axes cross slices: what a config says, worked out for so
many devices. Without devices, so that a plan and a run agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from maskformer.training.sections import MeshConfig


def axis_sizes(config: MeshConfig, count: int, of: str = "") -> dict[str, int]:
    """Axis name -> devices, in the order of the mesh, which multiply to `count`.

    Args:
      of: what the devices are of, for the message, such as " of v5e:4x4".

    Raises:
      ValueError: they cannot; names the one change of an axis by which they would.

    >>> {axis: size for axis, size in axis_sizes(MeshConfig(fsdp=4), 16).items() if size > 1}
    {'data': 4, 'fsdp': 4}
    >>> axis_sizes(MeshConfig(data=3), 4)
    Traceback (most recent call last):
        ...
    ValueError: mesh={data: 3}: its axes do not multiply to the 4 devices; set --config.mesh.data=4
    """
    sizes = config.sizes
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and count % fixed == 0:
        return {axis: count // fixed if size == -1 else size for axis, size in sizes.items()}
    if fixed != count or -1 in sizes.values():
        shown = ", ".join(f"{axis}: {size}" for axis, size in sizes.items() if size != 1)
        raise ValueError(
            f"mesh={{{shown}}}: its axes do not multiply to the {count} devices{of}; set {_nearest(sizes, count)}"
        )
    return sizes


def _nearest(sizes: Mapping[str, int], count: int) -> str:
    """The one change of an axis that makes them multiply to `count`, as a flag."""
    fixed = {axis: size for axis, size in sizes.items() if size > 1}
    is_open = -1 in sizes.values()
    best: tuple[float, str, int] | None = None
    for axis, size in fixed.items():
        others = math.prod(fixed.values()) // size
        for new in range(1, count + 1):
            total = others * new
            if total == count or (is_open and count % total == 0):
                step = abs(math.log(new / size))
                best = min(best, (step, axis, new)) if best else (step, axis, new)
    return f"--config.mesh.{best[1]}={best[2]}" if best else "--config.mesh.data=-1, and the other axes to 1"


def axes_across(config: MeshConfig, sizes: Mapping[str, int], parts: int, what: str, default: bool) -> dict[str, int]:
    """Axis name -> how many of the `parts` it spans, of those that span more than one.

    Args:
      sizes: from `axis_sizes`.
      parts: groups of devices with a network of their own among them.
      what: they are called, such as "slices".
      default: where `mesh.dcn` says nothing, `data` is to span them.

    Raises:
      ValueError: `mesh.dcn` does not multiply to them, or an axis does not divide.
    """
    dcn = dict(config.dcn) or ({"data": parts} if default else {})
    if not dcn:
        return {}
    if (spanned := math.prod(dcn.values())) != parts:
        raise ValueError(
            f"mesh.dcn={dcn}: multiplies to {spanned}, and there are {parts} {what}; "
            f"set --config.mesh.dcn.data={parts}"
        )
    for axis, across in dcn.items():
        if sizes[axis] % across:
            nearest = max(across, across * round(sizes[axis] / across))
            wrong = f"mesh.{axis}={sizes[axis]}: does not divide over the {across} {what}"
            if config.dcn:
                wrong = f"mesh.dcn.{axis}={across}: expected a divisor of mesh.{axis}={sizes[axis]}"
            raise ValueError(f"{wrong}; set --config.mesh.{axis}={nearest}, or --config.mesh.dcn of another axis")
    return {axis: across for axis, across in dcn.items() if across > 1}
