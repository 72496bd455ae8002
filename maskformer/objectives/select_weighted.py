"""Independent draws per token or word, evenly or by a weight: HF's Bernoulli, frequency, part of speech, tf-idf."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import shown
from maskformer.objectives import randomness
from maskformer.objectives.rows import Row, Selection
from maskformer.objectives.select import ORDER, words_within
from maskformer.objectives.units import spread, words
from maskformer.objectives.vocabulary import is_any_of

WEIGHT_SOURCES = ("table", "tf_idf", "positions", "loss")


def proportional(weights: jax.Array, total: jax.Array, rounds: int = 16) -> jax.Array:
    """Probabilities `min(1, c * weights)` whose sum is `total` (or as near as the positive weights allow).

    Args:
      weights: float `[length]`, 0 where a position can never be chosen.
      total: expected number of chosen positions.
      rounds: each round fixes the positions that reach probability 1 and scales the others again.

    >>> proportional(jnp.array([1.0, 1.0, 2.0, 0.0]), 2.0).tolist()
    [0.5, 0.5, 1.0, 0.0]
    """
    weights = jnp.maximum(jnp.asarray(weights, jnp.float32), 0.0)

    def scale(_, factor):
        capped = factor * weights >= 1.0
        rest = jnp.sum(jnp.where(capped, 0.0, weights))
        room = jnp.maximum(total - jnp.sum(capped), 0.0)
        return jnp.where(rest > 0.0, jnp.maximum(room / jnp.maximum(rest, 1e-30), factor), factor)

    factor = jax.lax.fori_loop(0, rounds, scale, jnp.float32(0.0))
    return jnp.minimum(factor * weights, 1.0)


def within(chosen: jax.Array, limit: int) -> jax.Array:
    """`chosen` less what exceeds `limit` positions; the limit is made so that this is a once-in-1e9 event."""
    return chosen & (jnp.cumsum(chosen) <= limit)


@dataclass(frozen=True, eq=False)
class Bernoulli:
    """Each token (or word) with probability `rate`, independently; none at all is a possible outcome (HF).

    At most `limit` tokens.
    """

    rate: float
    limit: int
    avoid: tuple[int, ...]
    vocabulary_size: int
    per_word: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("word_starts",) if self.per_word else ()

    def most(self) -> int:
        return self.limit

    def __call__(self, key: jax.Array, row: Row, rate=None, token_weights=None) -> Selection:
        member = row.valid & ~is_any_of(row.tokens, self.avoid, self.vocabulary_size)
        bits = randomness.bits(key, ORDER, row.tokens.shape)
        drawn = randomness.below(bits, self.rate if rate is None else rate)
        if not self.per_word:
            return Selection(within(member & drawn, self.limit))
        units = words(row, member)
        taken = words_within(bits, units, units.start & drawn, self.limit)
        return Selection(spread(units, taken), unit=units.first)


@dataclass(frozen=True, eq=False)
class Weighted:
    """Each token independently with a probability proportional to its weight, scaled to the rate of the row.

    Sources of the weight: `table` = w[token]; `tf_idf` = (share of the token in the row) * table[token], the table
    holding inverse document frequencies; `positions` = the batch's `select_weights`; `loss` = max(floor,
    token_weights[token]), the running losses that a call gives. With `scaled=False` the weights are the probabilities
    themselves.
    """

    rate: float
    limit: int
    avoid: tuple[int, ...]
    vocabulary_size: int
    source: str
    table: np.ndarray | None = None
    scaled: bool = True
    floor: float = 0.0

    @property
    def needs(self) -> tuple[str, ...]:
        return ("select_weights",) if self.source == "positions" else ()

    def most(self) -> int:
        return self.limit

    def weights(self, row: Row, token_weights=None) -> jax.Array:
        if self.source == "positions":
            return row.weights
        table = jnp.asarray(self.table if token_weights is None else token_weights, jnp.float32)
        weights = jnp.maximum(table[row.tokens], self.floor)
        if self.source == "tf_idf":
            same = (row.tokens[:, None] == row.tokens[None, :]) & row.valid[None, :]
            weights = weights * jnp.sum(same, axis=1) / jnp.maximum(row.size, 1)
        return weights

    def __call__(self, key: jax.Array, row: Row, rate=None, token_weights=None) -> Selection:
        member = row.valid & ~is_any_of(row.tokens, self.avoid, self.vocabulary_size)
        weights = jnp.where(member, self.weights(row, token_weights), 0.0)
        if self.scaled:
            total = jnp.asarray(self.rate if rate is None else rate, jnp.float32) * row.size
            probability = proportional(weights, total)
        else:
            probability = jnp.clip(weights, 0.0, 1.0)
        chosen = randomness.below(randomness.bits(key, ORDER, row.tokens.shape), probability)
        return Selection(within(chosen & member, self.limit), probability=probability)


def check_table(table, vocabulary_size: int) -> np.ndarray:
    """float32 `[vocabulary_size]`; ValueError unless it is finite, not negative, not all zero, and of that size."""
    where = "table"
    if isinstance(table, str):
        where = f"table={shown(table)}"
        try:
            table = np.load(table)
        # numpy raises whatever reading a damaged header runs into.
        except (OSError, ValueError, EOFError, MemoryError, OverflowError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0] if str(error) else "damaged"
            raise ValueError(
                f"{where}: expected a .npy file with one weight per id ({reason}); write it with numpy.save"
            ) from error
        if not isinstance(table, np.ndarray):
            raise ValueError(f"{where}: expected one array, found an archive of several; write it with numpy.save")
    try:
        table = np.asarray(table, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected one number per id, found {shown(table)}") from None
    if table.shape != (vocabulary_size,):
        raise ValueError(f"{where} has shape {table.shape}: expected one weight per id, ({vocabulary_size},)")
    if not np.isfinite(table).all() or (table < 0).any() or not (table > 0).any():
        raise ValueError(f"{where}: expected finite weights of at least 0, some above 0")
    return table


def frequency_weights(counts, power: float = -0.5) -> np.ndarray:
    """Weights `count ** power` from token counts `[vocabulary]`; ids never seen get 0.

    A negative power prefers rare tokens; -0.5 is the square root that word2vec's subsampling uses.

    >>> [round(float(w), 3) for w in frequency_weights([100, 25, 0])]
    [0.1, 0.2, 0.0]
    """
    counts = np.asarray(counts, np.float64)
    return np.where(counts > 0, np.maximum(counts, 1e-30) ** power, 0.0).astype(np.float32)


def tag_weights(tags, weights: dict[str, float], default: float = 0.0) -> np.ndarray:
    """Weights from one tag per id, part of speech for one.

    >>> tag_weights(["NOUN", "DET", "VERB"], {"NOUN": 2.0, "VERB": 1.0}).tolist()
    [2.0, 0.0, 1.0]
    """
    return np.asarray([weights.get(tag, default) for tag in tags], np.float32)


def inverse_document_frequencies(document_counts, documents: int) -> np.ndarray:
    """`log(documents / document_count)` per id, 0 for ids in every document or in none.

    >>> [round(float(w), 3) for w in inverse_document_frequencies([10, 1, 0], 10)]
    [0.0, 2.303, 0.0]
    """
    counts = np.asarray(document_counts, np.float64)
    return np.where(counts > 0, np.log(documents / np.maximum(counts, 1.0)), 0.0).clip(0.0).astype(np.float32)
