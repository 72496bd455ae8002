"""A plan beside the run that it was made for: predicted and measured."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from maskformer import paths
from maskformer.checks import printable, shown
from maskformer.planning.schema import SCHEMA
from maskformer.training.tables import markdown_table
from maskformer.training.workdir import METRICS, read_metrics, read_object

FILE = "plan.json"
# Of the plan's roofline, what a log line measures too: its name there, what it is called, and how it is written.
MEASURED = {
    "tokens_per_second": ("train/tokens_per_second", "tokens/s", ",.0f"),
    "mfu": ("train/mfu", "MFU", ".1%"),
}


def write(workdir: str | os.PathLike[str], plain: Mapping[str, Any]) -> None:
    """Store a plan, from `schema.plain`, beside the run of a folder, which is made where it is not there.

    Raises:
      OSError: it cannot be written.
    """
    folder = paths.resolve(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    paths.replace_bytes(folder / FILE, (json.dumps(plain, indent=2) + "\n").encode())


def read(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The plan beside a run, None where there is none.

    Raises:
      ValueError: the file holds no plan, or one of another schema.
    """
    file = paths.resolve(workdir) / FILE
    if not file.exists():
        return None
    stored = read_object(file, "make it anew: maskformer plan --workdir")
    if stored.get("schema") != SCHEMA:
        raise ValueError(
            f"{printable(str(file))}: schema={shown(stored.get('schema'))}: expected {SCHEMA}; make it anew: "
            "maskformer plan --workdir"
        )
    return stored


def compare(plan: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Metric -> (predicted, measured), of what a run's lines have; the median of them.

    Args:
      plan: from `read`.
      metrics: lines of `metrics.jsonl`.
    """
    found = {}
    for name, (key, _, _) in MEASURED.items():
        values = [line[key] for line in metrics if key in line]
        if values:
            found[name] = plan["estimate"]["roofline"][name], statistics.median(values)
    return found


def compared(workdirs: Sequence[str | os.PathLike[str]]) -> str | None:
    """A Markdown table of the runs that have a plan beside them, None where none has."""
    rows = []
    for workdir in workdirs:
        if (plan := read(workdir)) is None:
            continue
        topology = plan["topology"]
        place = topology["name"] + (f" x {topology['slices']}" if topology["slices"] > 1 else "")
        lines = read_metrics(paths.resolve(workdir) / METRICS)
        for metric, (predicted, measured) in compare(plan, lines).items():
            _, name, spec = MEASURED[metric]
            ratio = f"{measured / predicted:.2f}"
            rows.append([printable(workdir), place, name, format(predicted, spec), format(measured, spec), ratio])
    return markdown_table(["run", "planned for", "metric", "predicted", "measured", "ratio"], rows) if rows else None
