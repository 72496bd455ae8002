"""Bytes of a device's memory at the three moments that can be the fullest, from shapes alone.

The state (parameters, optimizer, averages) is there all the time. On top of it comes

- at the loss: all that the forward pass keeps, the logits and their gradient;
- in the backward pass of the layers: what they keep, the gradients, and what one layer works on;
- at the update: the gradients.

What is kept is counted exactly (`planning.workload`); what a layer works on while it is differentiated is a share of
what its products make. The share, and what is said of XLA below, is held against programs that
the TPU compiler compiled (tests/planning/test_memory.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax

from maskformer.planning.layouts import Layout
from maskformer.planning.parameters import Parameter
from maskformer.planning.workload import Kept, Workload
from maskformer.training.program import Placed

# Of what a layer's products make, how much is there at once while it is differentiated: attention and feed-forward have
# their turns. (XLA fuses what norms and residuals make in between into the products around them.)
WORKING = 0.75
# Of embeddings, head and loss, how much lives through the layers' turn: the rest is computed anew, or moves to VMEM.
ENDS = 0.5
# What a TPU keeps of that in its VMEM, of 128 MiB, instead of HBM.
VMEM = 100 * 2**20


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters, optimizer, averages, batch: the arguments of a step, which take their own places as its results.
      activations: what the layers keep from forward to backward; over several slices with remat="full", twice.
      logits: the logits, and their gradient.
      ends: what embeddings and head keep.
      weights: copies of parameters in the dtype that products read, and what is gathered of them, at that moment.
      gradients: of all parameters, in their accumulated dtype.
      earlier_gradients: of them, those of earlier parts of the batch.
      working: what one layer works on while it is differentiated.
      layer_bytes: what one layer's products make.
      peak: the arguments and the fullest moment.
      moment: which it is: "loss", "layers" or "update".
    """

    parameters: int
    optimizer: int
    averages: int
    batch: int
    activations: int
    logits: int
    ends: int
    weights: int
    gradients: int
    earlier_gradients: int
    working: int
    layer_bytes: int
    peak: int
    moment: str

    @property
    def gradients_there(self) -> int:
        """Bytes of gradients at the fullest moment: at the loss those of earlier parts of the batch."""
        return self.earlier_gradients if self.moment == "loss" else self.gradients

    @property
    def arguments(self) -> int:
        return self.parameters + self.optimizer + self.averages + self.batch

    @property
    def temporaries(self) -> int:
        return self.peak - self.arguments


