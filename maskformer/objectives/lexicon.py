"""Collocations: n-grams that belong together, found by pointwise mutual information and looked up on device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import printable, shown
from maskformer.objectives import randomness
from maskformer.objectives.counting import Count
from maskformer.objectives.rows import Row, Selection
from maskformer.objectives.select import ORDER
from maskformer.objectives.units import spread, take_in_random_order, units_from_starts
from maskformer.objectives.vocabulary import is_any_of
from maskformer.textfiles import lines


def pmi_ngrams(
    texts: Iterable[Sequence[int]], longest: int = 3, count: int = 1000, least: int = 10
) -> list[tuple[int, ...]]:
    """The `count` n-grams of 2..longest ids with the highest pointwise mutual information, highest first.

    The measure of an n-gram is the least, over all ways of cutting it in two or more parts, of
    log p(n-gram) - sum of log p(part) (Levine et al. 2021, equation 3): it is high only if no part explains the
    whole. It is enough to cut in two where the parts' own best cuts are known.

    Args:
      texts: token ids without special ones; no n-gram runs from one text into the next.
      longest: the longest n-gram.
      count: how many to return, at most.
      least: n-grams seen less often are left out.

    >>> texts = [[1, 2, 5], [1, 2, 6], [3, 1, 2], [5, 3, 6], [6, 5, 3]] * 10
    >>> pmi_ngrams(texts, longest=2, count=1)
    [(1, 2)]
    """
    if longest < 2:
        raise ValueError(f"longest={longest}: expected at least 2")
    seen: list[Counter] = [Counter() for _ in range(longest + 1)]
    for text in texts:
        ids = [int(i) for i in text]
        for n in range(1, longest + 1):
            seen[n].update(zip(*(ids[i:] for i in range(n))))
    totals = [max(sum(counter.values()), 1) for counter in seen]

    def log_p(ngram: tuple[int, ...]) -> float:
        return math.log(seen[len(ngram)][ngram] / totals[len(ngram)])

    best: dict[tuple[int, ...], float] = {}

    def likeliest_parts(ngram: tuple[int, ...]) -> float:
        """Highest sum of log p over all ways of cutting the n-gram, the whole included."""
        if ngram not in best:
            whole = log_p(ngram)
            best[ngram] = whole if len(ngram) == 1 else max(whole, likeliest_cut(ngram))
        return best[ngram]

    def likeliest_cut(ngram: tuple[int, ...]) -> float:
        return max(likeliest_parts(ngram[:i]) + likeliest_parts(ngram[i:]) for i in range(1, len(ngram)))

    scored = [
        (log_p(ngram) - likeliest_cut(ngram), ngram)
        for n in range(2, longest + 1)
        for ngram, number in seen[n].items()
        if number >= least
    ]
    scored.sort(key=lambda pair: (-pair[0], pair[1]))
    return [ngram for _, ngram in scored[:count]]


class Lexicon:
    """A list of n-grams of token ids (PMI-masking's collocations), made for lookup on device.

    >>> lexicon = Lexicon([(5, 6), (5, 6, 7), (8, 9)])
    >>> lexicon.starts(jnp.array([5, 6, 7, 5, 6, 8]), jnp.ones(6, bool)).tolist()   # the longest entry wins
    [True, False, False, True, False, True]
    """

    def __init__(self, ngrams: Iterable[Sequence[int]]):
        by_length: dict[int, set[tuple[int, ...]]] = {}
        if isinstance(ngrams, str) or not isinstance(ngrams, Iterable):
            raise ValueError(f"ngrams={shown(ngrams)}: expected a list of lists of ids, or Lexicon.read for a file")
        for ngram in ngrams:
            entry = _entry(ngram, "lexicon entry")
            by_length.setdefault(len(entry), set()).add(entry)
        if not by_length:
            raise ValueError("lexicon: no n-grams given")
        self.largest_id = max(max(ngram) for group in by_length.values() for ngram in group)
        self._groups = [(n, *self._hash_table(by_length[n])) for n in sorted(by_length, reverse=True)]
        self.longest = self._groups[0][0]

    @classmethod
    def read(cls, path: str) -> Lexicon:
        """From a text file with the ids of one entry on each line, separated by blanks.

        Raises:
          ValueError: naming file and line.
        """
        entries = []
        try:
            for number, line in enumerate(lines(path), start=1):
                if words := line.split():
                    entries.append(_entry(words, f"{printable(path)}:{number}: entry"))
        except ValueError as error:
            raise ValueError(f"lexicon file {shown(path)}: {error}") from None
        if not entries:
            raise ValueError(f"lexicon file {shown(path)}: it is empty; write the ids of one entry on each line")
        return cls(entries)

    @staticmethod
    def _hash_table(ngrams: set[tuple[int, ...]]):
        table = np.array(sorted(ngrams), np.int32)
        for attempt in range(1000):
            multiplier = np.uint32(0x9E3779B1 + 2 * attempt)
            hashes = np.zeros(len(table), np.uint32)
            with np.errstate(over="ignore"):
                for column in table.T:
                    hashes = (hashes ^ column.astype(np.uint32)) * multiplier
                    hashes ^= hashes >> np.uint32(15)
            if len(np.unique(hashes)) == len(table):
                order = np.argsort(hashes)
                return multiplier, hashes[order], table[order]
        raise ValueError(f"lexicon: {len(table)} n-grams of one length have colliding 32-bit hashes; list fewer")

    def starts(self, tokens: jax.Array, member: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """bool `[length]`: True where a unit begins; every member is in one unit, alone or in a lexicon entry.

        An entry never runs from one segment into the next.
        """
        length = tokens.shape[0]
        claimed = ~member
        joined = jnp.zeros(length, bool)
        index = jnp.arange(length)
        for n, multiplier, hashes, table in self._groups:
            if n > length:
                continue
            ahead = [jnp.concatenate([tokens[i:], jnp.full(i, -1, tokens.dtype)]) for i in range(n)]
            hashed = jnp.zeros(length, jnp.uint32)
            for column in ahead:
                hashed = (hashed ^ column.astype(jnp.uint32)) * multiplier
                hashed ^= hashed >> 15
            at = jnp.minimum(jnp.searchsorted(jnp.asarray(hashes), hashed), len(hashes) - 1)
            # Comparing the ids themselves makes the lookup exact whatever the hash does.
            match = jnp.all(jnp.asarray(table)[at] == jnp.stack(ahead, axis=1), axis=1)
            blocked = jnp.cumsum(claimed)
            end = jnp.minimum(index + n - 1, length - 1)
            match &= (blocked[end] - blocked + claimed == 0) & (index + n <= length)
            if segment_ids is not None:
                match &= segment_ids[end] == segment_ids

            # Entries of one length that overlap go to the leftmost.
            def leftmost(busy, here):
                take = here & (busy == 0)
                return jnp.where(take, n - 1, jnp.maximum(busy - 1, 0)), take  # noqa: B023

            _, taken = jax.lax.scan(leftmost, jnp.int32(0), match, unroll=8)
            inner = jnp.zeros(length, bool)
            for i in range(1, n):
                inner |= jnp.concatenate([jnp.zeros(i, bool), taken[:-i]])
            joined |= inner
            claimed |= taken | inner
        return member & ~joined


def _entry(ids: Any, where: str) -> tuple[int, ...]:
    """The ids as integers, read from text if they are text; the error begins with `where`."""
    try:
        entry = tuple(int(i) for i in ids)
    except (TypeError, ValueError):
        raise ValueError(f"{where} {shown(ids)}: expected ids, which are whole numbers") from None
    if len(entry) < 2:
        raise ValueError(f"{where} {shown(entry)}: expected at least 2 ids; single tokens are units anyway")
    if not all(0 <= i < 1 << 31 for i in entry):
        raise ValueError(f"{where} {shown(entry)}: expected ids from 0 to 2**31 - 1")
    return entry


@dataclass(frozen=True, eq=False)
class LexiconUnits:
    """Lexicon entries and single tokens as units, in random order until `count` tokens are taken (PMI-masking)."""

    count: Count
    lexicon: Lexicon
    avoid: tuple[int, ...]
    vocabulary_size: int
    needs = ()

    def most(self) -> int:
        return self.count.largest()

    def __call__(self, key: jax.Array, row: Row, rate=None, token_weights=None) -> Selection:
        member = row.valid & ~is_any_of(row.tokens, self.avoid, self.vocabulary_size)
        starts = self.lexicon.starts(row.tokens, member, row.segment_ids)
        units = units_from_starts(member, starts)
        draw = randomness.bits(key, ORDER, row.tokens.shape)
        room = jnp.minimum(self.count(key, row.size, rate), self.most())
        return Selection(spread(units, take_in_random_order(draw, units, room)), unit=units.first)
