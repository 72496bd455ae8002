"""Weak scaling by simulation: rows per chip stay, chips grow from 8 to 4,096; the tables of docs/scale.md.

    python -m benchmarks.weak_scaling
    python -m benchmarks.weak_scaling --compile llama 8 128 1024 4096

The first needs no TPU and no compiler: theory's traffic and the roofline of `maskformer plan`, one line a topology. The
second compiles the step of each of these numbers of chips with the TPU's own compiler (`pip install 'maskformer[tpu]'`,
some minutes each), reads its collectives, and puts their time into the same roofline.
"""

import argparse
import dataclasses
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from maskformer.planning.compiled import compile_step
from maskformer.planning.estimate import estimate
from maskformer.planning.layouts import resolve
from maskformer.planning.parameters import parameters
from maskformer.planning.roofline import roofline
from maskformer.planning.topologies import parse
from maskformer.planning.traffic import Flow
from maskformer.planning.workload import Planned, trace
from maskformer.training import load_config
from maskformer.training import resolve as resolve_config
from maskformer.training.sections import MeshConfig
from maskformer.training.tables import markdown_table

POD = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
SLICES = (*((shape, 1) for shape in ("2x4", "4x4", "4x8", "8x8", "8x16")), *(("16x16", 2**n) for n in range(5)))


LLAMA = ("--config=configs/gpt.py:llama-7b",)
BERT = ("--config=configs/bert.py:large,seq=512", "--config.model.compute_dtype=bfloat16")
# Of each model: flags, topologies, the most devices along fsdp. Two rows a chip.
MODELS = {
    "llama": (LLAMA, [parse(f"v5p:{shape}") for shape in POD], 128),
    "bert": (BERT, [parse(f"v5e:{shape}", slices) for shape, slices in SLICES], 1),
}
ROWS_PER_CHIP = 2
HEAD = ["chips", "topology", "mesh", "GiB", "fsdp ms", "data ms", "slices ms", "step ms", "bound", "MFU", "scaling"]
COMPILED_HEAD = ["chips", "topology", "mesh", "GiB", "axis", "theory MB", "compiled MB", "ms", "compiled ms", "took s"]


def planned(workload, topology, most_fsdp):
    """The workload with the topology's batch, and its estimate."""
    train = dataclasses.replace(workload.experiment.train, batch_size=ROWS_PER_CHIP * topology.chips)
    here = workload.under(dataclasses.replace(workload.experiment, train=train))
    layout = resolve(MeshConfig(fsdp=min(most_fsdp, topology.slice_devices)), topology)
    return here, estimate(here, topology, layout, topology.chip.price)


def table(flags, topologies, most_fsdp):
    """One line for each topology: milliseconds of each axis and of the step, and its efficiency against the first."""
    workload = trace(Planned(resolve_config(load_config(list(flags))[0])), "tpu")
    rows, first = [], None
    for topology in topologies:
        _, made = planned(workload, topology, most_fsdp)
        times, step = made.roofline.axis_seconds, made.roofline.step_seconds
        first = first or step
        rows.append(
            [
                f"{topology.chips:,}",
                str(topology),
                str(made.layout),
                f"{made.memory.peak / 2**30:.1f}",
                f"{times.get('fsdp', 0) * 1e3:.0f}",
                f"{(times.get('data', 0) + times.get('data+fsdp', 0)) * 1e3:.0f}",
                f"{times.get('slices', 0) * 1e3:.0f}",
                f"{step * 1e3:.0f}",
                made.roofline.bound,
                f"{made.roofline.mfu:.1%}",
                f"{first / step:.0%}",
            ]
        )
    return markdown_table(HEAD, rows)


def compiled_lines(workload, topology, most_fsdp):
    """Lines of one topology: each axis by theory and as compiled, and the step with either."""
    here, made = planned(workload, topology, most_fsdp)
    program, layout = here.program, made.layout
    who = [f"{topology.chips:,}", str(topology), str(layout)]
    try:
        step = compile_step(program, topology, layout)
    except ValueError as error:
        return [[*who, "-", "step", "", f"not compiled: {error}", f"{made.roofline.step_seconds * 1e3:.1f}", "", ""]]
    if not step.fits:
        needed = f"over {step.needed / 2**30:.1f}"
        return [[*who, needed, "step", "", "does not fit", f"{made.roofline.step_seconds * 1e3:.1f}", "", ""]]
    flows = [
        # A group of a part of an axis is on the links of that axis.
        Flow(one.axis.removeprefix("part of "), one.kind, one.payload_bytes, one.sent_bytes, True)
        for one in step.collectives
    ]
    arrays = parameters(program, layout.sizes, program.placed(layout.sizes).rules)
    again = roofline(here, topology, layout, made.memory, flows, arrays, topology.chip.price)
    theory, seen = (dict.fromkeys(again.axis_seconds | made.roofline.axis_seconds, 0) for _ in range(2))
    for total, of in ((theory, made.traffic), (seen, flows)):
        for flow in of:
            total[flow.axis] += flow.payload_bytes
    lines = [
        [
            *who, "", axis, f"{theory[axis] / 1e6:,.1f}", f"{seen[axis] / 1e6:,.1f}",
            *(f"{times.axis_seconds.get(axis, 0) * 1e3:.1f}" for times in (made.roofline, again)), "",
        ]
        for axis in theory
    ]  # fmt: skip
    steps = [f"{times.step_seconds * 1e3:.1f} ({times.bound})" for times in (made.roofline, again)]
    peaks = f"{made.memory.peak / 2**30:.1f} / {step.peak / 2**30:.1f}"
    return [*lines, [*who, peaks, "step", "", "", *steps, f"{step.seconds:.0f}"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compile", choices=MODELS, help="compile this model's step, for the numbers of chips given")
    parser.add_argument("chips", nargs="*", type=int, help="numbers of chips, of those in the table")
    arguments = parser.parse_args()
    if arguments.compile is None:
        if arguments.chips:
            parser.error("numbers of chips are compiled; say --compile MODEL")
        print("\n\n".join(table(*model) for model in MODELS.values()))
        return
    flags, topologies, most_fsdp = MODELS[arguments.compile]
    there = {topology.chips: topology for topology in topologies}
    if not arguments.chips or set(arguments.chips) - set(there):
        parser.error(f"--compile {arguments.compile}: expected numbers of chips out of {', '.join(map(str, there))}")
    workload = trace(Planned(resolve_config(load_config(list(flags))[0])), "tpu")
    lines = []
    for chips in arguments.chips:
        lines += compiled_lines(workload, there[chips], most_fsdp)
        print(lines[-1], file=sys.stderr, flush=True)
    print(markdown_table(COMPILED_HEAD, lines))


if __name__ == "__main__":
    main()
