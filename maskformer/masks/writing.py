"""Masks as text: the other half of ``parse``."""

from __future__ import annotations

import dataclasses
from typing import Any

from maskformer.masks.expression import And, Mask, Not, Or
from maskformer.masks.registry import BUILDERS, KEYWORD_ONLY


@dataclasses.dataclass(frozen=True)
class Reference:
    """A name in a mask's text that stands for an array or function given later."""

    name: str

    def __repr__(self) -> str:
        return self.name


class Writer:
    """Writes masks as the text that ``parse`` reads, collecting what the text refers to by name."""

    def __init__(self) -> None:
        self.named: dict[str, Any] = {}

    def mask(self, mask: Mask) -> str:
        if isinstance(mask, (And, Or)):
            return (" & " if isinstance(mask, And) else " | ").join(map(self.operand, mask.terms))
        if isinstance(mask, Not):
            return "~" + self.operand(mask.term)
        name, arguments = mask.spell()
        written, positional = [], True
        order = list(BUILDERS[name].parameters.values())
        for index, (key, value) in enumerate(arguments):
            # An argument needs its name only once one before it was left out, or where only a name will do.
            expected = order[min(index, len(order) - 1)]
            positional = positional and (key is None or (expected.name == key and expected.kind != KEYWORD_ONLY))
            text = self.value(value, BUILDERS[name].references.get(key or "", key or "array"))
            written.append(text if positional or key is None else f"{key}={text}")
        return f"{name}({', '.join(written)})" if written else name

    def operand(self, mask: Mask) -> str:
        return f"({self.mask(mask)})" if isinstance(mask, (And, Or)) else self.mask(mask)

    def value(self, value: Any, suggestion: str) -> str:
        if isinstance(value, Mask):
            return self.mask(value)
        if isinstance(value, tuple):
            inside = [self.value(item, suggestion) for item in value]
            return f"({', '.join(inside)}{',' if len(inside) == 1 else ''})"
        if value is None or isinstance(value, (bool, int, float, str, Reference)):
            return repr(value)
        if callable(value):
            name = getattr(value, "__name__", "")
            suggestion = name if name.isidentifier() else "fn"
        number, name = 1, suggestion
        while name in self.named and self.named[name] is not value:
            number += 1
            name = f"{suggestion}_{number}"
        self.named[name] = value
        return name
