"""Plots of a card, in one style."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.results import Results

STYLE = {
    "axes.grid": True, "axes.grid.which": "both", "grid.alpha": 0.3, "errorbar.capsize": 3,
    "figure.constrained_layout.use": True, "savefig.dpi": 110,
}  # fmt: skip


def save(plot: Callable[[Results, Figure], None], results: Results, path: pathlib.Path) -> None:
    """Write what `plot` draws as a PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        plot(results, figure)
        figure.savefig(path)


def panels(figure: Figure, count: int = 1) -> list[Axes]:
    """Empty panels, at most three side by side."""
    columns, rows = min(count, 3), math.ceil(count / 3)
    figure.set_size_inches(7 if count == 1 else 5 * columns, 4.5 if count == 1 else 4 * rows)
    every = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in every[count:]:
        spare.remove()
    return every[:count]


def default_plot(
    results: Results, figure: Figure, labels: Mapping[str, str] | None = None, xlabel: str = "arm"
) -> None:
    """A panel for each number that was measured: each seed a line through the arms, so that paired differences show.

    Args:
      labels: of the numbers to show, name -> label; None for all, under their own names.
    """
    labels = {name: name for name in results.numbers()} if labels is None else labels
    for panel, (name, label) in zip(panels(figure, len(labels)), labels.items()):
        values = results.array(name)
        panel.plot(list(results.arms), values.T, color="tab:gray", alpha=0.6, marker=".", linewidth=0.8)
        panel.plot(list(results.arms), values.mean(0), color="tab:blue", marker="o", linewidth=0, markersize=8)
        panel.set(xlabel=xlabel, ylabel=label)


def curves_plot(
    results: Results, figure: Figure, x: str, y: str, labels: Mapping[str, str] | None = None
) -> Axes:
    """Curve `y` over curve `x`: each seed a thin line, and the mean of an arm a thick one.

    Args:
      labels: arm -> label; None for the arms' names.

    Returns:
      The panel, for scales, limits and labels of its axes.
    """
    (panel,) = panels(figure)
    for number, arm in enumerate(results.arms):
        over, values = results[x, arm], results[y, arm]
        panel.plot(over.T, values.T, color=f"C{number}", alpha=0.35, linewidth=0.8)
        panel.plot(over.mean(0), values.mean(0), color=f"C{number}", linewidth=2, label=(labels or {}).get(arm, arm))
    panel.set(xlabel=x, ylabel=y)
    panel.legend()
    return panel
