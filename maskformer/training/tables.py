"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], aligned: bool = True) -> str:
    r"""A table; a `|` inside a cell is escaped, or it would begin another one.

    Args:
      aligned: it lines up as text. Else it has as few characters as possible, so that a changed number changes one
        line.

    >>> print(markdown_table(["mask", "loss"], [["window(8) | sinks(1)", "3.2"]]))
    | mask                  | loss |
    | --------------------- | ---- |
    | window(8) \| sinks(1) | 3.2  |
    >>> print(markdown_table(["arm", "loss"], [["causal | window", "3.2"]], aligned=False))
    | arm | loss |
    |---|---|
    | causal \| window | 3.2 |
    """
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "|" + "|".join(f" {'-' * width} " if aligned else "---" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