def memory(
    workload: Workload, placed: Placed, layout: Layout, parameters: Sequence[Parameter], target: str = "tpu"
) -> Memory:
    """The memory of a training step on one device of a layout.

    Args:
      placed: the program on the layout's mesh, see `Planned.placed`.
      parameters: of the program on it, see `planning.parameters`.
      target: "tpu" or "gpu": a TPU's products read bfloat16 even of float32 arrays.
    """
    train = workload.experiment.train
    sizes = local_sizes(workload, placed, layout)
    context, stage = layout.sizes["context"], layout.sizes["stage"]
    spread = _room(workload, layout)

    def held(kept: Kept) -> float:
        # What only a product reads is stored as the product reads it.
        narrowed = target == "tpu" and kept.outer and kept.dtype.itemsize == 4 and kept.floating
        # A stage has some of the layers; rows of embeddings, head and loss, which belong to none, are split over all.
        whole = kept.bytes(sizes, 2 if narrowed else None) / stage
        if kept.kind == "logits":
            # A gradient is computed of what was kept; masks are computed anew.
            return whole if kept.floating else 0.0
        return whole / context * (spread if kept.sorted else 1)

    of_kind = {
        kind: sum(held(one) for one in workload.kept if one.kind == kind) for kind in ("layers", "logits", "ends")
    }
    if target == "tpu" and layout.across and workload.repeated_share:
        # To send between slices early, the compiler parts a layer from the loop. Where the loop keeps what it carries,
        # the inputs of its layers, they are then copied.
        of_kind["layers"] += max((held(one) for one in workload.kept if one.kind == "layers"), default=0.0)
    made = [one for one in workload.layer if one.floating and not _in_between(one, workload)]
    layer = sum(one.bytes(sizes) / context * (spread if one.sorted else 1) for one in made)
    pipeline = placed.pipeline
    microbatches = 1 if pipeline is None else pipeline.cut(train.batch_size // train.parts(layout.shards))
    working = max(0.0, WORKING * layer / microbatches - (VMEM if target == "tpu" else 0))
    gradients = sum(one.local * max(4, one.itemsize) for one in parameters)
    # The sum over parts of a batch stands beside the gradient of the part at hand, split as the optimizer's state is.
    split = layout.sizes["data"] if workload.experiment.mesh.shard_optimizer else 1
    earlier = gradients / split if train.parts(layout.shards) > 1 else 0.0
    copies, gathered = _weights(workload, parameters, layout, target)
    state = _state(placed)
    batch = _batch(workload, layout)

    at = {
        "loss": of_kind["layers"] + of_kind["logits"] + ENDS * of_kind["ends"] + copies + earlier,
        "layers": of_kind["layers"] + ENDS * of_kind["ends"] + copies + gathered + gradients + earlier + working,
        "update": gradients + earlier,
    }
    moment = max(at, key=lambda name: at[name])
    peak = sum(state.values()) + batch + at[moment]
    return Memory(
        **{name: round(value) for name, value in state.items()},
        batch=round(batch),
        activations=round(of_kind["layers"]),
        logits=round(of_kind["logits"]),
        ends=round(ENDS * of_kind["ends"]),
        weights=round(copies + (gathered if moment == "layers" else 0.0)),
        gradients=round(gradients + earlier),
        earlier_gradients=round(earlier),
        working=round(working),
        layer_bytes=round(layer),
        peak=round(peak),
        moment=moment,
    )


def _in_between(kept: Kept, workload: Workload) -> bool:
    """Whether an array is as wide as the residual: what norms and sums make between the products."""
    return kept.shape[-1] == workload.experiment.model.get("width") and set(kept.powers) == {"rows"}


def local_sizes(workload: Workload, placed: Placed, layout: Layout) -> dict[str, float]:
    """Sizes of the marked axes on one device; an axis that does not divide is whole on each."""
    train, rules, tensor = workload.experiment.train, placed.rules, layout.sizes["tensor"]
    sizes: dict[str, float] = dict(workload.sizes)
    sizes["rows"] = train.batch_size / train.parts(layout.shards) / layout.shards
    for axis, rule in (("heads", "activation_kv_heads"), ("mlp", "activation_mlp"), ("vocab", "activation_vocab")):
        if axis in sizes and rules[rule]:
            sizes[axis] /= tensor
    return sizes


def _room(workload: Workload, layout: Layout) -> float:
    """How much more room than without the axis `expert` a device has for tokens sorted by expert, none of them dropped:
    all tokens of all devices along it, each as often as it may choose one of the experts that are here."""
    config, devices = workload.program.model_config, layout.sizes["expert"]
    if devices == 1 or not workload.experiment.model.get("experts") or config.experts % devices:
        return 1.0
    return devices * min(config.experts_per_token, config.experts // devices) / config.experts_per_token


def _weights(
    workload: Workload, parameters: Sequence[Parameter], layout: Layout, target: str
) -> tuple[float, float]:
    """Bytes of copies of parameters that live through the step, and of those that live with one layer."""
    copies, gathered = 0.0, 0.0
    fsdp = layout.sizes["fsdp"]
    for one in parameters:
        if not one.matrix:
            continue
        read = read_itemsize(workload, one, target)
        if one.stacked:
            # A loop's cast of its weights is done once, before it.
            copies += one.local * read if read < one.itemsize else 0.0
            if "fsdp" in one.split:
                # The weights of a layer and their gradient, whole.
                gathered += 2 * one.local / one.layers * layout.sizes["stage"] * fsdp * read
        elif read < one.itemsize or "fsdp" in one.split:
            copies += one.local * (fsdp if "fsdp" in one.split else 1) * read
    return copies, gathered


def read_itemsize(workload: Workload, parameter: Parameter, target: str) -> int:
    """Bytes of an element of a matrix as products read it."""
    compute = jax.numpy.dtype(workload.experiment.model.get("compute_dtype", "float32")).itemsize
    return min(compute, 2) if target == "tpu" else compute


def _state(placed: Placed) -> dict[str, float]:
    state = placed.state
    of = {"parameters": state.params, "averages": state.ema}
    found = {name: sum(_local(leaf) for leaf in jax.tree.leaves(tree)) for name, tree in of.items()}
    found["optimizer"] = sum(_local(leaf) for leaf in jax.tree.leaves(state)) - sum(found.values())
    return found


def _local(leaf: jax.ShapeDtypeStruct) -> float:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _batch(workload: Workload, layout: Layout) -> float:
    from maskformer import data

    experiment = workload.experiment
    arrays = data.batch_layout(experiment.train.batch_size, experiment.data.length).values()
    whole = sum(math.prod(shape) * jax.numpy.dtype(dtype).itemsize for shape, dtype in arrays)
    return whole / layout.shards


def shares(memory: Memory) -> Mapping[str, int]:
    """The parts of the peak, by name: those of the fullest moment."""
    parts = {"parameters": memory.parameters, "optimizer": memory.optimizer}
    if memory.averages:
        parts["averages"] = memory.averages
    if memory.moment != "update":
        parts |= {"activations": memory.activations, "embeddings and head": memory.ends, "weights": memory.weights}
    if memory.moment == "loss":
        parts |= {"logits": memory.logits}
    if gradients := memory.gradients_there:
        parts |= {"gradients": gradients}
    if memory.moment == "layers":
        parts |= {"working": memory.working}
    return parts
