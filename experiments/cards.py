"""What the experiment cards share: running a sweep once, and verdicts computed from seeds."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from maskformer.training import train_and_evaluate
from maskformer.training.sweeps import apply


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


def arm_name(overrides: Mapping[str, Any]) -> str:
    """Folder of a run: `objective.rate=0.4,seed=1`."""
    return ",".join(f"{key}={value}" for key, value in sorted(overrides.items()))


def train_arms(config: ConfigDict, sweep: Iterable[Mapping[str, Any]], workdir: pathlib.Path) -> list[pathlib.Path]:
    """Train each run of the sweep in a folder of its own; runs that are complete are not repeated."""
    folders = []
    for overrides in sweep:
        folder = workdir / arm_name(overrides)
        print(f"== {folder}", flush=True)
        train_and_evaluate(apply(config, overrides), folder)
        folders.append(folder)
    return folders
