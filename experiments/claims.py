"""Claims about arms that share their seeds, and verdicts computed from their numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from maskformer.checks import require
from maskformer.training.tables import markdown_table


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement about a mean over seeds: that it lies above `threshold`, and below `ceiling` where there is one.

    Above a margin it says that something is better, above minus a margin that it is not worse, and between the two
    that there is no difference that matters:

    >>> Claim("40% and 30% do the same", [0.01, 0.0, -0.01, 0.0], -0.05, "nats", ceiling=0.05).verdict
    'observed'

    Attributes:
      statement: in words, as the paper's claim can be tested at this scale.
      effects: one number for each seed; arms of one seed share data order, masks and initialisation, so an effect is
        a paired difference.
      threshold: what the mean must exceed.
      unit: of the effects.
      ceiling: what the mean must not reach.

    Raises:
      ValueError: no effects, one that is not finite, or no room between threshold and ceiling.
    """

    statement: str
    effects: Sequence[float]
    threshold: float
    unit: str
    ceiling: float = math.inf

    def __post_init__(self) -> None:
        effects = tuple(float(effect) for effect in self.effects)
        ours = f"claim {self.statement!r}: effects"
        require(len(effects) > 0 and all(map(math.isfinite, effects)), ours, effects, "a finite number for each seed")
        above = f"a number above the threshold {self.threshold:g}"
        require(self.threshold < self.ceiling, f"claim {self.statement!r}: ceiling", self.ceiling, above)
        object.__setattr__(self, "effects", effects)

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
        """The verdict at 95%.

        >>> Claim("a", [1.0, 1.1, 0.9], 0.0, "nats").verdict
        'observed'
        >>> Claim("a", [-1.0, -1.1, -0.9], 0.0, "nats").verdict
        'not observed'
        >>> Claim("a", [1.0, -1.1, 0.9], 0.0, "nats").verdict
        'underpowered'
        >>> Claim("a", [1.0], 0.0, "nats").verdict
        'underpowered'
        """
        return self.verdict_at(0.95)

    def verdict_at(self, confidence: float) -> str:
        """`observed` when the interval lies within what is claimed, `not observed` when it lies outside of it
        altogether; else `underpowered`."""
        low, high = self.interval(confidence)
        if low > self.threshold and high < self.ceiling:
            return "observed"
        return "not observed" if high < self.threshold or low > self.ceiling else "underpowered"

    @property
    def needed(self) -> str:
        """What is claimed of the mean, in symbols.

        >>> Claim("a", [0.0], 0.02, "nats").needed, Claim("a", [0.0], -0.05, "nats", ceiling=0.05).needed
        ('> 0.02', '> -0.05 and < 0.05')
        """
        return f"> {self.threshold:g}" + (f" and < {self.ceiling:g}" if self.ceiling < math.inf else "")

    def cells(self) -> list[str]:
        """Its line of the table of verdicts."""
        low, high = self.interval()
        estimate = f"{np.mean(self.effects):+.3f} [{low:+.3f}, {high:+.3f}] {self.unit}"
        return [self.statement, estimate, self.needed, f"**{self.verdict}**"]


def claims_table(claims: Iterable[Claim]) -> str:
    """The verdicts as a Markdown table."""
    header = ["claim", "mean over seeds [95% interval]", "needed", "verdict"]
    return markdown_table(header, [claim.cells() for claim in claims], aligned=False)
