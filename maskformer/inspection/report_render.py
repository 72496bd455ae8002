"""A mask report as text and as HTML."""

from __future__ import annotations

import html
import math

import numpy as np

from maskformer.checks import printable
from maskformer.inspection.report import MaskReport, SampleRow

_ANSI = {
    "mask": "\033[1;37;41m", "random": "\033[1;35m", "keep": "\033[1;33m", "hidden": "\033[31m", "special": "\033[2m",
    "prefix": "\033[36m", "target": "\033[32m",
}
_COLORS = {
    "mask": "#fff;background:#c0392b", "random": "#8e44ad;font-weight:bold", "keep": "#b7770d;font-weight:bold",
    "hidden": "#c0392b", "special": "#999", "prefix": "#16808d", "target": "#1e8449",
}
_BLOCKS = " ▁▂▃▄▅▆▇█"


def facts(report: MaskReport) -> list[tuple[str, str]]:
    """(name, value) lines that both forms share."""
    least, mean, most = report.predicted_per_batch
    at = "" if report.step is None else f", as at training step {report.step}"
    lines = [
        ("objective", printable(report.objective)),
        ("looked at", f"{report.rows} rows, {report.tokens} tokens" + at),
        ("corrupted", f"{report.corrupted_rate:.2%} of the tokens"),
        ("predicted", f"{report.predicted_rate:.2%} of the tokens; per batch {least} to {most}, mean {mean:.1f}"),
        ("slots", f"{report.slots} per row, {report.slots_used:.1%} in use, full in {report.slots_full:.1%} of rows"),
    ]
    if report.replacement is not None:
        shares = zip(("mask", "random", "keep"), report.replacement)
        lines.append(("replacement", ", ".join(f"{name} {share:.1%}" for name, share in shares)))
    lines.append(("attended", f"{report.attended_fraction:.1%} of all (query, key) pairs"))
    if report.flops_per_token is not None:
        dense, active = report.flops_per_token
        lines.append(("FLOPs per token", f"{active:.4g} active of {dense:.4g} dense"))
    return lines


def coverage_notes(report: MaskReport) -> list[str]:
    """What stands out in the coverage by position: places that are always or never corrupted."""
    seen = ~np.isnan(report.coverage)
    always = np.flatnonzero(seen & (np.nan_to_num(report.coverage) >= 1.0))
    never = np.flatnonzero(seen & (np.nan_to_num(report.coverage) == 0.0))
    notes = []
    if 0 < report.corrupted_rate < 1 and report.rows >= 20:
        for name, places in (("always", always), ("never", never)):
            if len(places):
                shown = ", ".join(map(str, places[:10])) + (", ..." if len(places) > 10 else "")
                notes.append(f"{name} corrupted: position{'s' if len(places) > 1 else ''} {shown}")
    return notes


def _bars(values: np.ndarray, columns: int) -> str:
    """One character for each group of values, its height the group's mean."""
    groups = np.array_split(np.asarray(values, float), min(columns, len(values)))
    means = [float(np.nanmean(g)) if not np.isnan(g).all() else 0.0 for g in groups]
    top = max([*means, 1e-9])
    return "".join(_BLOCKS[round(m / top * (len(_BLOCKS) - 1))] for m in means)


def _histogram(report: MaskReport) -> list[tuple[int, float, float | None]]:
    """(length, share, target share or None), up to the last length that matters."""
    target = report.target_lengths or ()
    longest = min(max(len(report.span_lengths), len([t for t in target if t > 1e-4])), 40)

    def at(values, index):
        return values[index] if index < len(values) else 0.0

    return [
        (i + 1, at(report.span_lengths, i), at(target, i) if report.target_lengths else None) for i in range(longest)
    ]


def to_text(report: MaskReport, color: bool, width: int) -> str:
    lines = [f"{name:>16}  {value}" for name, value in facts(report)]
    columns = max(10, width - 20)
    top = float(np.nanmax(report.coverage)) if not np.isnan(report.coverage).all() else 0.0
    lines += ["", f"coverage by position (highest {top:.1%})", "  " + _bars(report.coverage, columns)]
    lines += [f"  {note}" for note in coverage_notes(report)]
    rows = _histogram(report)
    if rows:
        columns_of = "share   target" if report.target_lengths else "share"
        lines += ["", f"span length in {report.span_unit}   {columns_of}"]
        widest = max([share for _, share, _ in rows] + [t or 0.0 for _, _, t in rows] + [1e-9])
        for length, share, target in rows:
            aimed = "" if target is None else f"  {target:6.1%}"
            lines.append(f"  {length:4d}  {share:6.1%}{aimed}  {'█' * round(share / widest * 40)}")

    def paint(parts: tuple[tuple[str, str], ...]) -> str:
        if not color:
            return " ".join(f"[{text}]" if style in ("random", "keep", "hidden") else text for text, style in parts)
        return " ".join(f"{_ANSI[s]}{text}\033[0m" if s in _ANSI else text for text, s in parts)

    for number, sample in enumerate(report.samples):
        lines += ["", f"row {number}"]
        lines += [f"  {name:8s} {paint(parts)}" for name, parts in _parts(sample)]
    return "\n".join(lines)


def _parts(sample: SampleRow) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    return [("original", sample.original), ("input", sample.inputs), ("targets", sample.targets)]


def _svg_bars(values, height: int = 80, width: int = 720, target=None) -> str:
    values = [0.0 if math.isnan(v) else float(v) for v in values]
    top = max([*values, *(target or []), 1e-9])
    step = width / max(len(values), 1)
    bars = "".join(
        f'<rect x="{i * step:.2f}" y="{height - v / top * height:.2f}" width="{max(step - 0.5, 0.5):.2f}" '
        f'height="{v / top * height:.2f}"><title>{i}: {v:.3%}</title></rect>'
        for i, v in enumerate(values)
    )
    line = ""
    if target:
        points = " ".join(f"{(i + 0.5) * step:.2f},{height - t / top * height:.2f}" for i, t in enumerate(target))
        line = f'<polyline points="{points}" fill="none" stroke="#c0392b" stroke-width="2"/>'
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" fill="#2c7fb8">{bars}{line}</svg>'


def to_html(report: MaskReport) -> str:
    style = "".join(f".{name}{{color:{value}}}" for name, value in _COLORS.items())
    table = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in facts(report))
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in coverage_notes(report))
    rows = _histogram(report)
    spans = _svg_bars(
        [share for _, share, _ in rows], target=[t or 0.0 for _, _, t in rows] if report.target_lengths else None
    )

    def paint(parts: tuple[tuple[str, str], ...]) -> str:
        return " ".join(f'<span class="{s}">{html.escape(text)}</span>' for text, s in parts)

    samples = "".join(
        f"<h3>Row {number}</h3>"
        + "".join(f"<p><b>{name}</b> {paint(parts)}</p>" for name, parts in _parts(sample))
        for number, sample in enumerate(report.samples)
    )
    legend = " ".join(f'<span class="{name}">{name}</span>' for name in _COLORS)
    aim = " (line: the target distribution)" if report.target_lengths else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Mask report</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;max-width:760px;margin:2em auto;padding:0 1em}"
        f"th{{text-align:left;padding-right:1em;vertical-align:top}}{style}</style></head><body>"
        f"<h1>Mask report</h1><table>{table}</table>"
        f"<h2>Coverage by position</h2>{_svg_bars(report.coverage)}{notes}"
        f"<h2>Span length in {report.span_unit}{aim}</h2>{spans}"
        f"<h2>Sample rows</h2><p>{legend}</p>{samples}</body></html>"
    )
