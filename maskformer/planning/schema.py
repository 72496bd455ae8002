"""A plan as plain data: what `maskformer plan --json` prints and a workdir's `plan.json` holds.

The keys are documented in docs/plan.md; one that changes its meaning raises `SCHEMA`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from maskformer.planning.compiled import Compiled
from maskformer.planning.estimate import Estimate
from maskformer.planning.planner import Plan

SCHEMA = 1


def plain(plan: Plan) -> dict[str, Any]:
    """The plan as nested dicts, lists, numbers and strings, ready for `json.dumps`."""
    topology, workload, chip = plan.topology, plan.workload, plan.topology.chip
    return {
        "schema": SCHEMA,
        "topology": {
            "name": topology.name,
            "slices": topology.slices,
            "chips": topology.chips,
            "devices": topology.devices,
            "hosts": topology.hosts,
            "platform": chip.platform,
            "hbm_bytes": round(chip.memory),
            "usable_bytes": round(chip.usable),
            "peak_flops": chip.flops,
            "dollars_per_chip_hour": plan.price,
        },
        "model": {
            "parameters": workload.parameters,
            "flops_per_step": workload.flops,
            "tokens_per_step": workload.tokens,
        },
        "fits": plan.fits,
        "verdict": plan.verdict,
        "estimate": _estimate(plan.chosen),
        "compiled": None if plan.compiled is None else _compiled(plan.compiled),
        "layouts": [
            {**_short(one), "compiled": None if compiled is None else _compiled(compiled)}
            for one, compiled in plan.ranked
        ],
        "changes": [
            {"what": change.what, "flags": change.flags, **_short(change.estimate)} for change in plan.changes
        ],
        "notes": list(plan.notes),
        "assumptions": list(plan.assumptions),
    }


def _estimate(one: Estimate) -> dict[str, Any]:
    memory = dataclasses.asdict(one.memory)
    return {
        "mesh": dict(one.layout.sizes),
        "dcn": dict(one.layout.across),
        "memory": {**memory, "arguments": one.memory.arguments, "temporaries": one.memory.temporaries},
        "traffic": [dataclasses.asdict(flow) for flow in one.traffic],
        "roofline": dataclasses.asdict(one.roofline),
        "whole_axes": list(one.notes),
    }


def _short(one: Estimate) -> dict[str, Any]:
    return {
        "mesh": dict(one.layout.sizes),
        "fits": one.fits,
        "peak_bytes": one.memory.peak,
        "step_seconds": one.roofline.step_seconds,
        "mfu": one.roofline.mfu,
        "bound": one.roofline.bound,
    }


def _compiled(compiled: Compiled) -> dict[str, Any]:
    return {**dataclasses.asdict(compiled), "fits": compiled.fits}
