"""What the experiment cards share: their command line, running a sweep once, and verdicts computed from seeds."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from maskformer.training import train_and_evaluate
from maskformer.training.checkpoints import checkpoint_steps
from maskformer.training.config import plain
from maskformer.training.sweeps import apply

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement about a mean over seeds: that it exceeds `threshold`.

    Attributes:
      statement: in words, as the paper's claim can be tested at this scale.
      effects: one number for each seed; arms of one seed share data order, masks and initialisation, so an effect is
        a paired difference.
      threshold: what the mean must exceed.
      unit: of the effects.
    """

    statement: str
    effects: Sequence[float]
    threshold: float
    unit: str

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's t interval of the mean over seeds."""
        count = len(self.effects)
        if count < 2:
            return -math.inf, math.inf
        half = stats.t.ppf(0.5 + confidence / 2, count - 1) * np.std(self.effects, ddof=1) / math.sqrt(count)
        mean = float(np.mean(self.effects))
        return mean - float(half), mean + float(half)

    @property
    def verdict(self) -> str:
        """`observed` or `not observed` when the 95% interval lies on one side of the threshold; else `underpowered`.

        >>> Claim("a", [1.0, 1.1, 0.9], 0.0, "nats").verdict
        'observed'
        >>> Claim("a", [-1.0, -1.1, -0.9], 0.0, "nats").verdict
        'not observed'
        >>> Claim("a", [1.0, -1.1, 0.9], 0.0, "nats").verdict
        'underpowered'
        >>> Claim("a", [1.0], 0.0, "nats").verdict
        'underpowered'
        """
        low, high = self.interval()
        if low > self.threshold:
            return "observed"
        return "not observed" if high < self.threshold else "underpowered"

    def row(self) -> str:
        """A line of a Markdown table."""
        low, high = self.interval()
        return (
            f"| {self.statement} | {np.mean(self.effects):+.3f} [{low:+.3f}, {high:+.3f}] {self.unit} "
            f"| > {self.threshold:g} | **{self.verdict}** |"
        )


def claims_table(claims: Iterable[Claim]) -> str:
    """The verdicts as a Markdown table."""
    header = "| claim | mean over seeds [95% interval] | needed | verdict |\n|---|---|---|---|"
    return "\n".join([header, *(claim.row() for claim in claims)])


def spread(values: np.ndarray) -> str:
    """`±` and the standard deviation over seeds; nothing for a single seed."""
    return f"±{np.std(values, ddof=1):.3f}" if len(values) > 1 else ""


def arm_name(overrides: Mapping[str, Any]) -> str:
    """Folder of a run: `objective.rate=0.4,seed=1`."""
    return ",".join(f"{key}={value}" for key, value in sorted(overrides.items()))


def arms_of(config: ConfigDict, sweep: Iterable[Mapping[str, Any]]) -> dict[str, ConfigDict]:
    """The runs of a sweep: name of the folder -> config."""
    return {arm_name(overrides): apply(config, overrides) for overrides in sweep}


def main(
    card: str,
    arms: Mapping[str, ConfigDict],
    evaluate: Callable[[pathlib.Path, Sequence[int]], dict[str, Any]],
    write: Callable[[dict[str, Any], pathlib.Path], None],
    argv: Sequence[str] | None = None,
) -> None:
    """Run a card from its command line: train its arms, measure them, write the results.

    Args:
      card: the name of its folder.
      arms: every run, name of its folder -> config.
      evaluate: folder of the runs, seeds -> results, ready for JSON.
      write: results, folder -> results.md and the plot.
      argv: flags; None takes the process's own.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{card}.run")
    parser.add_argument("--workdir", default=f"runs/{card}", help="folder of the runs; complete runs are kept")
    parser.add_argument("--steps", type=int, help="steps of a run, to try the card quickly (default: the config's)")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds (default: all)")
    parser.add_argument("--output", default=str(HERE / card), help="folder for results.json, results.md and the plot")
    arguments = parser.parse_args(argv)
    known = sorted({config.seed for config in arms.values()})
    seeds = known if arguments.seeds is None else sorted(set(arguments.seeds))
    if not set(seeds) <= set(known):
        parser.error(f"--seeds: {seeds}: expected some of {known}")
    workdir = pathlib.Path(arguments.workdir)
    if jax.config.jax_compilation_cache_dir is None:
        # Runs that differ in their seed only share their programs.
        jax.config.update("jax_compilation_cache_dir", str((workdir / "xla").absolute()))
    for name, config in arms.items():
        if config.seed in seeds:
            train(config if arguments.steps is None else shortened(config, arguments.steps), workdir / name)
    results = {"seeds": seeds, **evaluate(workdir, seeds)}
    output = pathlib.Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write(results, output)
    print((output / "results.md").read_text())


def shortened(config: ConfigDict, steps: int) -> ConfigDict:
    """The config for a run of `steps` steps that is evaluated and saved at least once."""
    config = copy.deepcopy(config)
    config.train.steps, config.optimizer.warmup_steps = steps, max(steps // 10, 1)
    for section in (config.evaluation, config.checkpoint):
        section.every = min(section.every, steps)
    return config


def train(config: ConfigDict, folder: pathlib.Path) -> None:
    """Train a run in its folder, or resume it; a complete run is not repeated."""
    if is_complete(config, folder):
        print(f"== {folder}: complete", flush=True)
        return
    print(f"== {folder}", flush=True)
    train_and_evaluate(config, folder)


def is_complete(config: ConfigDict, folder: pathlib.Path) -> bool:
    """Whether `folder` holds the last checkpoint of this very run.

    Keys that its record lacks are younger than the run, which had what is their default now.
    """
    record = folder / "config.json"
    steps = checkpoint_steps(folder / "checkpoints")
    if not record.is_file() or not steps or steps[-1] != config.train.steps:
        return False
    return _agrees(json.loads(record.read_text()), json.loads(json.dumps(plain(config))))


def _agrees(record: Any, ours: Any) -> bool:
    if isinstance(record, Mapping) and isinstance(ours, Mapping):
        return all(key in ours and _agrees(value, ours[key]) for key, value in record.items())
    return record == ours
