"""How long a step takes: the slowest of what hardware does side by side, an estimate under stated assumptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from maskformer.planning.collectives import DCN
from maskformer.planning.layouts import Layout
from maskformer.planning.memory import Memory
from maskformer.planning.parameters import Parameter
from maskformer.planning.topologies import Topology
from maskformer.planning.traffic import Flow
from maskformer.planning.workload import Workload

# Of the data sheet's peak, what large products reach.
EFFICIENCY = {"tpu": 0.7, "gpu": 0.6}

ASSUMPTIONS = (
    f"products reach {EFFICIENCY['tpu']:.0%} (TPU) or {EFFICIENCY['gpu']:.0%} (GPU) of the data sheet's bfloat16 peak; "
    "float32 products run as bfloat16 on TPU and as TF32, at half the rate, on GPU",
    "the slowest of products, memory, ICI (or NVLink) and the network decides; gradients and parameters travel while "
    "the device computes, activations (tensor, context, stage) do not",
    "collectives are rings over whole sides of the torus, at the links' full rate; a side that does not close to a "
    "ring has half of it; other users of the network, stragglers and input are not counted",
    "MFU counts every key as attended and no recomputation, as `metrics.jsonl` does",
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step, and what follows from them.

    Attributes:
      step_seconds: of the whole step.
      compute_seconds: of products, with what remat="full" repeats, and the time that stages wait for each other.
      memory_seconds: of reading and writing HBM.
      axis_seconds: of the collectives of each axis, on its own links.
      exposed_seconds: the part of them that nothing hides.
      bound: what decides: "compute", "memory", the name of an axis, or "slices".
      mfu: model FLOPs utilisation, a share of the data sheet's peak.
      tokens_per_second: of all devices.
      dollars_per_billion_tokens: at the chip's price.
    """

    step_seconds: float
    compute_seconds: float
    memory_seconds: float
    axis_seconds: Mapping[str, float]
    exposed_seconds: float
    bound: str
    mfu: float
    tokens_per_second: float
    dollars_per_billion_tokens: float


def roofline(
    workload: Workload,
    topology: Topology,
    layout: Layout,
    memory: Memory,
    flows: Sequence[Flow],
    parameters: Sequence[Parameter],
    price: float,
    waiting: float = 0.0,
) -> Roofline:
    """The estimate.

    Args:
      price: US dollars for one chip and hour.
      waiting: the share of its time that a pipeline's stage waits, see `pipeline.bubble`.
    """
    chip = topology.chip
    experiment = workload.experiment
    rate = chip.flops * EFFICIENCY[chip.platform]
    if chip.platform == "gpu" and experiment.model.get("compute_dtype", "float32") == "float32":
        rate /= 2
    parts = experiment.train.parts(layout.shards)
    # A step is a forward pass and twice that; full rematerialisation adds one of the layers.
    passes = 3 + workload.repeated_share + workload.counting_passes(parts)
    compute = workload.flops * passes / 3 / topology.devices / rate / (1 - waiting)
    hbm = _memory_bytes(workload, layout, memory, parameters, parts) / chip.memory_bandwidth

    axes: dict[str, float] = {}
    exposed, hidden, network = 0.0, 0.0, 0.0
    speeds = _bandwidths(topology, layout)
    for flow in flows:
        seconds = flow.sent_bytes / min(speeds[axis] for axis in flow.axis.split("+"))
        axes[flow.axis] = axes.get(flow.axis, 0.0) + seconds
        if not flow.overlaps:
            exposed += seconds
        elif flow.axis == DCN:
            network += seconds
        else:
            hidden += seconds
    side_by_side = {"compute": compute, "memory": hbm, "ici": hidden, DCN: network}
    slowest = max(side_by_side, key=lambda name: side_by_side[name])
    bound = slowest
    if slowest == "ici":
        bound = max((flow for flow in flows if flow.overlaps and flow.axis != DCN), key=lambda f: axes[f.axis]).axis
    step = side_by_side[slowest] + exposed
    tokens = workload.tokens / step
    dollars = topology.chips * price / 3600 / tokens * 1e9
    mfu = workload.flops / step / topology.devices / chip.flops
    return Roofline(step, compute, hbm, axes, exposed, bound, mfu, tokens, dollars)


def _memory_bytes(
    workload: Workload, layout: Layout, memory: Memory, parameters: Sequence[Parameter], parts: int
) -> float:
    """Bytes that a step reads and writes."""
    state = memory.parameters + memory.optimizer + memory.averages
    # Read by the forward pass, and twice by the backward pass.
    weights = sum(2 * one.local * (layout.sizes["fsdp"] if "fsdp" in one.split else 1) for one in parameters)
    layers = max(one.layers for one in parameters) / layout.sizes["stage"]
    # What a layer makes is written and read in the forward pass, and its gradient in the backward pass.
    activations = 4 * memory.layer_bytes * layers + 4 * memory.logits
    return 2 * state + 2 * memory.gradients + parts * (3 * weights + activations)


def _bandwidths(topology: Topology, layout: Layout) -> dict[str, float]:
    """Bytes/s one way of a device along each axis."""
    chip = topology.chip
    network = chip.network_bandwidth / (chip.chips_per_host * chip.devices)
    found: dict[str, float] = {DCN: network}
    rings = topology.rings(layout.inner) if chip.torus else {}
    for axis in layout.sizes:
        sides, closed = rings.get(axis, (1, True))
        # A chip's devices share its links.
        found[axis] = chip.link_bandwidth * (sides * (2 if closed else 1) if chip.torus else 1) / chip.devices
        if not chip.torus and layout.inner[axis] == 1:
            found[axis] = network
    return found
