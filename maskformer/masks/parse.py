"""Masks as text: ``"causal & (window(1024) | sinks(4)) & segments"``, both ways.

The language is Python's expression syntax cut down to ``& | ~``, parentheses, and builder calls whose arguments
are numbers, tuples, ``True False None``, masks, or names. A name stands for an array (or a function) that is
given when parsing, ``parse(text, segment_ids=ids)``, or later, ``parse(text).bind(segment_ids=ids)``: a config
holds the text, and the model binds the batch's arrays while it is being traced.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from maskformer.masks.expression import Mask, pytree
from maskformer.masks.registry import NAMES, Builder
from maskformer.masks.writing import Reference

_TOKEN = re.compile(
    r"(?P<number>-?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?)|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<string>'[^']*'|\"[^\"]*\")|(?P<symbol>[&|~(),=\[\]])"
)
_CONSTANTS = {"True": True, "False": False, "None": None}


class MaskSyntaxError(ValueError):
    """The text of a mask is wrong; the message points at the column and names the nearest valid word."""


def parse(text: str, **arrays: Any) -> Mask:
    """Reads a mask from its text.

    Precedence is Python's: ``~`` binds tightest, then ``&``, then ``|``. So ``causal & window(8) | sinks(4)``
    lets early queries see later sinks; write ``causal & (window(8) | sinks(4))``.

    Args:
      text: the mask, e.g. ``"causal & window(256) & segments"``. A builder without arguments needs no
        parentheses; one that needs an array takes it by its usual name (``segments`` is
        ``segments(segment_ids)``, ``key_padding`` is ``key_padding(valid)``) unless another is written.
      **arrays: values for names in the text. What is not given stays a placeholder, listed by
        ``mask.unbound`` and filled by ``mask.bind(name=array)``.

    Raises:
      MaskSyntaxError: with the column and the nearest valid name.

    >>> parse("causal & window(2)")
    causal & sliding_window(2)
    >>> mask = parse("causal & segments")
    >>> mask.unbound
    ('segment_ids',)
    >>> import numpy as np
    >>> mask.bind(segment_ids=np.array([1, 1, 2])).dense(3, 3).astype(int)
    Array([[1, 0, 0],
           [1, 1, 0],
           [0, 0, 1]], dtype=int32)
    >>> parse("causal & windw(4)")
    Traceback (most recent call last):
      ...
    maskformer.masks.parse.MaskSyntaxError: mask 'causal & windw(4)': unknown mask 'windw' at column 9; did you
    mean 'window'?
    """
    if not isinstance(text, str):
        raise TypeError(f"masks.parse takes the text of a mask; got {type(text).__name__}")
    parser = _Parser(text)
    mask = parser.mask()
    unknown = sorted(set(arrays) - set(mask.unbound))
    if unknown:
        near = _nearest(unknown[0], mask.unbound)
        raise MaskSyntaxError(
            f"mask {text!r}: no array named {unknown[0]!r} in the text"
            + (near or (f"; it names {', '.join(mask.unbound)}" if mask.unbound else "; it names none"))
        )
    return mask.bind(**arrays)


class _Parser:
    def __init__(self, text: str):
        self.text = text
        self.tokens = list(self._scan())
        self.at = 0

    def mask(self) -> Mask:
        mask = self.any_of()
        if self.peek() in ("and", "or", "not"):
            self.fail(f"masks combine with & | ~, not {self.peek()!r}")
        if self.peek() != "":
            self.fail(f"unexpected {self.peek()!r}")
        return mask

    # --- grammar --------------------------------------------------------------------------------------------

    def any_of(self) -> Mask:
        mask = self.all_of()
        while self.accept("|"):
            mask = mask | self.all_of()
        return mask

    def all_of(self) -> Mask:
        mask = self.term()
        while self.accept("&"):
            mask = mask & self.term()
        return mask

    def term(self) -> Mask:
        if self.accept("~"):
            return ~self.term()
        if self.accept("("):
            mask = self.any_of()
            self.expect(")")
            return mask
        kind, word, column = self.tokens[self.at]
        if kind != "name":
            self.fail("expected a mask" + (f", found {word!r}" if word else ", found the end"))
        if word not in NAMES:
            if word in ("and", "or", "not"):
                self.fail(f"masks combine with & | ~, not {word!r}")
            self.fail(f"unknown mask {word!r}", _nearest(word, NAMES))
        self.at += 1
        return self.call(NAMES[word], word, column)

    def call(self, entry: Builder, word: str, column: int) -> Mask:
        positional: list[Any] = []
        named: dict[str, Any] = {}
        if self.accept("("):
            while not self.accept(")"):
                kind, name, _ = self.tokens[self.at]
                if kind == "name" and self.tokens[self.at + 1][1] == "=":
                    if name not in entry.parameters:
                        self.fail(f"{word}() has no argument {name!r}", _nearest(name, entry.parameters))
                    if name in named:
                        self.fail(f"{word}(): {name!r} is given twice")
                    self.at += 2
                    named[name] = self.value(entry.parameters[name])
                else:
                    if named:
                        self.fail(f"{word}(): an argument without a name follows a named one")
                    positional.append(self.value(_nth(entry.parameters, len(positional))))
                if self.peek() != ")":
                    self.expect(",")
        try:
            bound = inspect.signature(entry.function).bind_partial(*positional, **named)
        except TypeError as error:
            self.fail(f"{word}(): {error}", column=column)
        required = [key for key in entry.references if entry.parameters[key].default is inspect.Parameter.empty]
        optional = [] if required or bound.arguments else list(entry.references)[:1]
        for key in required + optional:
            if key not in bound.arguments:
                named[key] = Reference(entry.references[key])
        try:
            bound = inspect.signature(entry.function).bind(*positional, **named)
            self.check_references(entry, word, bound.arguments, column)
            return build(entry, bound.args, bound.kwargs)
        except (TypeError, ValueError) as error:
            if isinstance(error, MaskSyntaxError):
                raise
            self.fail(f"{word}: {str(error).removeprefix(entry.name + ': ')}", column=column)

    def check_references(self, entry: Builder, word: str, arguments: Mapping[str, Any], column: int) -> None:
        for key, value in arguments.items():
            named = list(_references(value))
            variadic = entry.parameters[key].kind is inspect.Parameter.VAR_POSITIONAL
            if named and key not in entry.references and not variadic:
                self.fail(f"{word}(): {key!r} takes a value, not the name {named[0]!r}", column=column)

    def value(self, parameter: inspect.Parameter | None) -> Any:
        if _takes_mask(parameter):
            if self.accept("["):
                return self.sequence("]", parameter)
            return self.any_of()
        kind, word, _ = self.tokens[self.at]
        self.at += 1
        if kind == "number":
            return int(word) if re.fullmatch(r"-?\d+", word) else float(word)
        if kind == "string":
            return word[1:-1]
        if kind == "name":
            return _CONSTANTS[word] if word in _CONSTANTS else Reference(word)
        if word in "([" and word:
            return self.sequence(")" if word == "(" else "]", parameter)
        self.at -= 1
        self.fail("expected a number, a name or a tuple" + (f", found {word!r}" if word else ", found the end"))

    def sequence(self, closing: str, parameter: inspect.Parameter | None) -> tuple[Any, ...]:
        values = []
        while not self.accept(closing):
            values.append(self.value(parameter))
            if self.peek() != closing:
                self.expect(",")
        return tuple(values)

    # --- tokens ---------------------------------------------------------------------------------------------

    def _scan(self) -> Iterator[tuple[str, str, int]]:
        column = 0
        while column < len(self.text):
            if self.text[column].isspace():
                column += 1
                continue
            match = _TOKEN.match(self.text, column)
            if match is None:
                raise MaskSyntaxError(
                    f"mask {self.text!r}: unexpected character {self.text[column]!r} at column {column}"
                )
            yield match.lastgroup or "", match.group(), column
            column = match.end()
        yield "end", "", column

    def peek(self) -> str:
        return self.tokens[self.at][1]

    def accept(self, symbol: str) -> bool:
        if self.peek() != symbol:
            return False
        self.at += 1
        return True

    def expect(self, symbol: str) -> None:
        if not self.accept(symbol):
            self.fail(f"expected {symbol!r}" + (f", found {self.peek()!r}" if self.peek() else ", found the end"))

    def fail(self, message: str, hint: str = "", column: int | None = None) -> NoReturn:
        column = self.tokens[self.at][2] if column is None else column
        raise MaskSyntaxError(f"mask {self.text!r}: {message} at column {column}{hint}")


# --- placeholders -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slot:
    """The place of a mask among a builder's arguments."""

    index: int


