"""Several runs evaluated in several ways: a table with a cell for each, or the reason why there is none."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maskformer.training import runs
from maskformer.training.tables import markdown_table

Results = dict[str, float]
# What a column does with a run.
Measure = Callable[[runs.Run], Results]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs by ways of evaluating them.

    Attributes:
      split: what was evaluated.
      steps: run -> the step of its checkpoint.
      rows: run -> how many rows of the split were evaluated, and how many there are.
      columns: names of the ways.
      cells: run -> column -> results, or in one line why it is not defined.
    """

    split: str
    steps: dict[str, int]
    rows: dict[str, tuple[int, int]]
    columns: tuple[str, ...]
    cells: dict[str, dict[str, Results | str]]

    def table(self) -> str:
        """Markdown, with the reasons for empty cells below."""
        rows, notes = [], []
        for name, cells in self.cells.items():
            done, total = self.rows[name]
            row = [name, str(self.steps[name]), f"{done:,}" if done == total else f"{done:,} of {total:,}"]
            for column in self.columns:
                cell = cells[column]
                if isinstance(cell, str):
                    notes.append(f"{name}, {named(column, cell)}")
                    row.append(f"n/a [{len(notes)}]")
                else:
                    row.append(summary(cell))
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
    columns: Mapping[str, Measure],
    split: str = "test",
    *,
    overrides: Sequence[str] = (),
    checkpoint: str = "best",
) -> Comparison:
    """Evaluate every run in every way.

    Args:
      workdirs: folders of runs.
      columns: name -> what to do with a run.
      split: what the columns evaluate; only recorded here.
      overrides, checkpoint: as for `runs.load`.

    Raises:
      ValueError: a run cannot be loaded (it is named), or no cell at all is defined.
    """
    steps: dict[str, int] = {}
    rows: dict[str, tuple[int, int]] = {}
    cells: dict[str, dict[str, Results | str]] = {}
    reason = ""
    for workdir in workdirs:
        name = os.fspath(workdir)
        try:
            run = runs.load(workdir, overrides=overrides, checkpoint=checkpoint)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        steps[name], rows[name], cells[name] = run.step, run.rows(split), {}
        for column, measure in columns.items():
            try:
                cells[name][column] = measure(run)
            except ValueError as error:
                cells[name][column] = reason = str(error)
    if all(isinstance(cell, str) for row in cells.values() for cell in row.values()):
        raise ValueError(reason)
    return Comparison(split, steps, rows, tuple(columns), cells)


def rate_columns(rates: Sequence[float], split: str, objective: Mapping[str, Any] | None = None) -> dict[str, Measure]:
    """Columns that evaluate at each corruption rate: with runs trained at several, the train-rate by eval-rate matrix.

    Perplexities at a model's own rate do not compare between rates; those of one column do.

    Args:
      objective: other changes to the objective, such as `{"name": "mlm"}`.

    >>> list(rate_columns([0.15, 0.4], "test"))
    ['rate 0.15', 'rate 0.4']
    """

    def at(rate: float) -> Measure:
        return lambda run: run.evaluate(split, {**(objective or {}), "rate": rate})

    return {f"rate {rate:g}": at(rate) for rate in rates}


def named(column: str, text: str) -> str:
    """`text` behind the name of its column, unless it begins with that name itself.

    >>> named("nll", "nll: not defined"), named("rate 0.4", "not defined")
    ('nll: not defined', 'rate 0.4: not defined')
    """
    return text if text.startswith(f"{column}:") else f"{column}: {text}"


def summary(results: Mapping[str, float]) -> str:
    """The results in a few words; a bound stands behind `<=`.

    >>> summary({"nll_bound": 3.21, "nll_bound_stderr": 0.012, "perplexity_bound": 24.8, "bits_per_byte_bound": 1.9})
    'nll <= 3.2100 ± 0.0120, bits per byte <= 1.9000'
    >>> summary({"loss": 2.5, "perplexity": 12.18, "accuracy": 0.41})
    'loss 2.5000, accuracy 41.00%'
    """
    parts = []
    if "nll_bound" in results:
        parts.append(f"nll <= {results['nll_bound']:.4f} ± {results['nll_bound_stderr']:.4f}")
    for key, label, spec in (
        ("bits_per_byte_bound", "bits per byte <=", ".4f"),
        ("nll", "nll", ".4f"),
        ("bits_per_byte", "bits per byte", ".4f"),
        ("pseudo_perplexity", "pseudo-perplexity", ".2f"),
        ("pseudo_bits_per_byte", "pseudo-bits per byte", ".4f"),
        ("loss", "loss", ".4f"),
        ("accuracy", "accuracy", ".2%"),
    ):
        if key in results:
            parts.append(f"{label} {results[key]:{spec}}")
    return ", ".join(parts)
