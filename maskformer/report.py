"""Runs side by side: a table of their last evaluations, and their curves as a picture."""

from __future__ import annotations

import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from maskformer import paths
from maskformer.checks import printable, shown
from maskformer.evaluation import KINDS
from maskformer.paths import AnyPath
from maskformer.training.tables import markdown_table
from maskformer.training.workdir import CONFIG, METRICS, has_metrics, read_config, read_metrics, reason

# Of an evaluation, what is told first: metric -> the head of its column, and how it is written.
COLUMNS = {
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "accuracy": ("accuracy", ".2%"),
    "accuracy_top5": ("top 5", ".2%"),
    "unigram_accuracy": ("unigram", ".2%"),
}
# What is told of these beside: for `metrics.jsonl`, too much for a comparison of runs.
DETAILS = {"unigram_loss", "predicted", *(f"{name}_{kind}" for name in ("loss", "accuracy") for kind in KINDS)}
# What every training says of itself, whatever it trains.
OF_TRAINING = {
    "learning_rate", "grad_norm", "tokens_seen", "tokens_predicted", "flops", "seconds", "tokens_per_second",
    "tflops_per_second", "mfu", "data_wait_seconds", "device_wait_seconds",
}  # fmt: skip
# The curves that are drawn first, with their axis labels. A name without a prefix is of the evaluated split.
PANELS = {
    "train/loss": "training loss (nats)",
    "loss": "held-out loss (nats)",
    "accuracy": "held-out accuracy",
    "train/learning_rate": "learning rate",
}


def load(workdir: str | pathlib.Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Config and metric lines of a run.

    Raises:
      ValueError: the folder holds no run, or names what is wrong with one of its files.
    """
    folder = paths.given(workdir)
    config = read_config(folder, sections=("evaluation",))
    if not has_metrics(folder):
        raise ValueError(f"workdir {shown(str(workdir))}: no {METRICS} there; expected the folder of a run")
    return config, read_metrics(folder / METRICS)


def is_run(workdir: AnyPath) -> bool:
    """Whether a folder holds a run that has metrics."""
    return paths.lexists(workdir / CONFIG) and has_metrics(workdir)


def table(workdirs: Sequence[str | pathlib.Path]) -> str:
    """A Markdown table: what differs between the runs' configs, and each run's last evaluation."""
    runs = {printable(workdir): load(workdir) for workdir in workdirs}
    flat = {name: flatten(config) for name, (config, _) in runs.items()}
    keys = sorted({key for config in flat.values() for key in config})
    differing = [key for key in keys if len({json.dumps(config.get(key)) for config in flat.values()}) > 1]
    curves = [_curves(*run) for run in runs.values()]
    columns = {name: column for name, column in COLUMNS.items() if any(name in of_run for of_run in curves)}
    columns |= {name: (printable(name), ".4f") for name in _further(curves) if "/" not in name}
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
                *(_number(last, key, spec) for key, (_, spec) in columns.items()),
            ]
        )
    return markdown_table(["run", *differing, "step", "tokens", *(head for head, _ in columns.values())], rows)


def draw_curves(workdirs: Sequence[str | pathlib.Path], output: str | pathlib.Path) -> None:
    """Draw the runs' curves into one picture; the end of `output` says of what kind.

    Raises:
      ValueError: the picture cannot be written, or a folder holds no run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [_curves(*load(workdir)) for workdir in workdirs]
    said = PANELS | {
        name: f"training {name[len('train/') :]}" if "/" in name else f"held-out {name}" for name in _further(runs)
    }
    said = {name: label for name, label in said.items() if any(name in curves for curves in runs)} or PANELS
    count = -(-len(said) // 2)
    figure, axes = pyplot.subplots(count, 2, figsize=(11, 3.5 * count), layout="constrained", squeeze=False)
    for workdir, curves in zip(workdirs, runs):
        for (name, label), panel in zip(said.items(), axes.flat):
            points = curves.get(name, [])
            marker = "." if len(points) < 40 else None
            panel.plot([x for x, _ in points], [y for _, y in points], label=_label(workdir), marker=marker)
            panel.set_ylabel(printable(label), parse_math=False)
            if baseline := curves.get(f"unigram_{name}"):
                height = baseline[-1][1]
                panel.axhline(height, color="gray", linestyle=":", linewidth=1)
                place = {"xycoords": ("axes fraction", "data"), "ha": "right", "color": "gray"}
                panel.annotate("unigram", (0.99, height), **place)
    for panel in axes.flat[: len(said)]:
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    for spare in axes.flat[len(said) :]:
        spare.remove()
    for text in axes.flat[0].legend(fontsize="small").get_texts():
        text.set_parse_math(False)  # a folder's name is no formula
    try:
        # By itself, Matplotlib would add to a name without a suffix.
        picture = io.BytesIO()
        figure.savefig(picture, dpi=110, format=pathlib.PurePath(output).suffix[1:] or "png")
        paths.given(output).write_bytes(picture.getvalue())
    except OSError as error:
        why = f"{os.fspath(output)}: cannot be written ({reason(error)}); choose another --output"
        raise ValueError(why) from error
    finally:
        pyplot.close(figure)


def _curves(config: Mapping[str, Any], lines: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Each metric of a run by name, without prefix where it is of the evaluated split: its steps and values."""
    prefix = f"{config['evaluation'].get('split')}/"
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for key, value in line.items():
            # Both, where a run is evaluated on what it trains on.
            for name in [key] * key.startswith("train/") + [key.removeprefix(prefix)] * key.startswith(prefix):
                curves.setdefault(name, []).append((line["step"], value))
    return curves


def _further(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics of tasks of other kinds, in the order in which the runs tell them."""
    names = dict.fromkeys(name for curves in runs for name in curves)
    return [name for name in names if name.removeprefix("train/") not in {*COLUMNS, *DETAILS, *OF_TRAINING}]


def _label(workdir: str | pathlib.Path) -> str:
    # Matplotlib leaves out of a legend what begins with an underscore.
    name = printable(workdir)
    return f"./{name}" if name.startswith("_") else name


def _last_evaluation(lines: list[dict[str, float]], split: str) -> dict[str, float]:
    prefix = f"{split}/"
    for line in reversed(lines):
        if any(key.startswith(prefix) for key in line):
            return {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
    return {}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def _number(values: Mapping[str, float], key: str, spec: str) -> str:
    return format(values[key], spec) if key in values else "-"