@functools.partial(pytree, data=["masks"], static=["builder", "positional", "named"])
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Unbound(Mask):
    """A builder call that waits for the arrays it names; ``bind`` makes the mask.

    The masks among its arguments are its children, and may wait for arrays of their own.
    """

    builder: str
    positional: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]
    masks: tuple[Mask, ...]

    @classmethod
    def call(cls, builder: str, positional: Iterable[Any], named: Mapping[str, Any]) -> Unbound:
        found: list[Mask] = []

        def slot(value: Any) -> Any:
            if not isinstance(value, Mask):
                return tuple(map(slot, value)) if isinstance(value, tuple) else value
            found.append(value)
            return _Slot(len(found) - 1)

        positional = tuple(map(slot, positional))
        return cls(builder, positional, tuple((name, slot(value)) for name, value in named.items()), tuple(found))

    def children(self) -> tuple[Mask, ...]:
        return self.masks

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        return dataclasses.replace(self, masks=tuple(children))

    def leaves(self) -> Iterator[Mask]:
        yield self
        for child in self.masks:
            yield from child.leaves()

    def names(self) -> tuple[str, ...]:
        values = list(self.positional) + [value for _, value in self.named]
        return tuple(dict.fromkeys(name for value in values for name in _references(value)))

    def bind(self, **arrays: Any) -> Mask:
        masks = tuple(mask.bind(**arrays) for mask in self.masks)
        if not set(self.names()) <= set(arrays):
            return self.rebuild(masks)
        positional = tuple(_replace(value, arrays, masks) for value in self.positional)
        named = {name: _replace(value, arrays, masks) for name, value in self.named}
        return build(NAMES[self.builder], positional, named)

    def attend(self, q: Any, k: Any) -> Any:
        self.refuse()

    def check_lengths(self, q_len: int, kv_len: int, q_offset: Any = 0) -> None:
        self.refuse()

    def select(self, b: Any = 0, h: Any = 0) -> Mask:
        self.refuse()

    def refuse(self) -> NoReturn:
        names = self.unbound
        example = ", ".join(f"{name}=..." for name in names)
        raise ValueError(f"mask {self!r} needs {', '.join(map(repr, names))}: call mask.bind({example}) first")

    def spell(self) -> tuple[str, list[tuple[str | None, Any]]]:
        written: list[tuple[str | None, Any]] = [(None, value) for value in self.positional]
        return self.builder, [(name, _replace(value, {}, self.masks)) for name, value in (*written, *self.named)]


