"""The scores that checkpoints were saved with, and which of them is the best."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from maskformer.checks import shown
from maskformer.paths import AnyPath
from maskformer.training.checksums import FIX
from maskformer.training.workdir import read_object

logger = logging.getLogger(__name__)


def best_first(directory: AnyPath, steps: Sequence[int]) -> list[int]:
    """The steps of a `checkpoints/` folder from the best score down, the newest first among equals.

    A damaged score is reported, and counts as none.
    """
    scores, criteria = dict.fromkeys(steps, -math.inf), {}
    for step in steps:
        try:
            scores[step], criteria[step] = read_score(directory / str(step))
        except ValueError as error:
            logger.warning("checkpoint of step %d in %s counts as not evaluated: %s", step, directory, error)
    # The metric may have changed on the way: the newest evaluation says which one counts.
    evaluated = [step for step in steps if scores[step] > -math.inf]
    criterion = criteria[max(evaluated)] if evaluated else None
    for step in evaluated:
        if criteria[step] not in (None, criterion):
            scores[step] = -math.inf
    return sorted(steps, key=lambda step: (scores[step], step), reverse=True)


def read_score(folder: AnyPath) -> tuple[float, str | None]:
    """The score that a checkpoint was saved with, -inf when it was not evaluated, and its criterion, if named.

    Raises:
      ValueError: the file that holds them is damaged.
    """
    path = folder / "metrics" / "metrics"
    if not path.exists():
        return -math.inf, None
    metrics = read_object(path, FIX)
    score, criterion = metrics.get("score", -math.inf), metrics.get("criterion")
    if type(score) not in (int, float):
        raise ValueError(f"{path}: score={shown(score)}, expected a number; {FIX}")
    if criterion is not None and type(criterion) is not str:
        raise ValueError(f"{path}: criterion={shown(criterion)}, expected a string; {FIX}")
    return score, criterion
