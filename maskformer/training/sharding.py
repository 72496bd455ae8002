"""The device mesh and where each array lives on it.

Parameters name their axes ("embed", "mlp", ...); one table of rules maps those names to mesh axes. Nothing here
gathers an array to a host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maskformer import attention
from maskformer.models.partitioning import Rules, logical_rules, partition_spec
from maskformer.models.pipeline import Pipeline
from maskformer.models.pipeline import use as use_pipeline
from maskformer.training.axes import axes_across, axis_sizes
from maskformer.training.sections import MeshConfig

# Rows of a batch are split over all three: fsdp shards parameters and expert whole experts, and each shard still sees
# rows of its own.
BATCH_AXES = ("data", "fsdp", "expert")
# The part of `data` that crosses slices, where each slice adds up its own gradients first (`mesh.dcn_gradients`).
SLICE_AXIS = "slice"

# Logical axis -> mesh axis or axes; None is never split. Every name of `models.partitioning` is here.
RULES: Rules = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "embed_out": None,
    "embed_factor": None,
    "label": None,
    "head_dim": None,
    "norm": None,
    "router": None,
    "positions": None,
    "token_types": None,
    "layers": "stage",
    "experts": "expert",
    "batch": BATCH_AXES,
    "length": "context",
    "activation_embed": None,
    "activation_heads": "tensor",
    "activation_kv_heads": "tensor",
    "activation_mlp": "tensor",
    "activation_vocab": "tensor",
}


def create_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all devices of all processes).

    Slices of a TPU pod, and without those (on GPU and CPU) processes, are what `config.dcn` spreads an axis over.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or `dcn` not to the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    groups, what = _groups(devices)
    dcn = axes_across(config, sizes, groups, what, default=groups > 1 and devices[0].platform == "tpu")
    if config.dcn_gradients is not None:
        across = dcn.pop("data")
        sizes = {SLICE_AXIS: across, **sizes, "data": sizes["data"] // across}
        dcn[SLICE_AXIS] = across
    inner = tuple(size // dcn.get(axis, 1) for axis, size in sizes.items())
    # On TPU and GPU the order of devices decides how far collectives travel; jax knows the wiring. An axis may be a
    # part of one of the torus's own, as tensor=2 on a side of 4.
    if dcn:
        array = mesh_utils.create_hybrid_device_mesh(
            inner,
            tuple(dcn.get(axis, 1) for axis in sizes),
            devices,
            process_is_granule=what == "processes",
            allow_split_physical_axes=True,
        )
    elif len(devices) > 1:
        array = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    else:
        array = np.array(devices)
    return Mesh(array.reshape(tuple(sizes.values())), tuple(sizes))


def _groups(devices: Sequence[jax.Device]) -> tuple[int, str]:
    """How many groups of devices have a network of their own among them, and what they are called."""
    # A device of the only slice has no number of its slice, and on CPU none has.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 or devices[0].platform == "tpu":
        return slices, "slices"
    return len({device.process_index for device in devices}), "processes"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the axes of the batch."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that rows of a batch are split over, the slowest network first."""
    return (SLICE_AXIS, *BATCH_AXES) if SLICE_AXIS in mesh.axis_names else BATCH_AXES