def build(entry: Builder, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Mask:
    """Calls the builder, or keeps the call for later where a reference is still open."""
    values = list(positional) + list(named.values())
    if any(True for value in values for _ in _references(value)):
        return Unbound.call(entry.name, positional, named)
    mask = entry.function(*positional, **named)
    if not isinstance(mask, Mask):
        raise TypeError(
            f"the builder returned a {type(mask).__name__}, not a mask; a function of (q, k) becomes one by "
            "masks.predicate(function)"
        )
    return mask


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Reference):
        yield value.name
    elif isinstance(value, tuple):
        for item in value:
            yield from _references(item)


def _replace(value: Any, arrays: Mapping[str, Any], masks: tuple[Mask, ...]) -> Any:
    if isinstance(value, _Slot):
        return masks[value.index]
    if isinstance(value, Reference):
        return arrays.get(value.name, value)
    return tuple(_replace(item, arrays, masks) for item in value) if isinstance(value, tuple) else value


def _takes_mask(parameter: inspect.Parameter | None) -> bool:
    """Whether a builder's parameter is annotated as a mask, by the class or by its name."""
    annotation = None if parameter is None else parameter.annotation
    return annotation is Mask or (isinstance(annotation, str) and annotation.rpartition(".")[2] == "Mask")


def _nth(parameters: Mapping[str, inspect.Parameter], index: int) -> inspect.Parameter | None:
    ordered = list(parameters.values())
    if ordered and ordered[-1].kind is inspect.Parameter.VAR_POSITIONAL:
        index = min(index, len(ordered) - 1)
    return ordered[index] if index < len(ordered) else None


def _nearest(word: str, candidates: Any) -> str:
    near = difflib.get_close_matches(word.lower(), list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
