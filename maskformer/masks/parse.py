"""Masks as text: ``"causal & (window(1024) | sinks(4)) & segments"``, both ways.

The language is Python's expression syntax cut down to ``& | ~``, parentheses, and builder calls whose arguments
are numbers, tuples, ``True False None``, masks, or names. A name stands for an array (or a function) that is
given when parsing, ``parse(text, segment_ids=ids)``, or later, ``parse(text).bind(segment_ids=ids)``: a config
holds the text, and the model binds the batch's arrays while it is being traced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from maskformer.checks import nearest, shown
from maskformer.masks.builders import NAMES, Builder
from maskformer.masks.expression import Mask, all_of, any_of, pytree
from maskformer.masks.writing import Reference

_TOKEN = re.compile(
    r"(?P<number>-?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?)|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<string>'[^']*'|\"[^\"]*\")|(?P<symbol>[&|~(),=\[\]])"
)
_CONSTANTS = {"True": True, "False": False, "None": None}

DEEPEST = 64
"""Parentheses, calls and lists within each other, at most: whoever walks a mask does so by recursion."""

LONGEST_INTEGER = 1000
"""Digits of a number, at most; Python reads no more than 4300."""


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
        raise ValueError(f"masks.parse takes the text of a mask; got {type(text).__name__} {shown(text)}")
    parser = _Parser(text)
    mask = parser.mask()
    named = mask.unbound
    unknown = sorted(set(arrays) - set(named))
    if unknown:
        near = _nearest(unknown[0], named)
        raise MaskSyntaxError(
            f"mask {shown(text)}: no array named {shown(unknown[0])} in the text"
            + (near or (f"; it names {', '.join(named)}" if named else "; it names none"))
        )
    return mask.bind(**arrays)


class _Parser:
    def __init__(self, text: str):
        self.text = text
        self.tokens = list(self._scan())
        self.at = 0
        self.depth = 0

    def mask(self) -> Mask:
        mask = self.union()
        if self.peek() in ("and", "or", "not"):
            self.fail(f"masks combine with & | ~, not {self.peek()!r}")
        if self.peek() != "":
            self.fail(f"unexpected {shown(self.peek())}")
        return mask

    # --- grammar --------------------------------------------------------------------------------------------

    def union(self) -> Mask:
        masks = [self.intersection()]
        while self.accept("|"):
            masks.append(self.intersection())
        return any_of(masks)

    def intersection(self) -> Mask:
        masks = [self.term()]
        while self.accept("&"):
            masks.append(self.term())
        return all_of(masks)

    def term(self) -> Mask:
        inverted = False
        while self.accept("~"):
            inverted = not inverted
        mask = self.operand()
        return ~mask if inverted else mask

    def operand(self) -> Mask:
        if self.peek() == "(":
            with self.inside():
                self.at += 1
                mask = self.union()
                self.expect(")")
            return mask
        kind, word, column = self.tokens[self.at]
        if kind != "name":
            self.fail("expected a mask" + _found(word))
        if word not in NAMES:
            if word in ("and", "or", "not"):
                self.fail(f"masks combine with & | ~, not {word!r}")
            self.fail(f"unknown mask {shown(word)}", _nearest(word, NAMES))
        self.at += 1
        return self.call(NAMES[word], word, column)

    def call(self, entry: Builder, word: str, column: int) -> Mask:
        positional, named = self.arguments(entry, word) if self.peek() == "(" else ([], {})
        try:
            bound = entry.signature.bind_partial(*positional, **named)
        except TypeError as error:
            self.fail(f"{word}(): {_line(error)}", column=column)
        required = [key for key in entry.references if entry.parameters[key].default is inspect.Parameter.empty]
        optional = [] if required or bound.arguments else list(entry.references)[:1]
        for key in required + optional:
            if key not in bound.arguments:
                named[key] = Reference(entry.references[key])
        try:
            bound = entry.signature.bind(*positional, **named)
            self.check_references(entry, word, bound.arguments, column)
            return build(entry, bound.args, bound.kwargs)
        except MaskSyntaxError:
            raise
        except (TypeError, ValueError) as error:
            self.fail(f"{word}: {_line(error).removeprefix(entry.name + ': ')}", column=column)

    def arguments(self, entry: Builder, word: str) -> tuple[list[Any], dict[str, Any]]:
        positional: list[Any] = []
        named: dict[str, Any] = {}
        with self.inside():
            self.at += 1
            while not self.accept(")"):
                kind, name, _ = self.tokens[self.at]
                if kind == "name" and self.tokens[self.at + 1][1] == "=":
                    if name not in entry.parameters:
                        self.fail(f"{word}() has no argument {shown(name)}", _nearest(name, entry.parameters))
                    if name in named:
                        self.fail(f"{word}(): {shown(name)} is given twice")
                    self.at += 2
                    named[name] = self.value(entry.parameters[name])
                else:
                    if named:
                        self.fail(f"{word}(): an argument without a name follows a named one")
                    positional.append(self.value(_nth(entry.parameters, len(positional))))
                if self.peek() != ")":
                    self.expect(",")
        return positional, named

    def check_references(self, entry: Builder, word: str, arguments: Mapping[str, Any], column: int) -> None:
        for key, value in arguments.items():
            named = list(_references(value))
            variadic = entry.parameters[key].kind is inspect.Parameter.VAR_POSITIONAL
            if named and key not in entry.references and not variadic:
                self.fail(f"{word}(): {key!r} takes a value, not the name {shown(named[0])}", column=column)

    def value(self, parameter: inspect.Parameter | None) -> Any:
        if _takes_mask(parameter) and self.peek() != "[":
            return self.union()
        kind, word, _ = self.tokens[self.at]
        if word in ("(", "["):
            return self.sequence(")" if word == "(" else "]", parameter)
        if kind not in ("number", "string", "name"):
            self.fail("expected a number, a name or a tuple" + _found(word))
        if kind == "number":
            value = self.number(word)
        elif kind == "string":
            value = word[1:-1]
        else:
            value = _CONSTANTS[word] if word in _CONSTANTS else Reference(word)
        self.at += 1
        return value

    def number(self, word: str) -> int | float:
        if not word.lstrip("-").isdecimal():
            return float(word)
        if len(word) > LONGEST_INTEGER:
            self.fail(f"a number of {len(word)} digits; expected at most {LONGEST_INTEGER}")
        return int(word)

    def sequence(self, closing: str, parameter: inspect.Parameter | None) -> tuple[Any, ...]:
        values = []
        with self.inside():
            self.at += 1
            while not self.accept(closing):
                values.append(self.value(parameter))
                if self.peek() != closing:
                    self.expect(",")
        return tuple(values)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """One level deeper."""
        self.depth += 1
        if self.depth > DEEPEST:
            self.fail(f"nested more than {DEEPEST} deep")
        yield
        self.depth -= 1

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
                    f"mask {shown(self.text)}: unexpected character {shown(self.text[column])} at column {column}"
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
            self.fail(f"expected {symbol!r}" + _found(self.peek()))

    def fail(self, message: str, hint: str = "", column: int | None = None) -> NoReturn:
        column = self.tokens[self.at][2] if column is None else column
        raise MaskSyntaxError(f"mask {shown(self.text)}: {message} at column {column}{hint}")


def _found(word: str) -> str:
    return f", found {shown(word)}" if word else ", found the end"


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())


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
        raise ValueError(f"mask {shown(self)} needs {', '.join(map(repr, names))}: call mask.bind({example}) first")

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
        raise ValueError(
            f"{entry.name}: the builder returned a {type(mask).__name__}, not a mask; a function of (q, k) becomes one "
            "by masks.predicate(function)"
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


def _nearest(word: str, candidates: Iterable[str]) -> str:
    return nearest(word.lower(), candidates, cutoff=0.5)
