"""The bytes that must travel along each mesh axis in a training step, from the parameters' axes and the rows alone.

What an axis costs in theory:

- `data` (and every axis that splits rows or their length): an all-reduce of the gradients of all parameters that it
  does not split, for each part of the batch; `slices` where it crosses them, of what a slice's devices each hold a part
  of. `mesh.dcn_gradients` sends two bytes an element there, once a step. With `mesh.shard_optimizer` it is a
  reduce-scatter, and an all-gather of the updates.
- `fsdp`: of each parameter that it splits, an all-gather before the forward pass, one more before the backward pass
  where the layers are scanned, and a reduce-scatter of its gradient.
- `tensor`: an all-reduce of the activations wherever a product sums over a split axis: in the forward pass after the
  attention and the feed-forward layer, in the backward pass before them.
- `context`: an all-gather of keys and values, again in the backward pass, and a reduce-scatter of their gradients.
- `stage`: at each tick of the pipeline a microbatch of hidden states to the next stage, and one of those that wait to
  the stage before, and the same of their gradients; an all-reduce of the gradients of what belongs to no stage.
- `expert`: with `model.expert_capacity` an all-to-all of every expert's places and back, in both passes; without, where
  no token is dropped, a gather of the tokens of all and their choices, and a scatter of what comes of them, as
  `models.expert_dispatch` does it. What rematerialisation computes anew travels again.

A mixture whose batch runs in parts makes each part's forward pass twice: first the tokens of each expert are counted.

Compiled programs are held against it (tests/aot/test_plan.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax

from maskformer.models.experts import places
from maskformer.planning.collectives import DCN, sent
from maskformer.planning.layouts import Layout
from maskformer.planning.memory import local_sizes, read_itemsize
from maskformer.planning.parameters import TABLES, Parameter
from maskformer.planning.workload import Workload
from maskformer.training.program import Placed
from maskformer.training.sharding import BATCH_AXES

# Adds to the flow along some axes, of some kind, some bytes; whether they overlap with computing; how often.
Add = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Flow:
    """What theory asks of one axis in a step, of each device.

    Attributes:
      axis: a mesh axis, several joined by "+" in the mesh's order, or "slices".
      kind: of `collectives.KINDS`.
      payload_bytes, sent_bytes: as of `collectives.Collective`.
      overlaps: whether it can travel while the device computes.
    """

    axis: str
    kind: str
    payload_bytes: int
    sent_bytes: int
    overlaps: bool


def traffic(
    workload: Workload, placed: Placed, layout: Layout, parameters: Sequence[Parameter], target: str = "tpu"
) -> list[Flow]:
    """All flows of a step, by axis."""
    found: dict[tuple[str, str, bool], list[float]] = {}

    itemsize = jax.numpy.dtype(workload.experiment.model.get("compute_dtype", "float32")).itemsize

    def add(axes: Sequence[str], kind: str, payload: float, overlaps: bool, runs: float = 1.0) -> None:
        axes = [axis for axis in layout.sizes if axis in axes and layout.sizes[axis] > 1]
        if not axes or not payload:
            return
        inside = math.prod(layout.inner[axis] for axis in axes)
        outside = math.prod(layout.across.get(axis, 1) for axis in axes)
        moved = sent(kind, payload, inside) if inside > 1 else 0.0
        total = found.setdefault(("+".join(axes), kind, overlaps), [0.0, 0.0])
        total[0] += runs * payload
        total[1] += runs * moved
        if outside > 1:
            # Each device of a slice carries its part to the other slices.
            part = payload / inside
            if kind in ("all-reduce", "reduce-scatter") and workload.experiment.mesh.dcn_gradients is not None:
                # Halved where they are float32, and added up over the parts of the batch before they leave.
                part, runs = part * 2 / itemsize, 1.0
            between = found.setdefault((DCN, kind, overlaps), [0.0, 0.0])
            between[0] += runs * part
            between[1] += runs * sent(kind, part, outside)

    parts = workload.experiment.train.parts(layout.shards)
    _gradients(workload, layout, parameters, target, parts, add)
    _activations(workload, placed, layout, parameters, parts, add)
    return [Flow(axis, kind, round(a), round(b), overlaps) for (axis, kind, overlaps), (a, b) in found.items()]


def gradient_bytes(workload: Workload, parameters: Sequence[Parameter]) -> int:
    """Of the gradients that a device reduces: those of products in the compute dtype, of norms in float32."""
    return sum(one.local * gradient_itemsize(workload, one) for one in parameters)


def gradient_itemsize(workload: Workload, parameter: Parameter) -> int:
    """Bytes of an element of the gradient where it is reduced."""
    compute = jax.numpy.dtype(workload.experiment.model.get("compute_dtype", "float32")).itemsize
    return max(parameter.itemsize, 4) if parameter.wide else compute


def _gradients(
    workload: Workload, layout: Layout, parameters: Sequence[Parameter], target: str, parts: int, add: Add
) -> None:
    scanned = workload.experiment.model.get("scan_layers", True)
    for one in parameters:
        gradient = one.local * gradient_itemsize(workload, one)
        # Where an axis parts the rows or their length, each device has a part of the sum. Of embeddings and head, which
        # belong to no stage, the rows are split over the stages too.
        spread = [axis for axis in (*BATCH_AXES, "context") if axis not in one.split]
        if not one.stacked:
            add(["stage"], "all-reduce", gradient, True, parts)
        if workload.experiment.mesh.shard_optimizer:
            add(spread, "reduce-scatter", gradient, True, parts)
            add(spread, "all-gather", one.local * one.itemsize, True)
        else:
            add(spread, "all-reduce", gradient, True, parts)
        if "fsdp" in one.split:
            whole = one.local * layout.sizes["fsdp"]
            # Rows of a table are looked up as they are; products read what `read_itemsize` says.
            looked_up = one.axes[0] in TABLES
            itemsize = gradient_itemsize(workload, one) if looked_up else read_itemsize(workload, one, target)
            gathers = parts * ((2 if one.stacked and scanned else 1) + workload.counting_passes(parts))
            add(["fsdp"], "all-gather", whole * itemsize, True, gathers)
            add(["fsdp"], "reduce-scatter", whole * gradient_itemsize(workload, one), True, parts)


def _activations(
    workload: Workload, placed: Placed, layout: Layout, parameters: Sequence[Parameter], parts: int, add: Add
) -> None:
    experiment = workload.experiment
    objective = workload.program.objective
    itemsize = jax.numpy.dtype(experiment.model.get("compute_dtype", "float32")).itemsize
    rows = local_sizes(workload, placed, layout)["rows"] * objective.copies
    positions = rows * objective.output_length / layout.sizes["context"]
    again, counting = workload.repeated_share, workload.counting_passes(parts)
    stages = layout.sizes["stage"]
    widest = 0
    began: set[tuple[str, ...]] = set()
    heads = {one.path[:-2] for one in parameters if one.axes[0] == "vocab" and one.matrix and "head" in one.path}
    for one in parameters:
        layers = one.layers / (stages if one.stacked else 1)
        if "embed" not in one.axes or not one.matrix:
            continue
        width = one.size("embed")
        widest = max(widest, width if one.stacked else 0)
        if "tensor" in one.split:
            embed = positions * width * itemsize
            if one.axes[0] in TABLES:
                # Rows that other devices hold are 0; the gradient of the hidden states sums over the vocabulary.
                if "embeddings" in one.path:
                    add(["tensor"], "all-reduce", embed, False, parts * (1 + counting))
                if "head" in one.path or not heads:
                    add(["tensor"], "all-reduce", rows * objective.budget * width * itemsize, False, parts)
            elif one.axes[-1] == "embed":
                # The feed-forward layer's result is what the next one keeps: only the attention's is summed again.
                runs = 1 + counting + (again if "heads" in one.axes else 0)
                add(["tensor"], "all-reduce", embed, False, parts * layers * runs)
            elif one.path[:-2] not in began:
                # The gradients of what query, key and value read, or up and gate, are summed before they travel.
                began.add(one.path[:-2])
                add(["tensor"], "all-reduce", embed, False, parts * layers)
        if "expert" in one.split and one.axes[-1] == "embed":
            _exchanges(workload, layout, positions, width, parts * layers, counting, add)
        if one.stacked and "kv_heads" in one.axes and layout.sizes["context"] > 1:
            split = layout.sizes["tensor"] if "tensor" in one.split else 1
            whole = rows * objective.output_length * one.size("kv_heads") * one.size("head_dim") * itemsize / split
            add(["context"], "all-gather", whole, False, (2 + counting) * parts * layers)
            add(["context"], "reduce-scatter", whole, False, parts * layers)
    if (pipeline := placed.pipeline) is not None:
        work = pipeline.cut(experiment.train.batch_size // parts) * pipeline.rounds
        ticks = (work + stages - 1) / work * pipeline.rounds
        add(["stage"], "collective-permute", positions * widest * itemsize, False, (4 + 2 * counting) * parts * ticks)


def _exchanges(
    workload: Workload, layout: Layout, positions: float, width: int, runs: float, counting: int, add: Add
) -> None:
    """What layers with experts send along `expert` in `runs` training passes of the `positions` that a device has, each
    with `counting` forward passes before it."""
    config = workload.program.model_config
    itemsize = config.dtype("compute").itemsize
    # Gates, and what they weigh, are at least float32.
    wide = max(itemsize, 4)
    again = 0 if config.remat == "none" else 1
    if config.expert_capacity is not None:
        length = workload.program.objective.output_length
        slots = positions / length * config.experts * places(config, length)
        add(["expert"], "all-to-all", slots * width * itemsize, False, runs * (4 + 2 * again + 2 * counting))
        return
    everyone = positions * layout.sizes["expert"]
    choices = everyone * config.experts_per_token
    # Tokens, the numbers of their experts, and gates; then the gradients of the results.
    gathered = everyone * width * itemsize + choices * (4 + wide)
    add(["expert"], "all-gather", gathered, False, runs * (1 + again + counting))
    add(["expert"], "all-gather", everyone * width * wide, False, runs)
    add(["expert"], "reduce-scatter", everyone * width * wide, False, runs * (1 + counting))
    # Gradients of tokens and gates.
    add(["expert"], "reduce-scatter", everyone * width * itemsize + choices * wide, False, runs)
