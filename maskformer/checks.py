"""Checks of what users write: one line that names the field, its value, what was expected and, where one is near, the
name that was probably meant.

The ground floor: it imports nothing of maskformer, and every package may import it.
"""

from __future__ import annotations

import difflib
import functools
import numbers
import os
import sys
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

# A value may be a whole file by mistake; an error is to be one line that can be read.
LONGEST_SHOWN = 120
LONGEST_LINE = 500


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    r"""`text` on one line: what cannot be printed escaped, and cut in the middle where it is long.

    >>> one_line("two\nlines")
    'two\\nlines'
    """
    text = printable(text)
    if len(text) <= longest:
        return text
    half = (longest - 5) // 2
    return f"{text[: longest - half - 5]} ... {text[-half:]}"


def shown(value: Any) -> str:
    r"""`repr(value)` for an error message: one line, and cut in the middle where it is long.

    >>> shown("two\nlines"), shown(0.5)
    ("'two\\nlines'", '0.5')
    >>> len(shown("x" * 3000))
    120
    """
    try:
        text = repr(value)
    except RecursionError:
        text = f"<{type(value).__name__} nested too deeply to show>"
    except ValueError:
        # Python refuses to write out integers of thousands of digits.
        text = f"<{type(value).__name__} with too many digits to show>"
    # repr escapes what a string holds, but not what the repr of another object does.
    return one_line(text, LONGEST_SHOWN)


def printable(text: str | os.PathLike[str]) -> str:
    r"""A text or a path as one line that a terminal only shows: what it would obey, such as an escape sequence, is
    written out, and so is a byte of a name that is no UTF-8.

    >>> print(printable("a\x1b[31mred\n"), printable("naïve ◌́"), printable(os.fsdecode(b"caf\xe9.txt")))
    a\x1b[31mred\n naïve ◌́ caf\xe9.txt
    """
    return "".join(character if character.isprintable() else _written_out(character) for character in os.fspath(text))


def first_line(error: BaseException) -> str:
    r"""What an error of another library says: the first line of it, or its kind where it says nothing.

    >>> first_line(KeyError()), first_line(RuntimeError("\nno such array\nTraceback ..."))
    ('KeyError', 'no such array')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def origin(error: BaseException) -> str:
    """`FILE:LINE: ` of the user's own code that raised `error` when we called it, or nothing where it was ours.

    A recipe's mask, objective, task or measure runs inside of ours; its mistakes are to be found where it is written.
    """
    ours = os.path.dirname(os.path.abspath(__file__)) + os.sep
    libraries = tuple(os.path.abspath(path) + os.sep for path in set(sysconfig.get_paths().values()))
    seen_ours, found = False, ""
    # An error that was given another name on the way, as of a key of the config, still has the one it began as.
    frames = traceback.extract_tb(error.__traceback__)
    cause = error.__cause__
    while cause is not None:
        frames, cause = [*frames, *traceback.extract_tb(cause.__traceback__)], cause.__cause__
    for frame in frames:
        file = os.path.abspath(frame.filename)
        if file.startswith(ours):
            seen_ours = True
        elif seen_ours and not file.startswith(libraries) and not frame.filename.startswith("<"):
            found = f"{os.path.relpath(file) if len(os.path.relpath(file)) < len(file) else file}:{frame.lineno}: "
    return found


def _written_out(character: str) -> str:
    # Python keeps a byte that is no UTF-8 as half of a surrogate pair.
    is_byte = "\udc80" <= character <= "\udcff"
    return f"\\x{ord(character) & 0xFF:02x}" if is_byte else repr(character)[1:-1]


def closest(word: Any, known: Iterable[Any], cutoff: float = 0.6) -> str | None:
    """The one of `known` that was probably meant, or None.

    >>> closest("windw", ["window", "causal"]), closest("x", ["window", "causal"])
    ('window', None)
    """
    # Beyond some length nothing is near, and the comparison would take seconds.
    text = str(word)
    close = difflib.get_close_matches(text, [str(name) for name in known], 1, cutoff) if len(text) < 200 else []
    return close[0] if close else None


def nearest(word: Any, known: Iterable[Any], cutoff: float = 0.6) -> str:
    """The end of an error message that names the one of `known` that was probably meant, or nothing.

    >>> nearest("windw", ["window", "causal"])
    "; did you mean 'window'?"
    >>> nearest("x", ["window", "causal"])
    ''
    """
    close = closest(word, known, cutoff)
    return "" if close is None else f"; did you mean {close!r}?"


def require(ok: bool, field: str, value: Any, expected: str) -> None:
    """Raise the one-line `ValueError` of a field unless `ok`.

    >>> require(False, "train.steps", 0, "at least 1")
    Traceback (most recent call last):
        ...
    ValueError: train.steps=0: expected at least 1
    """
    if not ok:
        raise ValueError(f"{field}={shown(value)}: expected {expected}")


def choose(field: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise unless `value` is one of `allowed`, naming the nearest.

    >>> choose("model.norm", "rmsnrom", ("layernorm", "rmsnorm"))
    Traceback (most recent call last):
        ...
    ValueError: model.norm='rmsnrom': expected one of layernorm, rmsnorm; did you mean 'rmsnorm'?
    """
    allowed = tuple(allowed)
    expected = f"one of {', '.join(map(str, allowed))}{nearest(value, allowed, cutoff=0.4)}"
    # By hand: a value that cannot be compared, such as an array, is none of them.
    require(any(type(value) is type(one) and value == one for one in allowed), field, value, expected)


