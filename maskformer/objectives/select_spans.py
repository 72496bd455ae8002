"""Spans of tokens or words: `select` functions, and distributions of span lengths."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import integer, typed
from maskformer.objectives import randomness
from maskformer.objectives.counting import Count, check_fraction
from maskformer.objectives.rows import Row, Selection
from maskformer.objectives.select import ORDER
from maskformer.objectives.units import segment_starts, units_from_starts, words
from maskformer.objectives.vocabulary import is_any_of


def geometric_lengths(p: float = 0.2, longest: int = 10) -> tuple[float, ...]:
    """Probabilities of the lengths 1..longest under Geometric(p), renormalised (SpanBERT: mean 3.797).

    >>> probabilities = geometric_lengths(0.2, 10)
    >>> round(sum((i + 1) * q for i, q in enumerate(probabilities)), 3)
    3.797
    """
    p = check_fraction("geometric_p", p, low_open=True)
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
    integer("shortest", shortest, 1, _longest(longest))
    return tuple(0.0 if i + 1 < shortest else 1.0 / (longest - shortest + 1) for i in range(longest))


def _longest(longest: int) -> int:
    typed("longest", longest, int)
    return integer("longest", int(longest), 1)


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
