"""Which positions a corruption works on: `select(key, row, rate, token_weights) -> Selection`, a pure function."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from maskformer.objectives import randomness
from maskformer.objectives.counting import Count, top_n
from maskformer.objectives.rows import Row, Selection
from maskformer.objectives.units import Units, spread, take_in_random_order, words
from maskformer.objectives.vocabulary import is_any_of

# Stages of the row key (randomness.bits); replacement uses 20 and above.
ORDER = 1


@dataclass(frozen=True, eq=False)
class Tokens:
    """`count` single tokens, uniformly without replacement from those that are not in `avoid`.

    The count is taken over all non-padding tokens of the row, special ones included, as BERT and RoBERTa do.
    """

    count: Count
    avoid: tuple[int, ...]
    vocabulary_size: int
    needs = ()

    def eligible(self, row: Row) -> jax.Array:
        return row.valid & ~is_any_of(row.tokens, self.avoid, self.vocabulary_size)

    def most(self) -> int:
        return self.count.largest()

    def __call__(self, key: jax.Array, row: Row, rate=None, token_weights=None) -> Selection:
        count = self.count(key, row.size, rate)
        draw = randomness.bits(key, ORDER, row.tokens.shape)
        return Selection(top_n(draw, self.eligible(row), count, self.most()))


@dataclass(frozen=True, eq=False)
class Words:
    """Whole words, counted in tokens (BERT) or in words (RoBERTa).

    Counted in tokens: words in random order until `count` tokens are taken; a word that would overshoot is passed over.
    Counted in words: `count` of the row's words, whatever their size; `limit` tokens at most.
    Special tokens that are not in `avoid` are words of their own.
    """

    count: Count
    avoid: tuple[int, ...]
    special: tuple[int, ...]
    vocabulary_size: int
    counted_in: str
    limit: int
    needs = ("word_starts",)

    def most(self) -> int:
        return self.limit

    def __call__(self, key: jax.Array, row: Row, rate=None, token_weights=None) -> Selection:
        is_special = is_any_of(row.tokens, self.special, self.vocabulary_size)
        member = row.valid & ~is_any_of(row.tokens, self.avoid, self.vocabulary_size)
        units = words(row, member, is_special)
        draw = randomness.bits(key, ORDER, row.tokens.shape)
        if self.counted_in == "tokens":
            room = jnp.minimum(self.count(key, row.size, rate), self.limit)
            taken = take_in_random_order(draw, units, room)
        else:
            count = self.count(key, jnp.sum(units.start, dtype=jnp.int32), rate)
            taken = top_n(draw, units.start, count, self.count.largest())
            taken = words_within(draw, units, taken, self.limit)
        return Selection(spread(units, taken), unit=units.first)


def words_within(random_bits: jax.Array, units: Units, taken: jax.Array, limit: int) -> jax.Array:
    """`taken` (bool, at the first position of each unit) less the units at the end of the random order that would
    bring it above `limit` tokens. A limit of the row's length leaves out none."""
    if limit >= taken.shape[0]:
        return taken
    limited = replace(units, start=taken, size=jnp.where(taken, units.size, 0))
    return take_in_random_order(random_bits, limited, jnp.int32(limit))
