"""`plan`: from a config and a topology to what it needs there, and whether that is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from maskformer.planning import search as searching
from maskformer.planning import topologies
from maskformer.planning.compiled import Compiled, compile_step
from maskformer.planning.estimate import Estimate, estimate
from maskformer.planning.layouts import check_batch, resolve
from maskformer.planning.roofline import ASSUMPTIONS
from maskformer.planning.topologies import Topology
from maskformer.planning.verdict import Change, changes
from maskformer.planning.workload import Planned, Workload, trace
from maskformer.training import resolve as resolve_config


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program needs on a topology.

    Attributes:
      workload, topology: of what, and where.
      chosen: the estimate of the config's own layout, or of the best one of a search.
      compiled: what the compiler says of it; None where nothing was compiled.
      ranked: the layouts of a search, best first, with what the compiler says of those that were compiled.
      price: US dollars for one chip and hour.
      changes: what would make it fit where it does not, nearest first.
      notes: what a reader must know of how it was made, a line each.
    """

    workload: Workload
    topology: Topology
    chosen: Estimate
    compiled: Compiled | None
    ranked: tuple[tuple[Estimate, Compiled | None], ...]
    price: float
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    assumptions: tuple[str, ...] = ASSUMPTIONS

    @property
    def fits(self) -> bool:
        """The compiler's word where it was asked, else the model's."""
        return self.compiled.fits if self.compiled is not None else self.chosen.fits

    @property
    def verdict(self) -> str:
        """One line."""
        gib = 2**30
        if self.compiled is not None and self.compiled.needed is not None:
            assert self.compiled.available is not None
            needed, usable, by = self.compiled.needed, self.compiled.available, "the compiler says"
        elif self.compiled is not None:
            assert self.compiled.peak is not None
            needed, usable, by = self.compiled.peak, round(self.topology.chip.usable), "compiled"
        else:
            needed, usable, by = self.chosen.memory.peak, round(self.topology.chip.usable), "estimated"
        what = f"{needed / gib:.2f} of {usable / gib:.2f} GiB of HBM per device ({by})"
        if self.fits:
            return f"fits: {what}"
        if not self.changes:
            return f"does not fit: {what}; none of the changes that were tried makes it fit"
        nearest = self.changes[0]
        return f"does not fit: {what}; {nearest.what} would: {nearest.flags}"


def plan(
    config: Mapping[str, Any],
    topology: Topology,
    *,
    search: bool = False,
    compile: bool | None = None,
    best: int = 1,
    price: float | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:
    """What a config needs on a topology: no device, no data and no tokenizer is touched.

    Args:
      config: a recipe's `ConfigDict`, or the mapping of a run's `config.json`.
      search: rank all layouts, instead of taking the config's mesh.
      compile: ask the TPU's compiler too, which takes minutes; None where libtpu is installed.
      best: with `search`, how many of the ranked layouts are compiled.
      price: US dollars for one chip and hour; None for the table's estimate.
      tell: called with a line before what takes long.

    Raises:
      ValueError: the config, its mesh or its batch are wrong for the topology, or there is no compiler; one line.
    """
    program = Planned(resolve_config(config))
    price = topology.chip.price if price is None else price
    notes, compile = _how(topology, compile)
    layout = None if search else resolve(program.experiment.mesh, topology)
    if layout is not None:
        check_batch(program.experiment.train, layout)
        searching.check_stages(program, layout)
    workload = trace(program, topology.chip.platform)
    if not workload.splits_heads:
        notes.append(
            "this model's heads and feed-forward width are counted whole on each device: along mesh.tensor it will "
            "need less than is said here"
        )
    compiled: Compiled | None = None
    ranked: list[tuple[Estimate, Compiled | None]] = []
    if layout is None:
        ranked = [(one, None) for one in searching.search(workload, topology, price)]
        if not ranked:
            raise ValueError(searching.why_none(workload, topology))
        if compile:
            for index, (one, _) in enumerate(ranked[:best]):
                ranked[index] = one, _compile(program, topology, one, tell)
            # What the compiler refuses is no best layout, whatever the model says of it.
            ranked.sort(key=lambda pair: pair[1] is not None and not pair[1].fits)
        chosen, compiled = ranked[0]
    else:
        chosen = estimate(workload, topology, layout, price)
        if compile:
            compiled = _compile(program, topology, chosen, tell)
    made = Plan(workload, topology, chosen, compiled, tuple(ranked), price, (), tuple(notes))
    if made.fits:
        return made
    return dataclasses.replace(made, changes=tuple(changes(workload, topology, price)))


def _how(topology: Topology, compile: bool | None) -> tuple[list[str], bool]:
    """Notes on how a plan is made, and whether anything is compiled."""
    if topology.chip.platform == "gpu":
        if compile:
            raise ValueError(
                f"--compile: expected --no-compile for {topology}: GPUs are planned by the analytic model alone"
            )
        return ["by the analytic model alone: nothing was compiled for these GPUs"], False
    there = topologies.has_compiler()
    if compile and not there:
        raise ValueError("--compile: the TPU's compiler is not installed; pip install 'maskformer[tpu]'")
    if compile is None and not there:
        note = "by the analytic model alone: pip install 'maskformer[tpu]' brings the compiler, which knows exactly"
        return [note], False
    if compile is False:
        return ["by the analytic model alone: nothing was compiled"], False
    return [], True


def _compile(program: Planned, topology: Topology, chosen: Estimate, tell: Callable[[str], None]) -> Compiled:
    tell(f"compiling the training step for {topology} with {chosen.layout}: this takes minutes ...")
    return compile_step(program, topology, chosen.layout)
