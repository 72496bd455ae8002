"""Several runs evaluated in several ways: a table with a cell for each, or the reason why there is none."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from maskformer.checks import origin
from maskformer.evaluation import Column, Results
from maskformer.training import runs
from maskformer.training.tables import markdown_table


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs by ways of evaluating them.

    Attributes:
      split: what was evaluated.
      steps: run -> the step of its checkpoint.
      rows: run -> how many rows of the split were evaluated, and how many there are.
      columns: the ways, by their names.
      cells: run -> column -> results, or in one line why it is not defined.
    """

    split: str
    steps: dict[str, int]
    rows: dict[str, tuple[int, int]]
    columns: dict[str, Column]
    cells: dict[str, dict[str, Results | str]]

    def table(self) -> str:
        """Markdown, with the reasons for empty cells below."""
        rows, notes = [], []
        for name, cells in self.cells.items():
            done, total = self.rows[name]
            row = [name, str(self.steps[name]), f"{done:,}" if done == total else f"{done:,} of {total:,}"]
            for column, way in self.columns.items():
                cell = cells[column]
                if isinstance(cell, str):
                    notes.append(f"{name}, {named(column, cell)}")
                    row.append(f"n/a [{len(notes)}]")
                else:
                    row.append(way.measure.say(cell))
            rows.append(row)
        table = markdown_table([f"run ({self.split})", "step", "rows", *self.columns], rows)
        return "\n".join([table, *(f"[{number}] {note}" for number, note in enumerate(notes, start=1))])

    def to_dict(self) -> dict[str, Any]:
        """All results, ready for `json.dumps`; an undefined cell is `{"undefined": reason}`."""
        return {
            "split": self.split,
            "columns": list(self.columns),
            "runs": [
                {
                    "workdir": name,
                    "step": self.steps[name],
                    "rows": self.rows[name][0],
                    "split_rows": self.rows[name][1],
                    "results": {c: {"undefined": r} if isinstance(r, str) else r for c, r in cells.items()},
                }
                for name, cells in self.cells.items()
            ],
        }


def compare(
    workdirs: Sequence[str | os.PathLike[str]],
    columns: Mapping[str, Column],
    split: str = "test",
    *,
    overrides: Sequence[str] = (),
    checkpoint: str = "best",
) -> Comparison:
    """Evaluate every run in every way.

    Args:
      workdirs: folders of runs.
      columns: name -> what to measure; `Measure.columns` makes them.
      split: "train", "validation" or "test".
      overrides, checkpoint: as for `runs.load`.

    Raises:
      ValueError: a run cannot be loaded (it is named), or no cell at all is defined.
    """
    steps: dict[str, int] = {}
    rows: dict[str, tuple[int, int]] = {}
    cells: dict[str, dict[str, Results | str]] = {}
    undefined: ValueError | None = None
    for workdir in workdirs:
        name = os.fspath(workdir)
        try:
            run = runs.load(workdir, overrides=overrides, checkpoint=checkpoint)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        steps[name], rows[name], cells[name] = run.step, run.rows(split), {}
        for column, way in columns.items():
            try:
                cells[name][column] = way(run, split)
            except ValueError as error:
                cells[name][column] = f"{origin(error)}{error}"
                undefined = error
    if undefined is not None and all(isinstance(cell, str) for row in cells.values() for cell in row.values()):
        raise undefined
    return Comparison(split, steps, rows, dict(columns), cells)


def named(column: str, text: str) -> str:
    """`text` behind the name of its column, unless it begins with that name itself.

    >>> named("nll", "nll: not defined"), named("rate 0.4", "not defined")
    ('nll: not defined', 'rate 0.4: not defined')
    """
    return text if text.startswith(f"{column}:") else f"{column}: {text}"
