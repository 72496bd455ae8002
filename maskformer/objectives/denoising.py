"""BART's noise: infilling, deletion, sentence permutation and rotation, with the original row as the target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import choose, integer, number
from maskformer.objectives import randomness
from maskformer.objectives.counting import Count, check_fraction, check_length, slots, top_n
from maskformer.objectives.pairs import Pair, PairObjective, compact, pair_objective
from maskformer.objectives.rows import Row
from maskformer.objectives.units import segment_starts, units_from_starts, words
from maskformer.objectives.vocabulary import Vocabulary, is_any_of

# Stages of the row key.
LENGTHS, STARTS, RANDOM_SPAN, RANDOM_ID, INSERT, RANDOM_INSERT, INSERTED_ID = range(70, 77)
SENTENCES, PERMUTED, ROTATE, ROTATE_BY = range(77, 81)
# Of the spans of a Poisson distribution, whose table has 128 lengths.
LONGEST_MEAN = 64
# Spans beyond the mean number that a row may need because many of them came out empty.
_SPARE_SPANS = 16


def poisson_lengths(mean: float, smallest: float = 1e-7) -> tuple[float, ...]:
    """Probabilities of the lengths 0, 1, ... under Poisson(mean), cut where they fall below `smallest` (fairseq).

    >>> [round(p, 3) for p in poisson_lengths(3.0)[:4]], len(poisson_lengths(3.0))
    ([0.05, 0.149, 0.224, 0.224], 18)
    """
    raw = []
    for k in range(128):
        raw.append(math.exp(-mean + k * math.log(mean) - math.lgamma(k + 1)))
        if raw[-1] < smallest and k > mean:
            break
    return tuple(p / sum(raw) for p in raw)


@dataclass(frozen=True, eq=False)
class Infilling:
    """Spans of words become one mask each; empty spans insert one (fairseq `denoising_dataset.py`).

    Lengths are drawn until they sum to the budget ceil(rate * words), the last one cut to fit. Spans start at distinct
    words; where one runs into the next they become one mask. `replace_length`: 1 = one mask per span, 0 = the span
    vanishes, -1 = a mask for each of its tokens.
    """

    count: Count
    lengths: tuple[float, ...]
    replace_length: int
    random_rate: float
    vocabulary: Vocabulary
    whole_words: bool

    def draw_lengths(self, key: jax.Array, budget: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(span lengths, in use) with a static number of slots; the lengths in use sum to `budget`."""
        most = self.count.largest() + _SPARE_SPANS
        if len(self.lengths) == 2 and self.lengths[1] == 1.0:
            lengths = jnp.ones(most, jnp.int32)
        else:
            cumulative = jnp.asarray(np.cumsum(self.lengths)[:-1], jnp.float32)
            draw = randomness.uniform(key, LENGTHS, (most,))
            lengths = jnp.sum(draw[:, None] >= cumulative, axis=1).astype(jnp.int32)
        total = jnp.cumsum(lengths)
        used = (total - lengths < budget) & (budget > 0)
        return jnp.where(used, jnp.minimum(lengths, budget - (total - lengths)), 0), used

    def __call__(self, key: jax.Array, row: Row, member: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """(tokens int32 `[size]`, how many) of the noised row."""
        length = row.tokens.shape[0]
        pad = self.vocabulary.pad or 0
        units = words(row, member) if self.whole_words else words(row, member, jnp.ones(length, bool))
        word = jnp.cumsum(units.start).astype(jnp.int32)
        budget = self.count(key, jnp.sum(units.start, dtype=jnp.int32))
        lengths, used = self.draw_lengths(key, budget)
        insertions = jnp.sum(used & (lengths == 0), dtype=jnp.int32)
        # The j-th non-empty span starts at the j-th word of a random order.
        at, exists = slots(lengths > 0, lengths.shape[0])
        spans = jnp.where(exists, lengths[at], 0)
        most = min(length, lengths.shape[0])
        score = jnp.where(units.start, randomness.sortable(randomness.bits(key, STARTS, (length,))), 0.0)
        values, start = jax.lax.top_k(score, most)
        begins = (spans[:most] > 0) & (values > 0)
        span_at = jnp.zeros(length, jnp.int32).at[jnp.where(begins, start, length)].set(spans[:most], mode="drop")
        starts_span = span_at > 0
        # A span ends at a marker or at the end of its segment, however long it was meant to be.
        runs = units_from_starts(member, segment_starts(row))
        run_end = jnp.maximum(runs.first + runs.size[runs.first] - 1, 0)
        reached = jax.lax.cummax(jnp.where(starts_span, jnp.minimum(word + span_at, word[run_end] + 1), 0))
        covered = member & (reached > word)
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), reached[:-1]])
        swallowed = starts_span & (before > word)
        random = randomness.below(randomness.bits(key, RANDOM_SPAN, (length,)), self.random_rate)
        ids = randomness.integers(key, RANDOM_ID, (length,), self.vocabulary.size)
        mask = self.vocabulary.mask
        if self.replace_length == 0:
            keep, tokens = ~covered, row.tokens
        elif self.replace_length == 1:
            keep = ~covered | (starts_span & ~swallowed)
            tokens = jnp.where(starts_span & covered, jnp.where(random, ids, mask), row.tokens)
        else:
            first = jax.lax.cummax(jnp.where(starts_span, jnp.arange(length), 0))
            keep, tokens = jnp.ones(length, bool), jnp.where(covered, jnp.where(random[first], ids, mask), row.tokens)
        out, used_size = compact(tokens, keep & row.valid, size, pad)
        return self.insert(key, out, used_size, insertions)

    def insert(self, key, tokens, size, insertions):
        """Puts masks at random places behind the first and before the last token."""
        length = tokens.shape[0]
        index = jnp.arange(length)
        total = jnp.minimum(size + insertions, length)
        interior = (index > 0) & (index < total - 1)
        most = min(length, self.count.largest() + _SPARE_SPANS)
        new = top_n(randomness.bits(key, INSERT, (length,)), interior, total - size, most)
        source = jnp.cumsum(~new) - 1
        ids = randomness.integers(key, INSERTED_ID, (length,), self.vocabulary.size)
        random = randomness.below(randomness.bits(key, RANDOM_INSERT, (length,)), self.random_rate)
        filled = jnp.where(new, jnp.where(random, ids, self.vocabulary.mask or 0), tokens[source])
        return jnp.where(index < total, filled, self.vocabulary.pad or 0), total


