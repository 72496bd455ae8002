"""A trained run as a card's `measure` sees it. The one place where cards call what maskformer measures."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from maskformer.paths import AnyPath
from maskformer.training import runs
from maskformer.training.workdir import METRICS, read_metrics


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
      folder: where it lies.
      arm, seed: which run it is.
      config: what it was trained with.
    """

    folder: AnyPath
    arm: str
    seed: int
    config: ConfigDict
    _loaded: dict[str, runs.Run] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def load(self, checkpoint: str = "latest") -> runs.Run:
        """The run at its "latest" or "best" checkpoint, for what the methods below lack."""
        if checkpoint not in self._loaded:
            self._loaded[checkpoint] = runs.load(self.folder, checkpoint=checkpoint)
        return self._loaded[checkpoint]

    def measure(
        self,
        name: str = "loss",
        split: str = "test",
        *,
        checkpoint: str = "latest",
        max_batches: int | None = None,
        **options: Any,
    ) -> dict[str, float]:
        """What a measure says of a split: `run.measure("loss", rate=0.4)`, `run.measure("nll_bound", samples=8)`.

        Args:
          name: as behind `maskformer evaluate --metric`.
          split: "train", "validation" or "test".
          checkpoint: "latest" or "best".
          max_batches: batches of `evaluation.batch_size` rows; None for `evaluation.max_batches`.
          options: of the measure.
        """
        return self.load(checkpoint).measure(name, split, max_batches=max_batches, **options)

    def rows(self, split: str = "train") -> int:
        """How many rows a split has."""
        return self.load().rows(split)[1]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A metric over the run, such as "validation/loss": its steps and its values.

        Raises:
          ValueError: the run never wrote it.
        """
        # A run that was interrupted may have written a step twice; the later line is the one it went on from.
        points = {line["step"]: line[name] for line in read_metrics(self.folder / METRICS) if name in line}
        if not points:
            raise ValueError(f"{self.folder}: metrics.jsonl has no {name!r}; evaluation.every decides how often")
        steps = sorted(points)
        return np.array(steps), np.array([points[step] for step in steps])
