"""The builders by name: what the config-string language can say, and how a mask prints."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Builder:
    """A function that makes a mask, as the string language sees it.

    Attributes:
      name: the function's name, and that of its leaf class in CamelCase where it has one.
      function: the builder.
      references: for each array parameter, the name by which a string refers to it when it says nothing else.
      aliases: other names in the string language.
    """

    name: str
    function: Callable[..., Any]
    references: dict[str, str]
    aliases: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)


KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY

BUILDERS: dict[str, Builder] = {}
NAMES: dict[str, Builder] = {}


def builder(*aliases: str, **references: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a builder under its own name and ``aliases``; ``references`` names its array parameters."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        entry = Builder(function.__name__, function, dict(references), aliases)
        BUILDERS[entry.name] = entry
        for name in (entry.name, *aliases):
            NAMES[name] = entry
        return function

    return register


def builder_name(cls: type) -> str:
    """``SlidingWindow`` is built by ``sliding_window``."""
    return "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__).lstrip("_")
