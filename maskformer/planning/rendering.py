"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Iterable

from maskformer.planning.collectives import Collective
from maskformer.planning.compiled import Compiled
from maskformer.planning.estimate import Estimate
from maskformer.planning.memory import shares
from maskformer.planning.planner import Plan
from maskformer.planning.roofline import Roofline
from maskformer.planning.traffic import Flow
from maskformer.training.tables import markdown_table

MOST_LAYOUTS = 12
GIB = 2**30
STATE = ("parameters", "optimizer", "averages")


def render(plan: Plan) -> str:
    """The whole plan as text: memory, traffic, time, layouts, and the verdict last."""
    topology, workload = plan.topology, plan.workload
    parts = [
        f"{workload.parameters:,} parameters, {workload.tokens:,} tokens a step, "
        f"{workload.flops / 1e12:,.1f} TFLOP a step",
        f"{topology}: {topology.chips} chips, {topology.devices} devices, {topology.hosts} hosts; "
        f"mesh {plan.chosen.layout}",
        "",
        _memory(plan),
        "",
        _traffic(plan),
        "",
        _time(plan.chosen.roofline, plan),
    ]
    if plan.ranked:
        parts += ["", _layouts(plan)]
    parts += ["", *(f"note: {note}" for note in plan.notes)]
    parts += [f"note: {line}" for line in plan.chosen.notes]
    parts += [f"note: {line}" for line in (plan.compiled.problems if plan.compiled else ())]
    parts += [f"assumed: {line}" for line in plan.assumptions]
    parts += ["", plan.verdict]
    parts += [f"  or {change.what}: {change.flags}" for change in plan.changes[1:]]
    return "\n".join(parts)


def _memory(plan: Plan) -> str:
    memory, compiled = plan.chosen.memory, plan.compiled
    parts = [[f"  {name}", _gib(value), ""] for name, value in shares(memory).items()]
    state = sum(name in STATE for name in shares(memory))
    fullest = f"temporaries (fullest at the {memory.moment})"
    rows = [
        ["arguments", _gib(memory.arguments), _gib(None if compiled is None else compiled.arguments)],
        *parts[:state],
        [fullest, _gib(memory.temporaries), _gib(None if compiled is None else compiled.temporaries)],
        *parts[state:],
        ["peak", _gib(memory.peak), _needed(compiled)],
        ["usable", _gib(plan.topology.chip.usable), ""],
    ]
    return markdown_table(["HBM per device, GiB", "estimated", "compiled"], rows)


def _needed(compiled: Compiled | None) -> str:
    if compiled is None:
        return "-"
    return _gib(compiled.peak) if compiled.fits else f"{_gib(compiled.needed)}, which does not fit"


def _traffic(plan: Plan) -> str:
    theory, seconds = plan.chosen.traffic, plan.chosen.roofline.axis_seconds
    compiled = plan.compiled.collectives if plan.compiled is not None and plan.compiled.fits else ()
    if not theory and not compiled:
        return "no collectives: one device"
    rows = []
    axes = dict.fromkeys([*(flow.axis for flow in theory), *(one.axis for one in compiled)])
    for axis in axes:
        flows = [flow for flow in theory if flow.axis == axis]
        found = [one for one in compiled if one.axis == axis]
        rows.append(
            [
                axis,
                _kinds(flows),
                _megabytes(sum(flow.payload_bytes for flow in flows)),
                _kinds(found) if found else "-",
                str(sum(one.count for one in found)) if found else "-",
                _megabytes(sum(one.payload_bytes for one in found)) if found else "-",
                f"{seconds[axis] * 1e3:,.1f}" if axis in seconds else "-",
            ]
        )
    head = ["axis", "theory", "MB by theory", "compiled", "count", "MB compiled", "ms (estimate)"]
    return markdown_table(head, rows)


def _kinds(flows: Iterable[Flow | Collective]) -> str:
    return ", ".join(dict.fromkeys(flow.kind for flow in flows)) or "-"


def _time(roofline: Roofline, plan: Plan) -> str:
    share = f"{roofline.mfu:.1%}"
    lines = [
        ["step time", f"{roofline.step_seconds:.4g} s (bound by {roofline.bound})"],
        ["products", f"{roofline.compute_seconds:.4g} s"],
        ["HBM", f"{roofline.memory_seconds:.4g} s"],
        ["traffic that nothing hides", f"{roofline.exposed_seconds:.4g} s"],
        ["MFU", share],
        ["tokens/s", f"{roofline.tokens_per_second:,.0f}"],
        [
            "US$ for 10^9 tokens",
            f"{roofline.dollars_per_billion_tokens:,.2f} (at {plan.price:.2f} a chip and hour)",
        ],
    ]
    return markdown_table(["estimate", "value"], lines)


def _layouts(plan: Plan) -> str:
    rows = []
    for one, compiled in plan.ranked[:MOST_LAYOUTS]:
        rows.append([str(one.layout), *_row(one), _needed(compiled)])
    table = markdown_table(["layout", "peak GiB", "fits", "step s", "MFU", "bound by", "compiled GiB"], rows)
    left = len(plan.ranked) - MOST_LAYOUTS
    return table + (f"\n... and {left} more layouts (--json has them all)" if left > 0 else "")


def _row(one: Estimate) -> list[str]:
    roofline = one.roofline
    fits = "yes" if one.fits else "no"
    return [_gib(one.memory.peak), fits, f"{roofline.step_seconds:.4g}", f"{roofline.mfu:.1%}", roofline.bound]


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / GIB:.2f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f}"
