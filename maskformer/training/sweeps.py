"""Sweeps: generators of override dicts such as `{"optimizer.learning_rate": 1e-3}`, and their combinations.

A recipe's `sweep()` or `sweep_<name>()` yields one dict for each run.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_collections

from maskformer.checks import nearest, one_line, shown

Overrides = dict[str, Any]

# Sections whose keys are not listed: `evaluation.objective` takes any parameter of `objective`, `mesh.dcn` an axis.
OPEN_SECTIONS = ("evaluation.objective", "mesh.dcn")


def arms(key: str, values: Iterable[Any]) -> list[Overrides]:
    """One run for each value of one key.

    >>> arms("seed", range(2))
    [{'seed': 0}, {'seed': 1}]
    """
    return [{key: value} for value in values]


def product(*sweeps: Iterable[Mapping[str, Any]]) -> Iterator[Overrides]:
    """Every combination; the last sweep varies fastest.

    >>> list(product(arms("seed", [0, 1]), arms("objective.rate", [0.15, 0.4])))[1]
    {'seed': 0, 'objective.rate': 0.4}
    """
    for combination in itertools.product(*map(list, sweeps)):
        yield _merge(combination)


def zipit(*sweeps: Iterable[Mapping[str, Any]]) -> Iterator[Overrides]:
    """The sweeps side by side.

    Raises:
      ValueError: they differ in length.

    >>> list(zipit(arms("model.width", [128, 256]), arms("model.heads", [2, 4])))
    [{'model.width': 128, 'model.heads': 2}, {'model.width': 256, 'model.heads': 4}]
    """
    for combination in zip(*sweeps, strict=True):
        yield _merge(combination)


def chainit(*sweeps: Iterable[Mapping[str, Any]]) -> Iterator[Overrides]:
    """The sweeps one after another.

    >>> list(chainit(arms("seed", [0]), arms("train.steps", [5])))
    [{'seed': 0}, {'train.steps': 5}]
    """
    for sweep in sweeps:
        for overrides in sweep:
            yield dict(overrides)


def apply(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A copy of `config` with dotted keys replaced.

    Raises:
      ValueError: an unknown key (naming the nearest), or a value of another type than the key's.

    >>> config = ml_collections.ConfigDict({"optimizer": {"learning_rate": 1e-3}})
    >>> apply(config, {"optimizer.learning_rate": 1e-2}).optimizer.learning_rate
    0.01
    >>> apply(config, {"optimizer.learning_rat": 1e-2})
    Traceback (most recent call last):
        ...
    ValueError: config.optimizer.learning_rat: no such key; did you mean 'learning_rate'?
    """
    config = copy.deepcopy(config)
    for key, value in overrides.items():
        kind = key_type(config, key)
        *path, last = key.split(".")
        section = config
        for name in path:
            section = section[name]
        if isinstance(section.get(last), ml_collections.ConfigDict) and kind is not None:
            raise ValueError(f"config.{key}={shown(value)}: a section; set one of {', '.join(section[last])}")
        try:
            section[last] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            # A ConfigDict refuses another type than the key's, and mappings with keys that it could not name.
            expected = kind.__name__ if kind is not None else "a value of another type"
            got = type(value).__name__
            raise ValueError(f"config.{key}={shown(value)}: expected {expected}, got {got}") from error
    return config


def key_type(config: ml_collections.ConfigDict, key: str) -> type | None:
    """The type of the value at a dotted key; None where any is accepted.

    Raises:
      ValueError: there is no such key.
    """
    *path, last = key.split(".")
    section: Any = config
    for depth, name in enumerate([*path, last]):
        if not isinstance(section, ml_collections.ConfigDict) or name not in section:
            if depth and ".".join([*path, last][:depth]) in OPEN_SECTIONS:
                return None
            raise ValueError(f"config.{one_line(key)}: no such key{_nearest_key(section, name)}")
        holder, section = section, section[name]
    kind = holder.get_type(last)
    return None if kind in (object, type(None)) else kind


def _nearest_key(section: Any, name: str) -> str:
    known = list(section) if isinstance(section, ml_collections.ConfigDict) else []
    return nearest(name, known, cutoff=0.5) or (f"; known there: {', '.join(known)}" if known else "")


def _merge(parts: Iterable[Mapping[str, Any]]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        for key, value in part.items():
            if key in merged:
                both = f"{shown(merged[key])} and {shown(value)}"
                raise ValueError(f"sweep key {key!r} is set twice, to {both}; keep one of them")
            merged[key] = value
    return merged
