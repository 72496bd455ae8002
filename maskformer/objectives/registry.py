"""Objectives by name, for configs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from maskformer.objectives.compat import COMPAT as CONVENTIONS
from maskformer.objectives.compat import Convention
from maskformer.objectives.denoising import denoising
from maskformer.objectives.diffusion import diffusion
from maskformer.objectives.electra import electra
from maskformer.objectives.mixture import Mixture, mixture
from maskformer.objectives.mlm import conditional_mlm, mlm, ngram_mlm, pmi_mlm, span_mlm
from maskformer.objectives.objective import Objective
from maskformer.objectives.sequence import causal_lm, fim, prefix_lm
from maskformer.objectives.span_corruption import span_corruption, ul2
from maskformer.objectives.translation import masked_source
from maskformer.objectives.vocabulary import Vocabulary


def mixture_of(vocabulary: Vocabulary, length: int, *, parts: Iterable[Mapping[str, Any]] = ()) -> Mixture:
    """A `mixture` written as data.

    Args:
      parts: mappings with `name`, an optional `weight` (a number or a schedule) and that objective's parameters.

    >>> vocabulary = Vocabulary(size=100, pad=0, mask=4)
    >>> mixture_of(vocabulary, 16, parts=[{"name": "mlm", "weight": 3}, {"name": "causal_lm"}]).budget
    16
    """
    built, weights = [], []
    for part in parts:
        if not isinstance(part, Mapping) or "name" not in part:
            raise ValueError(f"mixture part {part!r}: expected a mapping such as {{'name': 'mlm', 'weight': 1}}")
        part = dict(part)
        weights.append(part.pop("weight", 1.0))
        built.append(create(part.pop("name"), vocabulary, length, **part))
    return mixture(built, weights)


BUILDERS: dict[str, Callable[..., Any]] = {
    "mlm": mlm,
    "span_mlm": span_mlm,
    "ngram_mlm": ngram_mlm,
    "pmi_mlm": pmi_mlm,
    "conditional_mlm": conditional_mlm,
    "causal_lm": causal_lm,
    "prefix_lm": prefix_lm,
    "fim": fim,
    "span_corruption": span_corruption,
    "ul2": ul2,
    "diffusion": diffusion,
    "electra": electra,
    "denoising": denoising,
    "masked_source": masked_source,
    "mixture": mixture_of,
}

# Settings of reference implementations, by name; each stands for a builder and its parameters.
COMPAT: dict[str, Convention] = {
    **CONVENTIONS,
    "electra": Convention(
        "electra", {"rate": 0.15, "replacement": (0.85, 0.0, 0.15), "discriminator_weight": 50.0},
        "google-research/electra pretrain_helpers.py (Clark et al. 2020)",
    ),
}


def builder(function: Callable[..., Objective]) -> Callable[..., Objective]:
    """Registers an objective of one's own under its function's name, for configs: ``objective.name``.

    Args:
      function: ``(vocabulary, length, *, ...) -> Objective``; the further parameters are the config's keys.

    Raises:
      ValueError: the name is taken by one of ours, or the function takes no vocabulary and length.

    >>> @builder
    ... def light_mlm(vocabulary, length, *, rate=0.05):
    ...     return mlm(vocabulary, length, rate=rate)
    >>> create("light_mlm", Vocabulary(size=100, pad=0, mask=4), 128).budget
    6
    >>> del BUILDERS["light_mlm"]
    """
    name = function.__name__
    if name in COMPAT or (name in BUILDERS and BUILDERS[name].__module__.startswith("maskformer.")):
        raise ValueError(f"objective '{name}' is there already: give the function another name")
    if list(inspect.signature(function).parameters)[:2] != ["vocabulary", "length"]:
        raise ValueError(f"objective '{name}': its function's first parameters must be vocabulary and length")
    BUILDERS[name] = function
    return function


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """The parameters that the objective `name` takes beyond vocabulary and length."""
    return dict(list(inspect.signature(BUILDERS[name]).parameters.items())[2:])


def create(name: str, vocabulary: Vocabulary, length: int, **params: Any) -> Objective:
    """Builds the objective `name` for rows of `length` tokens.

    Args:
      name: a key of `BUILDERS`, or a key of `COMPAT`, which stands for a builder and the settings of a reference
        implementation.
      vocabulary: special ids and size of the tokenizer.
      length: tokens per row, L.
      **params: of that objective; every one is checked here, before any device work.

    Raises:
      ValueError: an unknown name or parameter (naming the nearest), or a bad value.

    >>> vocabulary = Vocabulary(size=100, pad=0, unk=1, cls=2, sep=3, mask=4)
    >>> create("mlm", vocabulary, 128, rate=0.15).budget
    19
    >>> create("roberta", vocabulary, 128).budget
    20
    >>> create("mixture", vocabulary, 128, parts=[{"name": "mlm", "weight": 3}, {"name": "causal_lm"}]).budget
    128
    >>> create("mlm", vocabulary, 128, rate=1.2)
    Traceback (most recent call last):
    ...
    ValueError: rate=1.2: expected a fraction between 0 and 1
    """
    if name in COMPAT:
        params = {**COMPAT[name].params, **params}
        name = COMPAT[name].objective
    if name not in BUILDERS:
        known = list(dict.fromkeys([*BUILDERS, *COMPAT]))
        raise ValueError(f"objective '{name}' is unknown{_nearest(name, known)} (known: {', '.join(known)})")
    known_parameters = parameters(name)
    for key in params:
        if key not in known_parameters:
            raise ValueError(
                f"objective '{name}' has no parameter '{key}'{_nearest(key, known_parameters)} "
                f"(it takes {', '.join(known_parameters)})"
            )
    return BUILDERS[name](vocabulary, length, **params)
