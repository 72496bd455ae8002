"""A plan beside the run that it was made for: predicted and measured."""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from maskformer.checks import printable, shown
from maskformer.planning.schema import SCHEMA
from maskformer.training.tables import markdown_table

FILE = "plan.json"
# Of the plan's roofline, what a log line measures too: its name there, the head of its column, and how it is written.
MEASURED = {
    "tokens_per_second": ("train/tokens_per_second", "tokens/s", ",.0f"),
    "mfu": ("train/mfu", "MFU", ".1%"),
}


def write(workdir: pathlib.Path, plain: Mapping[str, Any]) -> None:
    """Store a plan, from `schema.plain`, beside the run of a folder, which is made where it is not there."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / FILE).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The plan beside a run, None where there is none.

    Raises:
      ValueError: the file holds no plan, or one of another schema.
    """
    file = workdir / FILE
    if not file.exists():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{printable(str(file))}: no plan ({type(error).__name__}); make it anew") from error
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
        found = stored.get("schema") if isinstance(stored, dict) else stored
        raise ValueError(
            f"{printable(str(file))}: schema {shown(found)}: expected {SCHEMA}; make it anew with `maskformer plan`"
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


def table(runs: Mapping[str, tuple[Mapping[str, Any], Sequence[Mapping[str, float]]]]) -> str | None:
    """A Markdown table of runs that have a plan, None where none has.

    Args:
      runs: name -> (plan, lines).
    """
    rows = []
    for name, (plan, lines) in runs.items():
        for metric, (predicted, measured) in compare(plan, lines).items():
            _, head, spec = MEASURED[metric]
            place, slices = plan["topology"]["name"], plan["topology"]["slices"]
            place += f" x {slices}" if slices > 1 else ""
            ratio = f"{measured / predicted:.2f}" if predicted else "-"
            rows.append([printable(name), place, head, format(predicted, spec), format(measured, spec), ratio])
    return markdown_table(["run", "planned for", "", "predicted", "measured", "ratio"], rows) if rows else None
