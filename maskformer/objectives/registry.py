"""Objectives by name, for configs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from maskformer.objectives.mlm import conditional_mlm, mlm, ngram_mlm, pmi_mlm, span_mlm
from maskformer.objectives.objective import Objective
from maskformer.objectives.vocabulary import Vocabulary

BUILDERS: dict[str, Callable[..., Any]] = {
    "mlm": mlm,
    "span_mlm": span_mlm,
    "ngram_mlm": ngram_mlm,
    "pmi_mlm": pmi_mlm,
    "conditional_mlm": conditional_mlm,
}


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def create(name: str, vocabulary: Vocabulary, length: int, **params: Any) -> Objective:
    """Builds the objective `name` for rows of `length` tokens.

    Args:
      name: a key of `BUILDERS`.
      vocabulary: special ids and size of the tokenizer.
      length: tokens per row, L.
      **params: of that objective; every one is checked here, before any device work.

    Raises:
      ValueError: an unknown name or parameter (naming the nearest), or a bad value.

    >>> vocabulary = Vocabulary(size=100, pad=0, unk=1, cls=2, sep=3, mask=4)
    >>> create("mlm", vocabulary, 128, rate=0.15).budget
    19
    >>> create("mlm", vocabulary, 128, rate=1.2)
    Traceback (most recent call last):
    ...
    ValueError: rate=1.2: expected a fraction between 0 and 1
    """
    if name not in BUILDERS:
        raise ValueError(f"objective '{name}' is unknown{_nearest(name, BUILDERS)} (known: {', '.join(BUILDERS)})")
    builder = BUILDERS[name]
    known = list(inspect.signature(builder).parameters)[2:]
    for key in params:
        if key not in known:
            raise ValueError(
                f"objective '{name}' has no parameter '{key}'{_nearest(key, known)} (it takes {', '.join(known)})"
            )
    return builder(vocabulary, length, **params)
