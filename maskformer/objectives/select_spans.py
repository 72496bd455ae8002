"""Spans of tokens or words, and units from a list of n-grams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.objectives import randomness
from maskformer.objectives.counting import Count, check_fraction
from maskformer.objectives.rows import Row, Selection
from maskformer.objectives.select import ORDER
from maskformer.objectives.units import (
    segment_starts,
    spread,
    take_in_random_order,
    units_from_starts,
    words,
)
from maskformer.objectives.vocabulary import is_any_of


def geometric_lengths(p: float = 0.2, longest: int = 10) -> tuple[float, ...]:
    """Probabilities of the lengths 1..longest under Geometric(p), renormalised (SpanBERT: mean 3.797).

    >>> probabilities = geometric_lengths(0.2, 10)
    >>> round(sum((i + 1) * q for i, q in enumerate(probabilities)), 3)
    3.797
    """
    p = check_fraction("geometric p", p, low_open=True)
    raw = [p * (1 - p) ** (i) for i in range(_longest(longest))]
    return tuple(x / sum(raw) for x in raw)


def inverse_lengths(longest: int = 3) -> tuple[float, ...]:
    """P(n) proportional to 1/n for n = 1..longest (ALBERT's n-gram masking).

    >>> [round(x, 4) for x in inverse_lengths(3)]
    [0.5455, 0.2727, 0.1818]
    """
    raw = [1.0 / (i + 1) for i in range(_longest(longest))]
    return tuple(x / sum(raw) for x in raw)


def uniform_lengths(shortest: int, longest: int) -> tuple[float, ...]:
    """Equal chances for shortest..longest."""
    if not 1 <= shortest <= _longest(longest):
        raise ValueError(f"span lengths {shortest}..{longest}: expected 1 <= shortest <= longest")
    return tuple(0.0 if i + 1 < shortest else 1.0 / (longest - shortest + 1) for i in range(longest))


def _longest(longest: int) -> int:
    if isinstance(longest, bool) or int(longest) != longest or longest < 1:
        raise ValueError(f"longest={longest!r}: expected a whole number of at least 1")
    return int(longest)


@dataclass(frozen=True, eq=False)
class Spans:
    """Spans until `count` tokens are taken (SpanBERT, `masking.py`).

    Each span draws a length, in words or tokens, and an anchor uniformly from the free positions; it starts at the
    first piece of the anchor's word, and ends early at a marker, at the end of a segment, or where the count is full.
    Spans may run over positions that are already taken. Spans that touch count as one unit.
    """

    count: Count
    lengths: tuple[float, ...]
    avoid: tuple[int, ...]
    vocabulary_size: int
    in_words: bool

    @property
    def needs(self) -> tuple[str, ...]:
        return ("word_starts",) if self.in_words else ()

    def most(self) -> int:
        return self.count.largest()

    def __call__(self, key: jax.Array, row: Row, rate=None, token_weights=None) -> Selection:
        length = row.tokens.shape[0]
        member = row.valid & ~is_any_of(row.tokens, self.avoid, self.vocabulary_size)
        units = words(row, member) if self.in_words else words(row, member, jnp.ones(length, bool))
        run = units_from_starts(member, segment_starts(row)).first
        word = jnp.cumsum(units.start)
        cumulative = jnp.asarray(np.cumsum(self.lengths)[:-1], jnp.float32)
        draws = jax.random.fold_in(key, ORDER)
        count = self.count(key, row.size, rate)

        def more(state):
            _, chosen, left = state
            return (left > 0) & jnp.any(member & ~chosen)

        def add_span(state):
            turn, chosen, left = state
            own = jax.random.fold_in(draws, turn)
            span = 1 + jnp.sum(randomness.uniform(own, 0) >= cumulative)
            free = member & ~chosen
            pick = randomness.integers(own, 1, (), jnp.sum(free))
            anchor = jnp.argmax(jnp.cumsum(free) > pick)
            inside = member & (run == run[anchor]) & (word >= word[anchor]) & (word < word[anchor] + span)
            new = inside & ~chosen
            new &= jnp.cumsum(new) <= left
            return turn + 1, chosen | new, left - jnp.sum(new, dtype=jnp.int32)

        state = (jnp.int32(0), jnp.zeros(length, bool), jnp.minimum(count, self.most()))
        _, chosen, _ = jax.lax.while_loop(more, add_span, state)
        merged = units_from_starts(chosen, segment_starts(row))
        return Selection(chosen, unit=merged.first)


class Lexicon:
    """A list of n-grams of token ids (PMI-masking's collocations), made for lookup on device.

    >>> lexicon = Lexicon([(5, 6), (5, 6, 7), (8, 9)])
    >>> lexicon.starts(jnp.array([5, 6, 7, 5, 6, 8]), jnp.ones(6, bool)).tolist()   # the longest entry wins
    [True, False, False, True, False, True]
    """

    def __init__(self, ngrams: Iterable[Sequence[int]]):
        by_length: dict[int, set[tuple[int, ...]]] = {}
        for ngram in ngrams:
            ngram = tuple(int(i) for i in ngram)
            if len(ngram) < 2:
                raise ValueError(f"lexicon entry {ngram}: expected at least 2 ids; single tokens are units anyway")
            by_length.setdefault(len(ngram), set()).add(ngram)
        if not by_length:
            raise ValueError("lexicon: no n-grams given")
        self.largest_id = max(max(ngram) for group in by_length.values() for ngram in group)
        self._groups = [(n, *self._hash_table(by_length[n])) for n in sorted(by_length, reverse=True)]
        self.longest = self._groups[0][0]

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
