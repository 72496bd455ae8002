"""Objectives that predict the next token: causal, prefix and fill-in-the-middle language models."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maskformer import masks
from maskformer.objectives import randomness
from maskformer.objectives.counting import check_fraction, check_length
from maskformer.objectives.objective import Objective
from maskformer.objectives.rows import Corrupted, Row
from maskformer.objectives.units import segment_starts, units_from_starts
from maskformer.objectives.vocabulary import Vocabulary, is_any_of

# Stages of the row key.
PREFIX, CUTS, ORDER_OF_PARTS = 40, 41, 42


def attend_causally(corrupted: Corrupted) -> masks.Mask:
    """Keys up to the query's own position, within the segment."""
    return masks.causal() & masks.documents(corrupted.segment_ids)


def attend_by_prefix(corrupted: Corrupted) -> masks.Mask:
    """Causal within the segment, and both ways within each run of positions that are `bidirectional`."""
    segment_ids = corrupted.segment_ids
    # One id for a run, and one for each position outside: such a position sees itself, as causally.
    places = jnp.arange(segment_ids.shape[-1], dtype=jnp.int32)
    runs = masks.documents(jnp.where(corrupted.bidirectional, -1, places))
    return masks.documents(segment_ids) & (masks.causal() | runs)


def next_token(row: Row) -> tuple[jax.Array, jax.Array]:
    """(targets, weights) `[length]`: the following token of the same segment; weight 0 where there is none.

    >>> row = Row(*(jnp.array(x) for x in ([5, 6, 7, 8, 0], [1, 1, 2, 2, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 0])))
    >>> [x.tolist() for x in next_token(row)]
    [[6, 0, 8, 0, 0], [1.0, 0.0, 1.0, 0.0, 0.0]]
    """
    following = jnp.concatenate([row.tokens[1:], jnp.zeros(1, row.tokens.dtype)])
    same = jnp.concatenate([row.segment_ids[1:] == row.segment_ids[:-1], jnp.zeros(1, bool)]) & row.valid
    return jnp.where(same, following, 0), same.astype(jnp.float32)


def shift_right(tokens: jax.Array, starts: jax.Array, start_id: jax.Array | int) -> jax.Array:
    """Decoder input: every token moves one place to the right, and each segment begins with `start_id`.

    >>> shift_right(jnp.array([5, 6, 7, 8]), jnp.array([1, 0, 1, 0], bool), 1).tolist()
    [1, 5, 1, 7]
    """
    moved = jnp.concatenate([tokens[:1], tokens[:-1]])
    return jnp.where(starts, start_id, moved)


@dataclass(frozen=True, eq=False)
class CausalLM(Objective):
    """Every token from those before it."""

    predicts_next = True

    shift: str = "next"
    start_id: int = 0

    def row(self, key, row, rate, token_weights):
        if self.shift == "next":
            tokens = row.tokens
            targets, weights = next_token(row)
        else:
            tokens = jnp.where(row.valid, shift_right(row.tokens, segment_starts(row), self.start_id), row.tokens)
            targets, weights = row.tokens, row.valid.astype(jnp.float32)
        return Corrupted(
            tokens, row.segment_ids, row.positions, None, targets, weights, bidirectional=jnp.zeros_like(row.valid)
        )

    def attend(self, corrupted):
        return attend_causally(corrupted)

    def as_causal(self):
        return self


def causal_lm(vocabulary: Vocabulary, length: int, *, shift: str = "next") -> CausalLM:
    """Next-token prediction within each packed segment.

    Args:
      shift: `next` reads the tokens as they are and predicts each one's successor; the first token of a segment is not
        predicted, and its last one predicts nothing. `right` reads the tokens shifted right behind `bos` (or
        `cls`), so that every token is predicted, the first one too.

    >>> vocabulary = Vocabulary(size=100, pad=0, bos=1)
    >>> causal_lm(vocabulary, 8).budget
    8
    """
    length = check_length(length)
    if shift not in ("next", "right"):
        raise ValueError(f"shift={shift!r}: expected 'next' or 'right'")
    start = vocabulary.bos if vocabulary.bos is not None else vocabulary.cls
    if shift == "right" and start is None:
        raise ValueError("causal_lm: shift='right' starts every segment with vocabulary.bos, and there is none; "
                         "use shift='next' or add a bos token")
    return CausalLM("causal_lm", vocabulary, length, length, description=f"causal_lm: shift {shift}",
                    shift=shift, start_id=start or 0)


