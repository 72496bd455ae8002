"""Does it fit, and if not, the nearest change that does."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from maskformer.planning.estimate import Estimate, estimate
from maskformer.planning.layouts import check_batch, resolve
from maskformer.planning.search import check_stages, search
from maskformer.planning.topologies import Topology
from maskformer.planning.workload import Planned, Workload, trace
from maskformer.training.sections import TrainConfig

MOST_PARTS = 64


@dataclasses.dataclass(frozen=True)
class Change:
    """A change that makes a program fit, by the analytic model.

    Attributes:
      what: in words.
      flags: for `maskformer plan` and `train`, or for the topology.
      estimate: of the program with it.
    """

    what: str
    flags: str
    estimate: Estimate


def changes(workload: Workload, topology: Topology, price: float, limit: int = 3) -> list[Change]:
    """Changes that make a program fit which does not, the nearest first; empty where none of those tried does.

    In this order: another layout of the same chips, the batch in more parts, bfloat16 products, full rematerialisation,
    those joined, a smaller batch, more chips. The first that fits is the nearest: what comes earlier changes less of
    what is computed, or costs less.

    Args:
      limit: how many to find, one of each kind.
    """
    found: dict[str, Change] = {}
    for change in _candidates(workload, topology, price):
        if change.estimate.fits:
            found.setdefault(re.sub(r"\d+ (parts|rows).*", r"\1", change.what), change)
            if len(found) == limit:
                break
    return list(found.values())


def _candidates(workload: Workload, topology: Topology, price: float) -> Iterator[Change]:
    experiment = workload.experiment
    yield from _on_these_chips(workload, topology, price, "", "")
    lighter: dict[str, dict[str, Any]] = {
        "bfloat16 products": {"compute_dtype": "bfloat16"},
        "rematerialising whole layers": {"remat": "full"},
    }
    lighter["bfloat16 products and rematerialising whole layers"] = {"compute_dtype": "bfloat16", "remat": "full"}
    for what, model in lighter.items():
        if any(experiment.model.get(key) == value for key, value in model.items()):
            continue
        changed = _changed(workload, topology, model={**experiment.model, **model})
        flags = " ".join(f"--config.model.{key}={value}" for key, value in model.items())
        if here := _same_layout(changed, topology, price):
            yield Change(what, flags, here)
        yield from _on_these_chips(changed, topology, price, f"{what}, and ", f"{flags} ")
    batch = experiment.train.batch_size
    while batch % 2 == 0 and batch > experiment.train.accumulation_steps:
        batch //= 2
        smaller = _with(workload, train=dataclasses.replace(experiment.train, batch_size=batch))
        if best := _best(smaller, topology, price):
            flags = f"--config.train.batch_size={batch} {best.layout.flags(experiment.mesh)}"
            yield Change("a smaller batch", flags.rstrip(), best)
    larger = topology.smaller_and_larger()[1]
    while larger is not None:
        if best := _best(workload, larger, price):
            slices = f" --slices {larger.slices}" if larger.slices > 1 else ""
            flags = f"--topology {larger.name}{slices} {best.layout.flags(experiment.mesh)}"
            yield Change("more chips", flags.rstrip(), best)
        larger = larger.smaller_and_larger()[1] if larger.devices < 64 * topology.devices else None


def _on_these_chips(
    workload: Workload, topology: Topology, price: float, what: str, flags: str
) -> Iterator[Change]:
    """Another layout, and the batch in more parts, which leave the numbers as they are."""
    mesh, train = workload.experiment.mesh, workload.experiment.train
    if best := _best(workload, topology, price):
        yield Change(f"{what}another layout", f"{flags}{best.layout.flags(mesh)}".rstrip(), best)
    for said, flag, parted in _in_more_parts(train):
        changed = _with(workload, train=parted)
        if here := _same_layout(changed, topology, price):
            yield Change(f"{what}{said}", f"{flags}{flag}", here)
        if best := _best(changed, topology, price):
            words = f"{what}{said} on another layout"
            yield Change(words, f"{flags}{flag} {best.layout.flags(mesh)}".rstrip(), best)


def _in_more_parts(train: TrainConfig) -> Iterator[tuple[str, str, TrainConfig]]:
    """(words, flag, setting) of a batch in more and more parts."""
    if (rows := train.rows_per_device) is not None:
        # What follows the mesh goes on following it.
        while rows > 1:
            rows //= 2
            words = f"at most {rows} rows of a device at once"
            yield words, f"--config.train.rows_per_device={rows}", dataclasses.replace(train, rows_per_device=rows)
        return
    parts = train.accumulation_steps * 2
    while parts <= MOST_PARTS and train.batch_size % parts == 0:
        changed = dataclasses.replace(train, accumulation_steps=parts)
        yield f"the batch in {parts} parts", f"--config.train.accumulation_steps={parts}", changed
        parts *= 2


def _same_layout(workload: Workload, topology: Topology, price: float) -> Estimate | None:
    try:
        layout = resolve(workload.experiment.mesh, topology)
        check_batch(workload.experiment.train, layout)
        check_stages(workload.program, layout)
        return estimate(workload, topology, layout, price)
    except ValueError:
        return None


def _best(workload: Workload, topology: Topology, price: float) -> Estimate | None:
    return next(iter(search(workload, topology, price)), None)


def _with(workload: Workload, train: TrainConfig) -> Workload:
    return workload.under(dataclasses.replace(workload.experiment, train=train))


def _changed(workload: Workload, topology: Topology, **changed: Any) -> Workload:
    experiment = dataclasses.replace(workload.experiment, **changed)
    return trace(Planned(experiment, workload.program.vocabulary_size), topology.chip.platform)


