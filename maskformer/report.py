"""Runs side by side: a table of their last evaluations, and their curves as a picture."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from maskformer.checks import printable, shown
from maskformer.training.tables import markdown_table
from maskformer.training.workdir import METRICS, read_config, read_metrics, reason

# Which curves are worth a panel, with their axis labels.
PANELS = (
    ("train/loss", "training loss (nats)"),
    ("loss", "held-out loss (nats)"),
    ("accuracy", "held-out accuracy"),
    ("train/learning_rate", "learning rate"),
)


def load(workdir: str | pathlib.Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Config and metric lines of a run.

    Raises:
      ValueError: the folder holds no run, or names what is wrong with one of its files.
    """
    folder = pathlib.Path(workdir)
    config = read_config(folder, sections=("evaluation",))
    if not (folder / METRICS).is_file():
        raise ValueError(f"workdir {shown(str(workdir))}: no {METRICS} there; expected the folder of a run")
    return config, read_metrics(folder / METRICS)


def table(workdirs: Sequence[str | pathlib.Path]) -> str:
    """A Markdown table: what differs between the runs' configs, and each run's last evaluation."""
    runs = {printable(workdir): load(workdir) for workdir in workdirs}
    flat = {name: _flatten(config) for name, (config, _) in runs.items()}
    keys = sorted({key for config in flat.values() for key in config})
    differing = [key for key in keys if len({json.dumps(config.get(key)) for config in flat.values()}) > 1]
    header = ["run", *differing, "step", "tokens", "loss", "perplexity", "accuracy", "top 5", "unigram"]
    rows = []
    for name, (config, lines) in runs.items():
        last = _last_evaluation(lines, config["evaluation"].get("split"))
        tokens = max((line.get("train/tokens_seen", 0) for line in lines), default=0)
        rows.append(
            [
                name,
                *(_show(flat[name].get(key)) for key in differing),
                str(lines[-1]["step"] if lines else 0),
                f"{tokens:,.0f}",
                *(_number(last, key, spec) for key, spec in (("loss", ".4f"), ("perplexity", ".2f"))),
                *(_number(last, key, ".2%") for key in ("accuracy", "accuracy_top5", "unigram_accuracy")),
            ]
        )
    return markdown_table(header, rows)


def draw_curves(workdirs: Sequence[str | pathlib.Path], output: str | pathlib.Path) -> None:
    """Draw the runs' curves into one picture; the end of `output` says of what kind.

    Raises:
      ValueError: the picture cannot be written, or a folder holds no run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for workdir in workdirs:
        config, lines = load(workdir)
        split = config["evaluation"].get("split")
        for (key, label), panel in zip(PANELS, axes.flat, strict=True):
            name = key if "/" in key else f"{split}/{key}"
            points = [(line["step"], line[name]) for line in lines if name in line]
            marker = "." if len(points) < 40 else None
            panel.plot([x for x, _ in points], [y for _, y in points], label=_label(workdir), marker=marker)
            panel.set_ylabel(label)
            baseline = [line[f"{split}/unigram_{key}"] for line in lines if f"{split}/unigram_{key}" in line]
            if baseline:
                panel.axhline(baseline[-1], color="gray", linestyle=":", linewidth=1)
                place = {"xycoords": ("axes fraction", "data"), "ha": "right", "color": "gray"}
                panel.annotate("unigram", (0.99, baseline[-1]), **place)
    for panel in axes.flat:
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    for text in axes.flat[0].legend(fontsize="small").get_texts():
        text.set_parse_math(False)  # a folder's name is no formula
    try:
        # By itself, Matplotlib would add to a name without a suffix.
        figure.savefig(output, dpi=110, format=pathlib.Path(output).suffix[1:] or "png")
    except OSError as error:
        said = f"{os.fspath(output)}: cannot be written ({reason(error)}); choose another --output"
        raise ValueError(said) from error
    finally:
        pyplot.close(figure)


def _label(workdir: str | pathlib.Path) -> str:
    # Matplotlib leaves out of a legend what begins with an underscore.
    name = printable(workdir)
    return f"./{name}" if name.startswith("_") else name


def _last_evaluation(lines: list[dict[str, float]], split: str) -> dict[str, float]:
    prefix = f"{split}/"
    for line in reversed(lines):
        if f"{prefix}loss" in line:
            return {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
    return {}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def _number(values: Mapping[str, float], key: str, spec: str) -> str:
    return format(values[key], spec) if key in values else "-"
