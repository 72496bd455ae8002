"""Tables in Markdown that also line up as text."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A table; a `|` inside a cell is escaped, or it would begin another one.

    >>> print(markdown_table(["mask", "loss"], [["window(8) | sinks(1)", "3.2"]]))
    | mask                  | loss |
    | --------------------- | ---- |
    | window(8) \| sinks(1) | 3.2  |
    """
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    )
