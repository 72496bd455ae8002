"""Layouts of a topology that a program could run on, the fastest that fit first."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from maskformer.checks import one_line
from maskformer.planning.estimate import Estimate, estimate
from maskformer.planning.layouts import Layout, check_batch, resolve
from maskformer.planning.topologies import Topology
from maskformer.planning.workload import Planned, Workload

# Beyond these an axis costs more than it gives: its collectives wait for every layer.
MOST_TENSOR = 16
# More stages wait longer than a batch has rows to fill them with.
MOST_STAGES = 16
# Of a row, what a device should have at least to be worth parting it.
LEAST_CONTEXT = 1024
# Step times that differ by less, as a share, are equal.
SAME_TIME = 0.02


def search(workload: Workload, topology: Topology, price: float) -> list[Estimate]:
    """An estimate of every layout over all axes that divides the model and the batch.

    Those that fit come first, by their step time; then the others, by their memory.
    """
    found = [estimate(workload, topology, layout, price) for layout in layouts(workload, topology)]
    return sorted((one for one in found if not one.whole), key=_rank)


def _rank(one: Estimate) -> tuple[bool, float, float, float]:
    seconds, peak = one.roofline.step_seconds, one.memory.peak
    # Of times that the model cannot tell apart, the one that leaves more memory.
    return not one.fits, round(math.log(seconds) / SAME_TIME) if one.fits else peak, peak, seconds


def layouts(workload: Workload, topology: Topology) -> Iterator[Layout]:
    """The layouts that are tried: `data` takes what the others leave, and crosses the slices.

    Of the mesh of the config the sizes are not looked at, and the rest is: where it asks for rounds, all have stages.
    """
    experiment = workload.experiment
    sizes = workload.program.model_config.axis_sizes
    length = experiment.data.length
    within = topology.slice_devices if topology.chip.torus else topology.shape[0]
    split = [sizes[axis] for axis in ("kv_heads", "mlp", "vocab")]
    tensors = [n for n in range(1, MOST_TENSOR + 1) if all(size % n == 0 for size in split)]
    contexts = [n for n in (1, 2, 4, 8, 16) if n == 1 or (length % n == 0 and length // n >= LEAST_CONTEXT)]
    experts = _divisors(sizes["experts"]) if sizes["experts"] else [1]
    layers = workload.program.model_config.layers
    stages = [n for n in range(1, MOST_STAGES + 1) if layers % n == 0]
    if not workload.splits_heads:
        tensors = [1]
    for stage, expert, tensor, context in itertools.product(stages, experts, tensors, contexts):
        if within % (expert * tensor * context) or topology.devices % (stage * expert * tensor * context):
            continue
        rest = topology.devices // (stage * expert * tensor * context)
        for fsdp in _divisors(rest):
            if sizes["embed"] % fsdp:
                continue
            try:
                mesh = dataclasses.replace(
                    experiment.mesh, stage=stage, data=-1, fsdp=fsdp, expert=expert, tensor=tensor, context=context
                )
                layout = resolve(mesh, topology)
                check_batch(experiment.train, layout)
                check_stages(workload.program, layout)
            except ValueError:
                continue
            yield layout


def check_stages(program: Planned, layout: Layout) -> None:
    """ValueError where the layers, their masks or the rows of the batch do not divide into the stages of a layout."""
    pipeline = program.placed(layout.sizes).pipeline if layout.sizes["stage"] > 1 else None
    if pipeline is not None:
        config, train = program.model_config, program.experiment.train
        pair = bool(program.experiment.model.get("generator"))
        for network in (config.generator, config.discriminator) if pair else (config,):
            pipeline.check_layers(network.layers)
            period = network.period(len(network.mask_pattern))
            pipeline.check_pattern(network.layers, period, f"what repeats after {period} layers")
        pipeline.check_microbatches(train.batch_size // train.parts(layout.shards), "train.batch_size")


def why_none(workload: Workload, topology: Topology) -> str:
    """The line that says what no layout divides."""
    train, devices = workload.experiment.train, topology.devices
    shards = math.gcd(train.batch_size // train.accumulation_steps, devices)
    return one_line(
        f"train.batch_size={train.batch_size}: no layout of {topology} parts it, the nearest has {shards} shards for "
        f"{devices} devices; use a multiple of {devices}"
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