@dataclass(frozen=True, eq=False)
class PrefixLM(Objective):
    """The rest of each segment from a prefix that is read both ways."""

    predicts_next = True

    shortest: float = 0.0
    longest: float = 1.0

    def prefix(self, key: jax.Array, row: Row) -> tuple[jax.Array, jax.Array]:
        """(position within the segment, prefix length of the segment), both int32 `[length]`."""
        segments = units_from_starts(row.valid, segment_starts(row))
        size = segments.size[segments.first]
        low = jnp.clip(jnp.ceil(self.shortest * size), 1, jnp.maximum(size - 1, 1)).astype(jnp.int32)
        high = jnp.clip(jnp.floor(self.longest * size).astype(jnp.int32), low, jnp.maximum(size - 1, 1))
        draw = randomness.bits(key, PREFIX, row.tokens.shape)[segments.first]
        prefix = low + (draw % (high - low + 1).astype(jnp.uint32)).astype(jnp.int32)
        return jnp.arange(row.tokens.shape[0], dtype=jnp.int32) - segments.first, prefix

    def row(self, key, row, rate, token_weights):
        offset, prefix = self.prefix(key, row)
        targets, weights = next_token(row)
        return Corrupted(
            row.tokens, row.segment_ids, row.positions, None, targets,
            # The last token of the prefix predicts the first one after it, which it cannot see.
            weights * (offset + 1 >= prefix),
            bidirectional=row.valid & (offset < prefix),
        )

    def attend(self, corrupted):
        return attend_by_prefix(corrupted)

    def as_causal(self):
        return causal_lm(self.vocabulary, self.length)


def prefix_lm(vocabulary: Vocabulary, length: int, *, shortest: float = 0.0, longest: float = 1.0) -> PrefixLM:
    """Next-token prediction after a bidirectional prefix, drawn for each segment of l tokens from U[1, l - 1].

    Args:
      shortest, longest: bounds of the prefix as fractions of the segment, clipped to 1..l - 1.

    >>> prefix_lm(Vocabulary(size=100, pad=0), 8).budget
    8
    """
    shortest, longest = check_fraction("shortest", shortest), check_fraction("longest", longest)
    if shortest > longest:
        raise ValueError(f"shortest={shortest:g} is above longest={longest:g}: the prefix has no length to take")
    length = check_length(length)
    return PrefixLM("prefix_lm", vocabulary, length, length, description=f"prefix_lm: {shortest:g} to {longest:g}",
                    shortest=shortest, longest=longest)


