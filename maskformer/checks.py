"""Checks of what users write: one line that names the field, its value, what was expected and, where one is near, the
name that was probably meant.

The ground floor: it imports nothing of maskformer, and every package may import it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

# A value may be a whole file by mistake; an error is to be one line that can be read.
LONGEST_SHOWN = 120


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
    # repr escapes what a string holds, but not what the repr of another object does.
    text = printable(text)
    if len(text) <= LONGEST_SHOWN:
        return text
    half = (LONGEST_SHOWN - 5) // 2
    return f"{text[: LONGEST_SHOWN - half - 5]} ... {text[-half:]}"


def printable(text: str) -> str:
    r"""`text` as one line that a terminal only shows: what it would obey, such as an escape sequence, is written out.

    >>> print(printable("a\x1b[31mred\n"), printable("naïve ◌́"))
    a\x1b[31mred\n naïve ◌́
    """
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def nearest(word: Any, known: Iterable[Any], cutoff: float = 0.6) -> str:
    """The end of an error message that names the one of `known` that was probably meant, or nothing.

    >>> nearest("windw", ["window", "causal"])
    "; did you mean 'window'?"
    >>> nearest("x", ["window", "causal"])
    ''
    """
    # Beyond some length nothing is near, and the comparison would take seconds.
    text = str(word)
    close = difflib.get_close_matches(text, [str(name) for name in known], 1, cutoff) if len(text) < 200 else []
    return f"; did you mean {close[0]!r}?" if close else ""


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
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    require(fits, field, value, f"an integer {bounds}")
    return value


def number(field: str, value: Any, expected: str, low: float, high: float, *, open_low: bool = False) -> float:
    """`value` as a float in [low, high), or (low, high) with `open_low`; `expected` says so in words.

    NaN is in no interval.

    >>> number("optimizer.b1", 1.5, "a decay in [0, 1)", 0.0, 1.0)
    Traceback (most recent call last):
        ...
    ValueError: optimizer.b1=1.5: expected a decay in [0, 1)
    """
    real = isinstance(value, int | float) and not isinstance(value, bool)
    require(real and (low < value if open_low else low <= value) and value < high, field, value, expected)
    return float(value)
