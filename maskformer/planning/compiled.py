"""A training step compiled for a TPU that is not here, by the compiler that would compile it there."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax

from maskformer.attention import platform
from maskformer.checks import first_line
from maskformer.planning import topologies
from maskformer.planning.collectives import Collective, read
from maskformer.planning.layouts import Layout, mesh_section
from maskformer.planning.topologies import Topology
from maskformer.planning.workload import Planned
from maskformer.training import sharding
from maskformer.training.sections import MeshConfig

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)(?:i?B)?"
_NEEDED = (
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm", re.IGNORECASE),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step.

    Attributes:
      arguments, temporaries, peak: bytes on one device; the peak is below the sum of the others, since not all
        temporaries live at once, and some in VMEM. None where the step does not fit.
      needed, available: bytes of HBM where it does not fit, as the compiler's message has them; else None.
      collectives: of the step.
      problems: what of the program's text could not be read, a line each.
      seconds: that the compilation took.
    """

    arguments: int | None
    temporaries: int | None
    peak: int | None
    needed: int | None
    available: int | None
    collectives: tuple[Collective, ...]
    problems: tuple[str, ...]
    seconds: float

    @property
    def fits(self) -> bool:
        return self.needed is None


def compile_step(program: Planned, topology: Topology, layout: Layout) -> Compiled:
    """Compile the program's training step for a TPU topology; takes minutes, and no TPU.

    Raises:
      ValueError: libtpu does not know the topology, or the compiler cannot compile the step (one line).
    """
    devices = topologies.devices(topology)
    mesh = sharding.create_mesh(MeshConfig(**mesh_section(program.experiment.mesh, layout)), devices)
    start = time.monotonic()
    with platform.assume("tpu"):
        lowered = program.on(mesh).lower_train()
    try:
        step = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = out_of_memory(str(error))
        if found is None:
            raise ValueError(
                f"the TPU compiler cannot compile this step ({first_line(error)}); plan it with --no-compile"
            ) from error
        return Compiled(None, None, None, *found, (), (), time.monotonic() - start)
    seconds = time.monotonic() - start
    usage: Any = step.memory_analysis()
    collectives, problems = read(step.as_text() or "", dict(mesh.shape), layout.across)
    return Compiled(
        usage.argument_size_in_bytes,
        usage.temp_size_in_bytes,
        usage.peak_memory_in_bytes,
        None,
        None,
        tuple(collectives),
        tuple(problems),
        seconds,
    )


def out_of_memory(message: str) -> tuple[int, int] | None:
    """(bytes needed, bytes available) of the compiler's message, None where it says something else.

    >>> out_of_memory("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    ...               "(144.80G) exceeds available HBM (15.75G).")
    (155477816115, 16911433728)
    """
    for pattern in _NEEDED:
        if found := pattern.search(message):
            needed, unit, available, of = found.groups()
            return round(float(needed) * _UNITS[unit]), round(float(available) * _UNITS[of])
    return None
