"""The builders by name: what the config-string language can say, and how a mask prints."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import keyword
import os
import warnings
from collections.abc import Callable
from typing import Any

from maskformer.checks import nearest, shown


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

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.function)

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(self.signature.parameters)


KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY

BUILDERS: dict[str, Builder] = {}
NAMES: dict[str, Builder] = {}


def builder(*aliases: str, **references: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a builder under its own name and ``aliases``; ``references`` names its array parameters.

    Raises:
      ValueError: for a name that is taken by a mask of this package, or that is none; for a parameter that the
        function lacks.

    Warns:
      UserWarning: if another file registered the name.
    """
    if any(callable(alias) for alias in aliases):
        raise ValueError("builder: it decorates with its parentheses, @masks.builder(), which may hold other names")
    for name in (*aliases, *references.values()):
        _check_name(name)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        entry = Builder(function.__name__, function, dict(references), aliases)
        ours = __name__.rpartition(".")[0]
        _check_name(entry.name)
        for parameter in references:
            if parameter not in entry.parameters:
                raise ValueError(
                    f"builder: {entry.name} has no parameter {parameter!r}{nearest(parameter, entry.parameters)}"
                )
        for name in (entry.name, *aliases):
            # A recipe that is read again may register its own once more, but no text changes its meaning.
            taken = NAMES.get(name)
            if taken and taken.function.__module__.startswith(ours) and not function.__module__.startswith(ours):
                raise ValueError(f"builder: {name!r} is a mask of {ours} already; choose another name")
            if taken and _source(taken.function) != _source(function):
                warnings.warn(
                    f"builder: {name!r} of {_source(taken.function)} now means that of {_source(function)}; "
                    "two masks need two names",
                    stacklevel=2,
                )
        BUILDERS[entry.name] = entry
        for name in (entry.name, *aliases):
            NAMES[name] = entry
        return function

    return register


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.isidentifier() or not name.isascii() or keyword.iskeyword(name):
        raise ValueError(f"builder: {shown(name)} cannot be written in a mask's text; expected a name")


def _source(function: Callable[..., Any]) -> str:
    """The file that a function was written in; the module, where there is none (a notebook's cells)."""
    path = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", "")
    return path if os.path.exists(path) else function.__module__


def builder_name(cls: type) -> str:
    """``SlidingWindow`` is built by ``sliding_window``."""
    return "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__).lstrip("_")