@dataclass(frozen=True, eq=False)
class FillInTheMiddle(Objective):
    """Documents cut in three and reordered, so that a causal model learns to fill the middle."""

    predicts_next = True

    fim_rate: float = 0.5
    spm_rate: float = 0.5
    prefix_id: int = 0
    suffix_id: int = 0
    middle_id: int = 0

    def row(self, key, row, rate, token_weights):
        length = row.tokens.shape[0]
        index = jnp.arange(length, dtype=jnp.int32)
        # Markers at the ends of a document stay where they are; the text between them is one unit.
        text = row.valid & ~is_any_of(row.tokens, self.vocabulary.special_ids, self.vocabulary.size)
        units = units_from_starts(text, segment_starts(row))
        size, first = units.size[units.first], units.first
        cuts = randomness.bits(key, CUTS, (2, length)) % (size + 1).astype(jnp.uint32)[first]
        cuts = jnp.sort(cuts.astype(jnp.int32), axis=0)[:, first]
        decide = randomness.bits(key, ORDER_OF_PARTS, (2, length))
        permuted = text & randomness.below(decide[0, first], self.fim_rate if rate is None else rate)
        spm = randomness.below(decide[1, first], self.spm_rate)
        low, high = cuts
        local = index - first
        prefix, middle, suffix = low, high - low, size - high
        in_prefix, in_suffix = local < low, local >= high
        # PSM: PRE p SUF s MID m.   SPM (variant 2): PRE SUF s MID p m.
        psm_to = jnp.where(
            in_prefix, 1 + local, jnp.where(in_suffix, 2 + prefix + local - high, 3 + prefix + suffix + local - low)
        )
        spm_to = jnp.where(in_suffix, 2 + local - high, 3 + suffix + local)
        starts_unit = units.start & permuted
        added = 3 * (jnp.cumsum(starts_unit) - starts_unit)
        added = added.astype(jnp.int32)
        # A unit's own markers count for all that follows it, not for its members.
        base = jnp.where(text, first + added[first], index + 3 * jnp.cumsum(starts_unit).astype(jnp.int32))
        inside = jnp.where(permuted, jnp.where(spm, spm_to, psm_to), local)
        to = jnp.where(text, base + inside, base)
        to = jnp.where(row.valid, to, length)

        def put(target, where, what):
            return target.at[where].set(what, mode="drop")

        tokens = put(jnp.full(length, self.vocabulary.pad or 0, jnp.int32), to, row.tokens)
        segments = put(jnp.zeros(length, jnp.int32), to, row.segment_ids)
        del middle
        for marker, at_psm, at_spm in (
            (self.prefix_id, 0, 0),
            (self.suffix_id, 1 + prefix, 1),
            (self.middle_id, 2 + prefix + suffix, 2 + suffix),
        ):
            at = jnp.where(starts_unit, base + jnp.where(spm, at_spm, at_psm), length)
            tokens = put(tokens, at, marker)
            segments = put(segments, at, row.segment_ids)
        out = Row(tokens, segments, index, jnp.zeros(length, bool))
        begin = jax.lax.cummax(jnp.where(segment_starts(out), index, 0))
        targets, weights = next_token(out)
        return Corrupted(
            tokens, segments, jnp.where(out.valid, index - begin, 0), None, targets, weights,
            bidirectional=jnp.zeros_like(out.valid),
        )

    def attend(self, corrupted):
        return attend_causally(corrupted)

    def as_causal(self):
        return causal_lm(self.vocabulary, self.length)


def fim(
    vocabulary: Vocabulary,
    length: int,
    *,
    prefix_token: int | None = None,
    suffix_token: int | None = None,
    middle_token: int | None = None,
    rate: float = 0.5,
    spm_rate: float = 0.5,
) -> FillInTheMiddle:
    """Causal language modelling over documents rearranged as prefix, suffix, middle (Bavarian et al. 2022).

    For each document with probability `rate`, two cuts are drawn from 0..l and sorted (bigcode Megatron-LM,
    `gpt_dataset.py`, at token level: the reference cuts characters). PSM is `PRE p SUF s MID m`; SPM, with probability
    `spm_rate`, is `PRE SUF s MID p m`. The loss covers all parts. Three tokens are added per
    document and the row is cut off at `length`, as in the reference.

    Args:
      prefix_token, suffix_token, middle_token: ids of the three markers, listed in `vocabulary.special`; by default
        its first three.

    >>> vocabulary = Vocabulary(size=100, pad=0, special=(97, 98, 99))
    >>> fim(vocabulary, 16, prefix_token=97, suffix_token=98, middle_token=99).budget
    16
    """
    length = check_length(length)
    given = {"prefix_token": prefix_token, "suffix_token": suffix_token, "middle_token": middle_token}
    if any(token is None for token in given.values()):
        if any(token is not None for token in given.values()) or len(vocabulary.special) < 3:
            raise ValueError(
                "objective 'fim' needs prefix_token, suffix_token and middle_token: give all three, or none and put "
                "them first in vocabulary.special"
            )
        given = dict(zip(given, vocabulary.special))
    markers: dict[str, int] = {name: token for name, token in given.items() if token is not None}
    if len(set(markers.values())) < 3:
        raise ValueError(f"fim: {markers}: the three markers must differ")
    for name, token in markers.items():
        if token not in vocabulary.special_ids:
            raise ValueError(f"{name}={token}: not a special id of the vocabulary; list it in vocabulary.special")
    rate, spm_rate = check_fraction("rate", rate), check_fraction("spm_rate", spm_rate)
    return FillInTheMiddle(
        "fim", vocabulary, length, length, rate, description=f"fim: rate {rate:g}, SPM {spm_rate:g}",
        fim_rate=rate, spm_rate=spm_rate, prefix_id=markers["prefix_token"], suffix_id=markers["suffix_token"],
        middle_id=markers["middle_token"],
    )