def shards_of_batch(mesh: Mesh) -> int:
    """Over how many devices, or groups of them that share rows, a batch is split."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPlacement:
    """Where the rows of a batch lie.

    Attributes:
      sharding: of every array of the batch, by its rows.
      size: rows of the whole batch.
      rows: int64, ascending, the rows that this process's devices hold. On a pod they need not be one run: devices are
        ordered along its wiring, and a process's are where it stands there. Processes whose devices differ only along
        the tensor or context axis need the same rows.
    """

    sharding: NamedSharding
    size: int
    rows: np.ndarray


def place_batch(
    mesh: Mesh, size: int, process: int | None = None, field: str = "train.batch_size"
) -> BatchPlacement:
    """The placement of batches of `size` rows, seen from a process (default: this one); `field` of the config says so.

    Raises:
      ValueError: the batch does not divide over the mesh.
    """
    axes = batch_axes(mesh)
    shards = shards_of_batch(mesh)
    if size % shards:
        raise ValueError(
            f"{field}={size}: does not divide over mesh {' x '.join(axes)} = {shards} shards; "
            f"use a multiple of {shards}"
        )
    process = jax.process_index() if process is None else process
    # Each row of this array has the processes of one shard of the batch.
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    at = [mesh.axis_names.index(axis) for axis in axes]
    holders = np.moveaxis(processes, at, range(len(at))).reshape(shards, -1)
    mine = np.flatnonzero((holders == process).any(axis=1))
    each = size // shards
    return BatchPlacement(batch_sharding(mesh), size, (mine[:, None] * each + np.arange(each)).reshape(-1))


def create_rules(mesh: Mesh, axis_sizes: Mapping[str, int]) -> tuple[Rules, list[str]]:
    """`RULES` as far as the model's sizes divide over the mesh, and a line for each rule that they do not.

    Args:
      axis_sizes: size of each logical axis, see `EncoderConfig.axis_sizes`.
    """
    rules, dropped = dict(RULES), []
    for name, size in axis_sizes.items():
        target = RULES[name]
        if isinstance(target, str) and size % mesh.shape[target]:
            rules[name] = None
            if f"activation_{name}" in rules:
                rules[f"activation_{name}"] = None
            dropped.append(
                f"{name}={size} does not divide over mesh.{target}={mesh.shape[target]}: every device along "
                f"{target} holds all of it"
            )
    return rules, dropped


@contextlib.contextmanager
def activations(
    mesh: Mesh,
    rules: Rules,
    context_method: str = "all_gather",
    batch: tuple[str, ...] | None = None,
    pipeline: Pipeline | None = None,
) -> Iterator[None]:
    """While a model is traced inside, its activations are constrained by `rules`, each device attends for its own rows
    and heads, and layers run in stages.

    Args:
      batch: axes that the rows are split over; None for all of `batch_axes`.
      pipeline: how, if there are several stages.
    """
    batch = batch_axes(mesh) if batch is None else batch
    # Outside of the layers, each stage has its share of the rows: of the embeddings, the head and the loss.
    rules = {**rules, "batch": batch if pipeline is None else (*batch, "stage")}
    placement = attention.Placement(
        mesh,
        batch=batch,
        # Key heads that do not divide are on every device of the axis, and query heads go with them.
        heads="tensor" if rules["activation_heads"] and rules["activation_kv_heads"] else None,
        context="context" if mesh.shape["context"] > 1 else None,
        context_method=context_method,
    )
    of_batch = None if pipeline is None else dataclasses.replace(pipeline, batch=batch)
    placed = attention.placements.use(placement if mesh.size > 1 else None)
    with logical_rules(mesh, rules), placed, use_pipeline(of_batch):
        yield


def create_pipeline(mesh: Mesh, config: MeshConfig) -> Pipeline | None:
    """How layers run over the stages of a mesh; None for one stage."""
    return Pipeline(mesh, batch_axes(mesh), config.microbatches, config.rounds) if mesh.shape["stage"] > 1 else None


def check_stacks(pipeline: Pipeline, logical_axes: Any, shapes: Any) -> None:
    """Raise the one-line `ValueError` of a stack of layers that does not divide into the stages.

    Args:
      logical_axes, shapes: of a model's parameters.
    """
    named, _ = jax.tree_util.tree_flatten_with_path(logical_axes, is_leaf=lambda node: isinstance(node, tuple))
    depths = {
        (leaf.shape[0], any(key.key == "expert_layers" for key in path))
        for (path, axes), leaf in zip(named, jax.tree.leaves(shapes), strict=True)
        if axes[:1] == ("layers",)
    }
    mixed = any(routed for _, routed in depths) and not all(routed for _, routed in depths)
    for depth, routed in sorted(depths):
        kind = f" {'with' if routed else 'without'} experts" if mixed else ""
        pipeline.check_layers(depth, f"model.layers{kind}")


def param_shardings(mesh: Mesh, logical_axes: Any, rules: Rules) -> Any:
    """Sharding of each parameter, from the names of its axes."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, partition_spec(axes, rules)),
        logical_axes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def split_over_data(mesh: Mesh, shapes: Any, shardings: Any) -> tuple[Any, list[str]]:
    """Shardings that split each array over `data` too, and a line on what cannot be.

    It is split where most of it is left on a device after `shardings`. What no dimension divides for stays as it was.

    Args:
      shapes: pytree of `jax.ShapeDtypeStruct`.
      shardings: the same tree of `NamedSharding`s, none of which names `data`.
    """
    parts = mesh.shape["data"]
    whole: list[int] = []

    def split(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
        spec = [*sharding.spec, *[None] * (len(shape.shape) - len(sharding.spec))]
        named = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]
        local = [size // math.prod(mesh.shape[axis] for axis in axes) for size, axes in zip(shape.shape, named)]
        fitting = [(size, -dimension) for dimension, size in enumerate(local) if size % parts == 0]
        if not fitting:
            whole.append(math.prod(shape.shape))
            return sharding
        dimension = -max(fitting)[1]
        spec[dimension] = (*named[dimension], "data")
        return NamedSharding(mesh, PartitionSpec(*spec))

    divided = jax.tree.map(split, shapes, shardings)
    said = (
        f"mesh.shard_optimizer: arrays with {sum(whole):,} parameters in all do not divide over mesh.data={parts} "
        "and are whole on every device along data"
    )
    return divided, [said] if whole else []


def slice_shardings(mesh: Mesh, shapes: Any, shardings: Any) -> Any:
    """Shardings of gradients that stand side by side for each slice, [slices, ...], in parts over `data` within it.

    Args:
      mesh: with the axis of slices.
      shapes, shardings: as of `split_over_data`.
    """
    parts, _ = split_over_data(mesh, shapes, shardings)
    return jax.tree.map(lambda part: NamedSharding(mesh, PartitionSpec(SLICE_AXIS, *part.spec)), parts)


def optimizer_shardings(
    mesh: Mesh, optimizer: optax.GradientTransformation, state_shapes: Any, shapes: Any, shardings: Any
) -> Any:
    """Sharding of each array of the optimizer's state: a moment lies where its parameter does."""

    def place(leaf: Any, shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
        # Adafactor's factored moments have a shape of their own, and are small.
        return sharding if leaf.shape == shape.shape else replicated(mesh)

    return optax.tree_utils.tree_map_params(
        optimizer, place, state_shapes, shapes, shardings, transform_non_params=lambda _: replicated(mesh)
    )


def to_global(batch: Mapping[str, np.ndarray], placement: BatchPlacement) -> dict[str, jax.Array]:
    """Global arrays from this process's rows of a batch; each device receives only its own."""

    def place(rows: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(placement.size)
            first = int(np.searchsorted(placement.rows, start))
            return rows[first : first + stop - start]

        return jax.make_array_from_callback((placement.size, *rows.shape[1:]), placement.sharding, shard)

    return {name: place(rows) for name, rows in batch.items()}
