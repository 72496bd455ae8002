"""Weak scaling by simulation: rows per chip stay, chips grow from 8 to 4,096; the tables of docs/scale.md.

    python -m benchmarks.weak_scaling

Needs no TPU and no compiler: theory's traffic and the roofline of `maskformer plan`, one line a topology.
"""

import dataclasses
import os

os.environ["JAX_PLATFORMS"] = "cpu"

from maskformer.planning.estimate import estimate
from maskformer.planning.layouts import resolve
from maskformer.planning.topologies import parse
from maskformer.planning.workload import Planned, trace
from maskformer.training import load_config
from maskformer.training import resolve as resolve_config
from maskformer.training.sections import MeshConfig
from maskformer.training.tables import markdown_table

POD = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
SLICES = (*((shape, 1) for shape in ("2x4", "4x4", "4x8", "8x8", "8x16")), *(("16x16", 2**n) for n in range(5)))


def table(flags, topologies, rows_per_chip, most_fsdp):
    """One line for each topology: milliseconds of each axis and of the step, and its efficiency against the first."""
    workload = trace(Planned(resolve_config(load_config(flags)[0])), "tpu")
    rows, first = [], None
    for topology in topologies:
        train = dataclasses.replace(workload.experiment.train, batch_size=rows_per_chip * topology.chips)
        here = workload.under(dataclasses.replace(workload.experiment, train=train))
        layout = resolve(MeshConfig(fsdp=min(most_fsdp, topology.slice_devices)), topology)
        made = estimate(here, topology, layout, topology.chip.price)
        times, roofline = made.roofline.axis_seconds, made.roofline
        first = first or roofline.step_seconds
        rows.append(
            [
                f"{topology.chips:,}",
                str(topology),
                str(layout),
                f"{made.memory.peak / 2**30:.1f}",
                f"{times.get('fsdp', 0) * 1e3:.0f}",
                f"{(times.get('data', 0) + times.get('data+fsdp', 0)) * 1e3:.0f}",
                f"{times.get('slices', 0) * 1e3:.0f}",
                f"{roofline.step_seconds * 1e3:.0f}",
                roofline.bound,
                f"{roofline.mfu:.1%}",
                f"{first / roofline.step_seconds:.0%}",
            ]
        )
    head = ["chips", "topology", "mesh", "GiB", "fsdp ms", "data ms", "slices ms", "step ms", "bound", "MFU", "scaling"]
    return markdown_table(head, rows)


if __name__ == "__main__":
    llama = ["--config=configs/gpt.py:llama-7b"]
    print(table(llama, [parse(f"v5p:{shape}") for shape in POD], rows_per_chip=2, most_fsdp=128))
    bert = ["--config=configs/bert.py:large,seq=512", "--config.model.compute_dtype=bfloat16"]
    print()
    print(table(bert, [parse(f"v5e:{shape}", slices) for shape, slices in SLICES], rows_per_chip=2, most_fsdp=1))
