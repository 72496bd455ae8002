"""Tables of a card: one line for each arm."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from experiments.results import Results
from maskformer.training.tables import markdown_table


def arm_table(results: Results, head: str, columns: Mapping[str, Callable[[str], str]]) -> str:
    """A line for each arm: its name below `head`, and under each column's name what the column says of the arm."""
    rows = [[arm, *(cell(arm) for cell in columns.values())] for arm in results.arms]
    return markdown_table([head, *columns], rows, aligned=False)


def default_table(results: Results) -> str:
    """Each number that was measured, by arm: mean and standard deviation over seeds.

    Raises:
      ValueError: the card measures no single numbers, only curves.
    """

    def column(name: str) -> Callable[[str], str]:
        return lambda arm: f"{results[name, arm].mean():.3f} {spread(results[name, arm])}".rstrip()

    return arm_table(results, "arm", {name: column(name) for name in results.numbers()})


def spread(values: np.ndarray) -> str:
    """`±` and the standard deviation over seeds; nothing for a single seed.

    >>> spread(np.array([1.0, 2.0, 3.0])), spread(np.array([1.0]))
    ('±1.000', '')
    """
    return f"±{np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