def permute_sentences(key: jax.Array, row: Row, member: jax.Array, stops: tuple[int, ...], share: float, size: int):
    """Order int32 `[length]` in which to read the row: ceil(share * sentences) sentences change places at random.

    Markers stay between the same places. A sentence ends with the last of a run of `stops`, or with its run of text.
    """
    length = row.tokens.shape[0]
    stop = is_any_of(row.tokens, stops, size) & member
    after_stop = jnp.concatenate([jnp.zeros(1, bool), stop[:-1]]) & ~stop
    sentences = units_from_starts(member, after_stop | segment_starts(row))
    number = jnp.sum(sentences.start, dtype=jnp.int32)
    count = jnp.ceil(number * jnp.float32(share) - 1e-4).astype(jnp.int32)
    chosen = top_n(randomness.bits(key, SENTENCES, (length,)), sentences.start, count, length)
    place, in_use = slots(chosen, length)
    score = jnp.where(chosen, randomness.sortable(randomness.bits(key, PERMUTED, (length,))), 0.0)
    _, shuffled = jax.lax.top_k(score, length)
    # The sentence that comes up j-th takes the place of the j-th chosen one; all others keep theirs.
    goes_to = jnp.arange(length).at[jnp.where(in_use, shuffled, length)].set(place, mode="drop")
    first = jnp.where(member, sentences.first, jnp.arange(length))
    return jnp.argsort(goes_to[first], stable=True)


def rotate(tokens: jax.Array, size: jax.Array, by: jax.Array) -> jax.Array:
    """The tokens between the first and the last of `size`, rotated left by `by`.

    >>> rotate(jnp.array([1, 5, 6, 7, 2, 0]), jnp.int32(5), jnp.int32(1)).tolist()
    [1, 6, 7, 5, 2, 0]
    """
    index = jnp.arange(tokens.shape[0])
    inside = jnp.maximum(size - 2, 1)
    source = 1 + jnp.mod(index - 1 + by, inside)
    return jnp.where((index > 0) & (index < size - 1), tokens[source], tokens)


