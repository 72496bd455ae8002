"""Cuts text into sentences by punctuation; every character that is not white space lands in exactly one."""

from __future__ import annotations

import re
from collections.abc import Iterator

# After these a full stop does not end a sentence, whatever follows.
_ABBREVIATIONS = frozenset(
    "mr mrs ms messrs mme mlle dr st rev hon prof gen col capt lieut lt sgt maj adm gov sen rep esq jun sen sr jr"
    " vol no nos fig figs eq eqs sec ch pp p vs viz cf e.g i.e etc al approx ed eds inc ltd co corp dept univ".split()
)
_PARAGRAPH = re.compile(r"\n\s*\n")
# A mark that ends a sentence, the quotes and brackets that close with it, white space, and the start of the next.
# Chinese and Japanese marks need no white space. A run of marks is tried once, from its first, and given up as a whole:
# the search would otherwise take time with the square of its length.
_BOUNDARY = re.compile(
    r"""(?<![.!?\u2026])(?P<mark>[.!?\u2026]++)["'\u2019\u201d)\]]*(?P<space>\s+)(?=["'\u2018\u201c(\[]*[^\W_a-z])"""
    r"""|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d\u2019]*(?P<none>)"""
)


def split_sentences(text: str) -> Iterator[str]:
    r"""Yields the sentences of `text`, stripped, in order. A paragraph break always ends one.

    >>> list(split_sentences('"No," said Mr. Knightley. "It is late!" He left.\n\nShe stayed'))
    ['"No," said Mr. Knightley.', '"It is late!"', 'He left.', 'She stayed']
    """
    for paragraph in _PARAGRAPH.split(text):
        start = 0
        for match in _BOUNDARY.finditer(paragraph):
            if match["mark"] == "." and _is_abbreviation(paragraph, match.start()):
                continue
            if sentence := paragraph[start : match.end()].strip():
                yield sentence
            start = match.end()
        if sentence := paragraph[start:].strip():
            yield sentence


def _is_abbreviation(text: str, stop: int) -> bool:
    """Whether the word that ends before the full stop at `stop` is an abbreviation or an initial."""
    # No abbreviation in the list is longer than this, so a long text costs no more than a short one.
    words = text[max(0, stop - 12) : stop].split()
    word = words[-1].lstrip("\"'(\u2018\u201c[") if words else ""
    return word.lower() in _ABBREVIATIONS or (len(word) == 1 and word.isupper() and word != "I")
