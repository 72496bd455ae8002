"""From a config to a trained model: state, step, loop, checkpoints, records."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskformer.training.config import default_config, generator_section, objectives_section, resolve
    from maskformer.training.loop import train_and_evaluate
    from maskformer.training.preemption import EX_TEMPFAIL, Preempted
    from maskformer.training.program import Program
    from maskformer.training.recipes import load_config, parse_arg
    from maskformer.training.recorder import NonFiniteError

_HOMES = {
    "EX_TEMPFAIL": "preemption",
    "NonFiniteError": "recorder",
    "Preempted": "preemption",
    "Program": "program",
    "default_config": "config",
    "generator_section": "config",
    "load_config": "recipes",
    "objectives_section": "config",
    "parse_arg": "recipes",
    "resolve": "config",
    "train_and_evaluate": "loop",
}

__all__ = [
    "EX_TEMPFAIL",
    "NonFiniteError",
    "Preempted",
    "Program",
    "default_config",
    "generator_section",
    "load_config",
    "objectives_section",
    "parse_arg",
    "resolve",
    "train_and_evaluate",
]


def __getattr__(name: str) -> Any:
    # On first use, as in `maskformer`: the guard against signals in `preemption` is there before JAX is.
    if name in _HOMES:
        return getattr(importlib.import_module(f"maskformer.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'maskformer.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