def integer(field: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int of at least `least` (and at most `most`).

    >>> integer("model.layers", 2.5, 1)
    Traceback (most recent call last):
        ...
    ValueError: model.layers=2.5: expected an integer of at least 1
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    above = whole and most is not None and value > most
    bound = f"at most {most}" if above else f"at least {least}"
    require(whole and value >= least and not above, field, value, f"an integer of {bound}")
    return value


def number(
    field: str, value: Any, expected: str, low: float, high: float, *, open_low: bool = False, closed: bool = False
) -> float:
    """`value` as a float in [low, high), (low, high) with `open_low`, or [low, high] with `closed`.

    NaN is in no interval.

    Args:
      expected: the interval in words.

    >>> number("optimizer.b1", 1.5, "a decay in [0, 1)", 0.0, 1.0)
    Traceback (most recent call last):
        ...
    ValueError: optimizer.b1=1.5: expected a decay in [0, 1)
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    above = real and (low < value if open_low else low <= value)
    # An integer beyond all floats is below infinity, and still no number to compute with.
    within = above and value < sys.float_info.max and (value <= high if closed else value < high)
    require(within, field, value, expected)
    return float(value)


def typed(field: str, value: Any, annotation: Any) -> None:
    """Raise unless `value` is of a type that `annotation` allows.

    A list may stand for a tuple, as it does in JSON; anything with a length for a `Sequence`; an int for a float. What
    is within a mapping, or a type that is not known here, is not looked at.

    >>> typed("train.steps", 1.5, int)
    Traceback (most recent call last):
        ...
    ValueError: train.steps=1.5: expected an integer, got float
    >>> typed("model.mask", ["causal", 3], str | tuple[str, ...])
    Traceback (most recent call last):
        ...
    ValueError: model.mask=['causal', 3]: expected a string or a list of strings, got list
    """
    if not _is_a(value, annotation):
        expected = " or ".join(map(_in_words, _options(annotation)))
        require(False, field, value, f"{expected}, got {type(value).__name__}")


def typed_fields(made: Any, section: str, skip: Iterable[str] = ()) -> None:
    """`typed` for every field of the dataclass instance `made` but those to `skip`, named `section.field`."""
    for name, annotation in _annotations(type(made)).items():
        if name not in skip:
            typed(f"{section}.{name}", getattr(made, name), annotation)


_annotations: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def _options(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _is_a(value: Any, annotation: Any) -> bool:
    options = _options(annotation)
    if len(options) > 1:
        return any(_is_a(value, option) for option in options)
    if annotation is Any:
        return True
    if annotation in (int, float):
        kind = numbers.Integral if annotation is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    origin, items = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if isinstance(origin, type) and issubclass(origin, Iterable) and origin is not str and items:
        several = isinstance(value, list | tuple) if origin is tuple else isinstance(value, Iterable)
        several &= isinstance(value, Sized) or origin is Iterable
        if not several or isinstance(value, str | bytes | Mapping):
            return False
        return not isinstance(value, list | tuple) or all(_is_a(item, items[0]) for item in value)
    return isinstance(value, origin) if isinstance(origin, type) else True


_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "True or False", types.NoneType: "None"}


def _in_words(annotation: Any) -> str:
    origin, items = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is Mapping:
        return "a mapping such as {}"
    if items:
        return f"a list of {_WORDS.get(items[0], 'a value').split()[-1]}s"
    return _WORDS.get(annotation, getattr(origin, "__name__", str(origin)))
