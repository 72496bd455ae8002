"""Kubernetes objects as YAML that people read, with the standard library alone.

Only what JSON has (mappings, lists, text, numbers, true, false, null), in block style. Text is quoted wherever some
version of YAML could take it for something else, and a script of several lines is shown as such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Bare only what no YAML, 1.1 or 1.2, reads as anything but text: it begins with a letter or a slash, and has no `: `,
# ` #`, flow sign or space. The words that YAML 1.1 takes for true, false and null are quoted.
_BARE = re.compile(r"[A-Za-z/][A-Za-z0-9_./@=-]*(:[A-Za-z0-9_./@=-]+)*")
_WORDS = re.compile("y|n|yes|no|on|off|true|false|null", re.IGNORECASE)
# What may stand in a YAML file as it is. Line breaks other than \n would be read as \n.
_SHOWN = re.compile("[\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]*")


def to_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    """The documents, separated by `---`.

    Raises:
      ValueError: text that is not Unicode, which no Kubernetes object can hold.

    >>> print(to_yaml([{"kind": "Job", "spec": {"args": ["a b", "yes", "2"], "labels": {}}}]), end="")
    kind: Job
    spec:
      args:
      - "a b"
      - "yes"
      - "2"
      labels: {}
    """
    return "---\n".join("\n".join([*_block(document), ""]) for document in documents)


def _block(value: Any) -> list[str]:
    """The lines of a mapping or a list that is not empty."""
    lines = []
    if isinstance(value, Mapping):
        for key, item in value.items():
            lines += _entry(f"{_text(key)}:", item, "" if isinstance(item, list | tuple) else "  ")
    else:
        for item in value:
            if isinstance(item, Mapping | list | tuple) and item:
                first, *rest = _block(item)
                lines += [f"- {first}", *(f"  {line}" if line else "" for line in rest)]
            else:
                lines += _entry("-", item, "  ")
    return lines


def _entry(head: str, item: Any, indent: str) -> list[str]:
    if isinstance(item, Mapping | list | tuple):
        if not item:
            return [f"{head} {{}}" if isinstance(item, Mapping) else f"{head} []"]
        return [head, *(f"{indent}{line}" if line else "" for line in _block(item))]
    if isinstance(item, str) and _is_script(item):
        return [f"{head} |-", *(f"  {line}" if line else "" for line in item.split("\n"))]
    return [f"{head} {_scalar(item)}"]


def _is_script(text: str) -> bool:
    """Whether a literal block shows it without loss: it keeps neither tabs nor odd ends, and the first line indents."""
    lines = text.split("\n")
    ends = bool(lines[0]) and bool(lines[-1]) and not lines[0].startswith(" ")
    return len(lines) > 1 and ends and all(_SHOWN.fullmatch(line) and line == line.rstrip() for line in lines)


def _scalar(value: Any) -> str:
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{text!r:.120}: expected text in UTF-8, which is all that Kubernetes takes")
    if _BARE.fullmatch(text) and not _WORDS.fullmatch(text):
        return text
    return '"' + "".join(_escaped(letter) for letter in text) + '"'


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    if _SHOWN.fullmatch(letter):
        return letter
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(letter)
    return short or (f"\\x{ord(letter):02x}" if ord(letter) < 256 else f"\\u{ord(letter):04x}")
