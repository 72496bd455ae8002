"""Memory, traffic and time of one program on one layout, put together."""

from __future__ import annotations

import dataclasses

from maskformer.models.pipeline import bubble
from maskformer.planning.layouts import Layout
from maskformer.planning.memory import Memory, memory
from maskformer.planning.parameters import parameters
from maskformer.planning.roofline import Roofline, roofline
from maskformer.planning.topologies import Topology
from maskformer.planning.traffic import Flow, traffic
from maskformer.planning.workload import Workload
from maskformer.training.sharding import create_rules


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the analytic model says of a layout.

    Attributes:
      whole: a line for each axis of the model that does not divide, and is whole on every device.
      notes: the same of all arrays, those of the optimizer too.
    """

    layout: Layout
    memory: Memory
    traffic: tuple[Flow, ...]
    roofline: Roofline
    whole: tuple[str, ...]
    notes: tuple[str, ...]
    usable: float

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.usable


def estimate(workload: Workload, topology: Topology, layout: Layout, price: float) -> Estimate:
    """The estimate of a layout; milliseconds, and no device.

    Args:
      price: US dollars for one chip and hour.

    Raises:
      ValueError: layers or rows do not divide into the stages (one line).
    """
    target = topology.chip.platform
    placed = workload.program.placed(layout.sizes)
    waiting = 0.0
    if (pipeline := placed.pipeline) is not None:
        train = workload.experiment.train
        rows = train.batch_size // train.parts(layout.shards)
        pipeline.check_microbatches(rows, "train.batch_size")
        waiting = bubble(pipeline.stages, pipeline.cut(rows), pipeline.rounds)
    arrays = parameters(workload.program, layout.sizes, placed.rules)
    used = memory(workload, placed, layout, arrays, target)
    flows = tuple(traffic(workload, placed, layout, arrays, target))
    times = roofline(workload, topology, layout, used, flows, arrays, price, waiting)
    _, whole = create_rules(placed.mesh, workload.program.model_config.axis_sizes)
    return Estimate(layout, used, flows, times, tuple(whole), tuple(placed.dropped), topology.chip.usable)