@dataclass(frozen=True, eq=False)
class Denoise:
    """Sentence permutation, then infilling, then rotation, as fairseq applies them."""

    infilling: Infilling | None
    vocabulary: Vocabulary
    stops: tuple[int, ...]
    permute: float
    rotate_rate: float
    lengths: tuple[int, int]

    def __call__(self, key: jax.Array, row: Row, rate) -> Pair:
        if rate is not None:
            raise ValueError("denoising has static lengths made for its rate: build it with another rate")
        pad, some = self.vocabulary.pad or 0, row.size > 0
        member = row.valid & ~is_any_of(row.tokens, self.vocabulary.special_ids, self.vocabulary.size)
        noised = row
        if self.permute:
            order = permute_sentences(key, row, member, self.stops, self.permute, self.vocabulary.size)
            noised = Row(row.tokens[order], row.segment_ids[order], row.positions, row.word_starts[order])
            member = member[order]
        if self.infilling is not None:
            inputs, input_size = self.infilling(key, noised, member, self.lengths[0])
        else:
            inputs, input_size = compact(noised.tokens, row.valid, self.lengths[0], pad)
        if self.rotate_rate:
            turn = randomness.below(randomness.bits(key, ROTATE), self.rotate_rate)
            by = 1 + randomness.integers(key, ROTATE_BY, (), jnp.maximum(input_size - 2, 1))
            inputs = jnp.where(turn, rotate(inputs, input_size, by), inputs)
        targets, target_size = compact(row.tokens, row.valid, self.lengths[1], pad)
        return Pair(inputs, jnp.where(some, input_size, 0), targets, target_size)


def denoising(
    vocabulary: Vocabulary,
    length: int,
    *,
    rate: float = 0.3,
    poisson_mean: float | None = 3.0,
    replace_length: int = 1,
    random_rate: float = 0.1,
    whole_words: bool = True,
    permute_sentences: float = 0.0,
    full_stops: tuple[int, ...] = (),
    rotate: float = 0.0,
    layout: str = "encoder_decoder",
    start_id: int | None = None,
    static_copies: int = 0,
) -> PairObjective:
    """Rebuild a row from a noised one (BART: Lewis et al. 2020; fairseq `denoising_dataset.py`).

    The first token and the last keep their places: rows should begin and end with a marker, as BART's do.

    Args:
      rate: share of the words that the noise covers; 0 for none.
      poisson_mean: mean span length; None = single words (token masking or deletion).
      replace_length: 1 = one mask per span (infilling), 0 = deletion, -1 = one mask per token.
      random_rate: chance that a span's mask is a random id instead.
      whole_words: spans count words; else tokens.
      permute_sentences: share of the sentences that change places.
      full_stops: ids that end a sentence, needed with `permute_sentences`.
      rotate: chance that the row is rotated to start at a random token.
      layout: `encoder_decoder` or `prefix`.
      start_id: first decoder input; by default `eos` (fairseq), else `bos` or `pad`.

    >>> vocabulary = Vocabulary(size=100, pad=0, mask=4, bos=5, eos=6)
    >>> objective = denoising(vocabulary, 64)
    >>> objective.target_length
    64
    """
    length = check_length(length)
    rate, random_rate = check_fraction("rate", rate), check_fraction("random_rate", random_rate)
    share, turn = check_fraction("permute_sentences", permute_sentences), check_fraction("rotate", rotate)
    # One mask for a span, none, or one for each of its tokens.
    choose("replace_length", replace_length, (1, 0, -1))
    if poisson_mean is not None:
        longest = min(length, LONGEST_MEAN)
        expected = f"a mean above 0 and at most {longest} tokens (the row has {length}), or None for single ones"
        number("poisson_mean", poisson_mean, expected, 0.0, longest, open_low=True, closed=True)
    for index, stop in enumerate(full_stops):
        integer(f"full_stops[{index}]", stop, 0, vocabulary.size - 1)
    if rate and (replace_length != 0 or poisson_mean is not None):
        vocabulary.require("mask", "denoising")
    if share and not full_stops:
        raise ValueError("permute_sentences: full_stops is empty, so no sentence ends; give the ids of the full stops")
    infilling: Any = None
    grows = 0
    if rate:
        lengths = (0.0, 1.0) if poisson_mean is None else poisson_lengths(poisson_mean)
        count = Count("ceil", rate, length)
        infilling = Infilling(count, lengths, replace_length, random_rate, vocabulary, whole_words)
        # Insertions can only outnumber what the spans take away when most spans are empty.
        grows = 0 if poisson_mean is None else _SPARE_SPANS
    if start_id is None:
        start_id = vocabulary.eos
    make = Denoise(infilling, vocabulary, tuple(full_stops), share, turn, (length + grows, length))
    return pair_objective(
        "denoising", vocabulary, length, layout, make, make.lengths, start_id, rate=rate, static_copies=static_copies,
        needs=("word_starts",) if rate and whole_words else (), copies_input=True,
        description=f"denoising: rate {rate:g}, poisson {poisson_mean}, replace {replace_length}, "
        f"permute {share:g}, rotate {turn:g}, {layout}",
    )

