"""Masks as text: the other half of ``parse``. What has a text writes itself, by the help of a ``Writer``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from maskformer.masks.builders import BUILDERS, KEYWORD_ONLY


@dataclasses.dataclass(frozen=True)
class Reference:
    """A name in a mask's text that stands for an array or function given later."""

    name: str

    def __repr__(self) -> str:
        return self.name


class Writable:
    """What has a text of its own: a mask."""

    joined: ClassVar[bool] = False
    """Whether the text has operators outside of parentheses, and needs some to be an operand."""

    def write(self, writer: Writer) -> str:
        """The text, naming arrays and functions through ``writer``."""
        raise NotImplementedError


class Writer:
    """Writes the text that ``parse`` reads, collecting what the text refers to by name.

    Attributes:
      named: what the text refers to.
    """

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        """``reserved`` names stand for something else: those that the mask leaves open."""
        self.named: dict[str, Any] = {}
        self._reserved = frozenset(reserved)
        self._names: dict[tuple[str, int], str] = {}
        self._counts: dict[str, int] = {}

    def operand(self, term: Writable) -> str:
        return f"({term.write(self)})" if term.joined else term.write(self)

    def join(self, symbol: str, terms: Iterable[Writable]) -> str:
        return f" {symbol} ".join(map(self.operand, terms))

    def call(self, builder: str, arguments: Iterable[tuple[str | None, Any]]) -> str:
        """A builder's name and its arguments, ``(parameter, value)`` each."""
        entry = BUILDERS[builder]
        written: list[str] = []
        positional = True
        order = list(entry.parameters.values())
        for index, (key, value) in enumerate(arguments):
            # An argument needs its name only once one before it was left out, or where only a name will do.
            expected = order[min(index, len(order) - 1)]
            positional = positional and (key is None or (expected.name == key and expected.kind != KEYWORD_ONLY))
            text = self.value(value, entry.references.get(key or "", key or "array"))
            written.append(text if positional or key is None else f"{key}={text}")
        return f"{builder}({', '.join(written)})" if written else builder

    def value(self, value: Any, suggestion: str) -> str:
        if isinstance(value, Writable):
            return value.write(self)
        if isinstance(value, tuple):
            inside = [self.value(item, suggestion) for item in value]
            return f"({', '.join(inside)}{',' if len(inside) == 1 else ''})"
        if value is None or isinstance(value, (bool, int, float, str, Reference)):
            return repr(value)
        if callable(value):
            name = getattr(value, "__name__", "")
            suggestion = name if name.isidentifier() else "fn"
        return self._name(value, suggestion)

    def _name(self, value: Any, suggestion: str) -> str:
        """The suggestion, or the first of ``suggestion_2``, ``suggestion_3``, ... that names nothing else."""
        known = suggestion, id(value)
        if known not in self._names:
            number = self._counts.get(suggestion, 1)
            name = suggestion if number == 1 else f"{suggestion}_{number}"
            while name in self._reserved or (name in self.named and self.named[name] is not value):
                number += 1
                name = f"{suggestion}_{number}"
            self.named[name], self._names[known], self._counts[suggestion] = value, name, number
        return self._names[known]
