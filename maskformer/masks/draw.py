"""Pictures of masks: PNG through matplotlib, and the text and picture behind ``maskformer mask``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from maskformer.checks import shown
from maskformer.masks.builder_arguments import whole_number
from maskformer.masks.expression import Mask
from maskformer.masks.parse import parse

LARGEST_MATRIX = 4096 * 4096
COLOURS = {"empty": "#f4f4f2", "partial": "#f0b95b", "full": "#2f6690", "edge": "#ffffff"}


def draw(
    mask: Mask,
    q_len: int,
    kv_len: int | None = None,
    *,
    block: int | tuple[int, int] | None = None,
    q_offset: int = 0,
    batch: int = 0,
    head: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draws one entry of a mask: its matrix, its block map, or both.

    Without ``block`` the matrix alone; with it the matrix and the block map side by side, or the block map alone
    where the matrix has more than 4096 x 4096 entries.

    Args:
      mask: the mask, its arrays concrete.
      q_len, kv_len: the numbers of queries and keys; ``kv_len=None`` is the same.
      block: tile size of the block map, as in ``block_map``.
      q_offset: the position of query 0.
      batch, head: which entry.
      path: where to write the PNG; None to write nothing.

    Returns:
      The ``matplotlib.figure.Figure``, which a notebook shows.

    Raises:
      ValueError: if the matrix is too large to draw and no ``block`` is given.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    kv_len = q_len if kv_len is None else kv_len
    one = mask.select(batch, head)
    panels: list[tuple[str, np.ndarray]] = []
    if q_len * kv_len <= LARGEST_MATRIX:
        panels.append(("mask", 2 * np.asarray(one.dense(q_len, kv_len, q_offset)).astype(np.int8)))
    elif block is None:
        raise ValueError(
            f"draw: a {q_len} x {kv_len} matrix is too large for a picture; give block=... to draw its block map"
        )
    if block is not None:
        block_map = one.block_map(q_len, kv_len, block, q_offset)
        size = f"{block_map.block_q} x {block_map.block_kv}"
        title = f"tiles of {size}: blue full, amber partial, {block_map.sparsity():.1%} skipped"
        panels.append((title, block_map.kinds()[0, 0]))

    figure = Figure(figsize=(4.6 * len(panels), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    colours = ListedColormap([COLOURS[name] for name in ("empty", "partial", "full")])
    for axes, (title, picture) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        axes.imshow(picture, cmap=colours, vmin=0, vmax=2, interpolation="nearest", aspect="auto")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("key" if title == "mask" else "kv-block")
        axes.set_ylabel("query" if title == "mask" else "q-block")
        if max(picture.shape) <= 64:
            axes.set_xticks(np.arange(-0.5, picture.shape[1]), minor=True)
            axes.set_yticks(np.arange(-0.5, picture.shape[0]), minor=True)
            axes.grid(which="minor", color=COLOURS["edge"], linewidth=0.6)
            axes.tick_params(which="minor", length=0)
    text = repr(mask)
    text = text if len(text) <= 90 else text[:87] + "..."
    figure.suptitle(text + _entry(mask, batch, head), fontsize=10)
    if path is not None:
        folder = os.path.dirname(os.fspath(path)) or "."
        if not os.path.isdir(folder):
            raise ValueError(f"draw: path={shown(os.fspath(path))}, but there is no folder {shown(folder)}")
        figure.savefig(path, dpi=150, format="png")
    return figure


def _entry(mask: Mask, batch: int, head: int) -> str:
    """Which entry a picture shows, where there are several."""
    entries = zip(("batch", "head"), (batch, head), mask.shape)
    counts = [f"{name} {at} of {size}" for name, at, size in entries if size > 1]
    return f" ({', '.join(counts)})" if counts else ""


def picture(
    text: str,
    length: int,
    *,
    kv_length: int | None = None,
    block: int | tuple[int, int] | None = None,
    q_offset: int = 0,
    path: str | os.PathLike[str] | None = None,
    **arrays: Any,
) -> str:
    """The mask of a config string as a picture in text: what ``maskformer mask`` prints.

    A mask that differs between heads is shown for each of them, and of a batch the first entry.

    Names that the text leaves open and ``arrays`` does not give are filled with made-up examples, and the picture
    says so.

    Args:
      text: the mask, e.g. ``"causal & window(8)"``.
      length: the number of queries.
      kv_length: the number of keys, if it differs.
      block: tile size; adds the block map and its figures.
      q_offset: the position of query 0.
      path: where to write the picture as PNG too.

    Raises:
      MaskSyntaxError: if the text is wrong.
      ValueError: if it names an array for which there is no example.

    >>> print(picture("causal & window(2)", 6, block=2))
    causal & sliding_window(2)
    <BLANKLINE>
    █ · · · · ·
    █ █ · · · ·
    █ █ █ · · ·
    · █ █ █ · ·
    · · █ █ █ ·
    · · · █ █ █
    <BLANKLINE>
    tiles of 2 x 2:
    ▒ · ·
    ▒ ▒ ·
    · ▒ ▒
    0 full, 5 partial, 4 empty (44.4% skipped); 15 of 36 pairs attend
    """
    kv_length = length if kv_length is None else kv_length
    for name, value in (("length", length), ("kv_length", kv_length)):
        whole_number("picture", name, value, 1)
    mask = parse(text, **arrays)
    reach = max(length + q_offset, kv_length)
    examples = {}
    for name in mask.unbound:
        if name not in EXAMPLES:
            raise ValueError(
                f"mask {shown(text)} needs the array {name!r}, for which there is no example; give {name}=..."
            )
        examples[name] = EXAMPLES[name](reach)
    mask = mask.bind(**{name: value[None] if name in BATCHED else value for name, value in examples.items()})
    lines = [repr(mask)]
    lines += [f"with an example {name} = {_short(value)}" for name, value in examples.items()]
    small = length * kv_length <= 256 * 256
    if not small and block is None and path is None:
        lines += ["", f"{length} x {kv_length} is too large to print: give a block size, or a PNG to draw"]
    for head in range(mask.shape[1]):
        lines += _head(mask, length, kv_length, block, q_offset, head, small)
    if path is not None:
        draw(mask, length, kv_length, block=block, q_offset=q_offset, path=path)
    return "\n".join(lines)


def _short(value: Any) -> str:
    values = np.asarray(value)
    return str(values.tolist()) if values.size <= 256 else np.array2string(values, threshold=16, separator=", ")


def _head(
    mask: Mask, length: int, kv_length: int, block: int | tuple[int, int] | None, q_offset: int, head: int, small: bool
) -> list[str]:
    """The lines that show one head."""
    entry = _entry(mask, 0, head)
    lines = ["", entry.strip(" ()") + ":"] if entry and (small or block is not None) else []
    if small:
        lines += ["", mask.to_string(length, kv_length, q_offset, head=head)]
    if block is not None:
        one = mask.select(0, head)
        block_map = one.block_map(length, kv_length, block, q_offset)
        kinds = block_map.kinds()[0, 0]
        empty, partial, full = (int((kinds == kind).sum()) for kind in (0, 1, 2))
        lines += ["", f"tiles of {block_map.block_q} x {block_map.block_kv}:"]
        lines += [block_map.to_string()] if kinds.size <= 128 * 128 else []
        summary = f"{full} full, {partial} partial, {empty} empty ({block_map.sparsity():.1%} skipped)"
        if small:
            attended = int(np.asarray(one.dense(length, kv_length, q_offset)).sum())
            summary += f"; {attended} of {length * kv_length} pairs attend"
        lines.append(summary)
        lines += [f"the analysis has no rule for {name}" for name in block_map.widened]
    return lines


def _segment_example(length: int) -> np.ndarray:
    """Three packed segments of unequal length and a little padding."""
    ends = np.array([0.3, 0.55, 0.9]) * length
    ids = 1 + (np.arange(length)[:, None] >= ends).sum(1)
    return np.where(ids > 3, 0, ids).astype(np.int32)


BATCHED = ("segment_ids", "valid")
"""What a model gives, [batch, length]: a mask of one's own may ask for the batch dimension."""

EXAMPLES: dict[str, Callable[[int], Any]] = {
    "segment_ids": _segment_example,
    "kv_segment_ids": _segment_example,
    "valid": lambda length: np.arange(length) < max(1, (3 * length) // 4),
    "lengths": lambda length: np.int32(max(1, (3 * length) // 4)),
    "prefix_lengths": lambda length: np.int32(length // 3),
    "prefix": lambda length: np.arange(length) < length // 3,
    "global_tokens": lambda length: np.arange(length) % 8 == 0,
    "image_starts": lambda length: np.arange(length) % max(1, length // 3) == 1,
    "key_images": lambda length: (1 + np.arange(length) // max(1, length // 3)).astype(np.int32),
    "parents": lambda length: ((np.arange(length) + 1) // 2 - 1).astype(np.int32),
    "edges": lambda length: np.stack([np.arange(length), (np.arange(length) + 1) % length], 1).astype(np.int32),
    "q_lengths": lambda length: np.array([length // 2, length - length // 2], np.int32),
}
"""Made-up arrays of a given length, for pictures of masks whose text names arrays."""
