"""A trained run as a card's `measure` sees it. The one place where cards call what maskformer measures."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from maskformer.training import runs
from maskformer.training.writers import read_metrics


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
      folder: where it lies.
      arm, seed: which run it is.
      config: what it was trained with.
    """

    folder: pathlib.Path
    arm: str
    seed: int
    config: ConfigDict
    _loaded: dict[str, runs.Run] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def load(self, checkpoint: str = "latest") -> runs.Run:
        """The run at its "latest" or "best" checkpoint, for what the methods below do not offer."""
        if checkpoint not in self._loaded:
            self._loaded[checkpoint] = runs.load(self.folder, checkpoint=checkpoint)
        return self._loaded[checkpoint]

    def evaluate(
        self, split: str = "test", *, checkpoint: str = "latest", max_batches: int | None = None, **objective: Any
    ) -> dict[str, float]:
        """Loss, accuracies and the rest under the run's objective, with changes: `run.evaluate("test", rate=0.4)`."""
        return self.load(checkpoint).evaluate(split, objective, max_batches=max_batches)

    def nll(self, split: str = "test", *, checkpoint: str = "latest", **options: Any) -> dict[str, float]:
        """The exact negative log-likelihood after next-token prediction, and bits per byte."""
        return self.load(checkpoint).nll(split, **options)

    def nll_bound(self, split: str = "test", *, checkpoint: str = "latest", **options: Any) -> dict[str, float]:
        """The upper bound on it after diffusion or masking: `run.nll_bound("test", samples=8)`."""
        return self.load(checkpoint).nll_bound(split, **options)

    def pseudo_perplexity(self, split: str = "test", *, checkpoint: str = "latest", **options: Any) -> dict[str, float]:
        """Every token hidden in turn and predicted from all others."""
        return self.load(checkpoint).pseudo_perplexity(split, **options)

    def rows(self, split: str = "train") -> int:
        """How many rows a split has."""
        return self.load().rows(split)[1]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A metric over the run, such as "validation/loss": its steps and its values.

        Raises:
          ValueError: the run never wrote it.
        """
        # A run that was interrupted may have written a step twice; the later line is the one it went on from.
        points = {line["step"]: line[name] for line in read_metrics(self.folder / "metrics.jsonl") if name in line}
        if not points:
            raise ValueError(f"{self.folder}: metrics.jsonl has no {name!r}; evaluation.every decides how often")
        steps = sorted(points)
        return np.array(steps), np.array([points[step] for step in steps])
