"""T5's span corruption, its simple variants, and UL2's mixture of denoisers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.objectives import randomness
from maskformer.objectives.counting import binomial_quantile, check_fraction, check_length, slots, top_n
from maskformer.objectives.pairs import Pair, PairObjective, append, compact, pair_objective
from maskformer.objectives.rows import Row
from maskformer.objectives.units import units_from_starts
from maskformer.objectives.vocabulary import Vocabulary

# Stages of the row key.
NOISE_CUTS, TEXT_CUTS, ROLL, CHOICE, IID, SHUFFLE, SWAP = 60, 61, 62, 63, 64, 65, 66
VARIANTS = ("span", "iid", "bert", "mass", "drop", "deshuffle")


def noise_counts(size: int, rate: float, mean: float) -> tuple[int, int]:
    """(noise tokens, noise spans) of a sequence of `size` tokens (t5 `random_spans_noise_mask`).

    n = clip(round(size * rate), 1, size - 1), spans = max(round(n / mean), 1), both half to even; none at rate 0 or
    where the sequence has fewer than 2 tokens. There are never more spans than tokens of either kind.

    >>> noise_counts(568, 0.15, 3.0), noise_counts(20, 0.15, 3.0), noise_counts(20, 0.0, 3.0)
    ((85, 28), (3, 1), (0, 0))
    """
    if rate == 0.0 or size < 2:
        return 0, 0
    noise = min(max(round(size * rate), 1), size - 1)
    return noise, max(1, min(round(noise / mean), noise, size - noise))


def span_corruption_lengths(inputs_length: int, rate: float = 0.15, mean: float = 3.0) -> tuple[int, int]:
    """(tokens, targets_length): raw tokens per row that fill `inputs_length` once corrupted (t5 `random_spans_helper`).

    Both sides count one sentinel per span and one EOS.

    >>> span_corruption_lengths(512), span_corruption_lengths(1024)
    ((568, 114), (1137, 229))
    """

    def after(tokens):
        noise = round(tokens * rate)
        spans = round(noise / mean)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length - 1
    if after(tokens)[0] > inputs_length:
        raise ValueError(f"inputs_length={inputs_length}: too short for rate {rate:g} and mean span {mean:g}")
    while after(tokens + 1)[0] <= inputs_length:
        tokens += 1
    targets = after(tokens)[1]
    if rate == 0.5 and targets > inputs_length:
        tokens, targets = tokens - 1, targets - 1
    return tokens, targets


def random_spans(
    key: jax.Array, size: jax.Array, noise: jax.Array, spans: jax.Array, length: int, most: int
) -> jax.Array:
    """bool `[length]`: `noise` of the first `size` positions in `spans` spans, starting with text, ending with noise.

    The noise is cut into `spans` parts of at least one token, and so is the text, each way of cutting equally likely;
    the parts alternate. Position 0 is therefore never noise and position `size - 1` always is.

    Args:
      most: static upper bound of `spans`.
    """
    index = jnp.arange(length)
    part = jnp.arange(most)

    def ends(stage, total):
        cuts = top_n(randomness.bits(key, stage, (length,)), index < total - 1, spans - 1, most)
        at, used = slots(cuts, min(most, length))
        at = jnp.pad(at, (0, most - at.shape[0]))
        used = jnp.pad(used, (0, most - used.shape[0]))
        return jnp.where(used, at + 1, total)

    noise_ends, text_ends = ends(NOISE_CUTS, noise), ends(TEXT_CUTS, size - noise)
    noise_begins = jnp.concatenate([jnp.zeros(1, noise_ends.dtype), noise_ends[:-1]])
    exists = part < spans
    begin = jnp.where(exists, text_ends + noise_begins, length)
    end = jnp.where(exists, text_ends + noise_ends, length)
    change = jnp.zeros(length, jnp.int32).at[begin].add(1, mode="drop").at[end].add(-1, mode="drop")
    return jnp.cumsum(change) > 0


def to_sentinels(
    row: Row, noise: jax.Array, sentinels: jax.Array, lengths: tuple[int, int], pad: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(inputs, input_size, targets, target_size): each noise span becomes a sentinel, the targets spell the spans.

    Inputs: text with one sentinel in place of each span. Targets: each sentinel followed by its span.
    """
    units = units_from_starts(noise & row.valid, jnp.zeros_like(noise))
    span = jnp.cumsum(units.start) - 1
    sentinel = sentinels[jnp.clip(span, 0, len(sentinels) - 1)]
    inputs, input_size = compact(
        jnp.where(units.start, sentinel, row.tokens), row.valid & (~units.member | units.start), lengths[0], pad
    )
    # Targets interleave: a span's sentinel stands right before its first token.
    doubled = jnp.stack([sentinel, row.tokens], axis=1).reshape(-1)
    wanted = jnp.stack([units.start, units.member], axis=1).reshape(-1)
    targets, target_size = compact(doubled, wanted, lengths[1], pad)
    return inputs, input_size, targets, target_size


@dataclass(frozen=True, eq=False)
class SpanNoise:
    """Span corruption with one or several denoisers, one of which is drawn for each row.

    The counts of every denoiser for every row size are tables, so that a mixture costs no more than one.
    """

    length: int
    noise: np.ndarray
    spans: np.ndarray
    weights: tuple[float, ...]
    mode_ids: tuple[int | None, ...]
    sentinels: tuple[int, ...]
    lengths: tuple[int, int]
    total: int
    eos: int | None
    pad: int
    roll: bool = False

    def noise_mask(self, key: jax.Array, size: jax.Array, choice: jax.Array) -> jax.Array:
        noise = jnp.asarray(self.noise)[choice, size]
        spans = jnp.asarray(self.spans)[choice, size]
        chosen = random_spans(key, size, noise, spans, self.length, max(int(self.spans.max()), 1))
        chosen &= jnp.arange(self.length) < size
        if self.roll:
            by = randomness.integers(key, ROLL, (), size)
            chosen = chosen[jnp.mod(jnp.arange(self.length) - by, jnp.maximum(size, 1))]
            chosen &= jnp.arange(self.length) < size
        return chosen

    def choose(self, key: jax.Array) -> jax.Array:
        if len(self.weights) == 1:
            return jnp.int32(0)
        cumulative = jnp.asarray(np.cumsum(self.weights)[:-1] / np.sum(self.weights), jnp.float32)
        return jnp.sum(randomness.uniform(key, CHOICE) >= cumulative)

    def span_lengths(self) -> tuple[float, ...]:
        """Shares of the spans of 1, 2, ... tokens in full rows, over all denoisers.

        A part of a random composition of n into s parts has length k with C(n - k - 1, s - 2) / C(n - 1, s - 1).
        """
        noise, spans = self.noise[:, -1], self.spans[:, -1]
        lengths = np.zeros(int(noise.max()))
        weights = np.array(self.weights) * spans
        for weight, n, s in zip(weights / max(weights.sum(), 1e-30), noise.tolist(), spans.tolist()):
            if s == 1:
                lengths[n - 1] += weight
                continue
            for k in range(1, n - s + 2):
                lengths[k - 1] += weight * math.comb(n - k - 1, s - 2) / math.comb(n - 1, s - 1)
        return tuple(map(float, np.trim_zeros(lengths, "b")))

    def __call__(self, key: jax.Array, row: Row, rate) -> Pair:
        if rate is not None:
            raise ValueError("span corruption has static lengths made for its rate: build it with another rate")
        choice = self.choose(key)
        chosen = self.noise_mask(key, row.size, choice)
        sentinels = jnp.asarray(self.sentinels, jnp.int32)
        inputs, input_size, targets, target_size = to_sentinels(row, chosen, sentinels, self.lengths, self.pad)
        some = row.size > 0
        if any(mode is not None for mode in self.mode_ids):
            mode = jnp.asarray([-1 if m is None else m for m in self.mode_ids], jnp.int32)[choice]
            with_mode = jnp.concatenate([mode[None], inputs[:-1]])
            use = (mode >= 0) & some
            inputs, input_size = jnp.where(use, with_mode, inputs), input_size + use.astype(jnp.int32)
        inputs, input_size = append(inputs, input_size, self.eos, some)
        targets, target_size = append(targets, target_size, self.eos, some & jnp.any(chosen))
        return Pair(inputs, input_size, targets, target_size)


def _check_mean(mean: float) -> float:
    if isinstance(mean, bool) or not isinstance(mean, (int, float)) or not mean >= 1:
        raise ValueError(f"mean={mean!r}: expected a mean span length of at least 1 token")
    return float(mean)


def _span_noise(name, vocabulary, length, denoisers, weights, modes, roll) -> SpanNoise:
    tables = np.array([[noise_counts(n, rate, mean) for n in range(length + 1)] for rate, mean in denoisers], np.int32)
    noise, spans = tables[..., 0], tables[..., 1]
    most = int(spans.max()) + bool(roll)
    eos = int(vocabulary.eos is not None)
    mode = int(any(m is not None for m in modes))
    size = np.arange(length + 1)
    # A rolled span may wrap around and become two.
    lengths = (
        int((size - noise + spans).max()) + eos + mode + bool(roll),
        int((noise + spans).max()) + eos + bool(roll),
    )
    total = int((size + 2 * spans).max()) + 2 * eos + mode + 2 * bool(roll)
    return SpanNoise(
        length, noise, spans, weights, modes, vocabulary.require_sentinels(max(most, 1), name), lengths, total,
        vocabulary.eos, vocabulary.pad or 0, roll,
    )


def span_corruption(
    vocabulary: Vocabulary,
    length: int,
    *,
    rate: float = 0.15,
    mean: float = 3.0,
    variant: str = "span",
    roll: bool = False,
    layout: str = "encoder_decoder",
    start_id: int | None = None,
    static_copies: int = 0,
) -> PairObjective:
    """T5's denoising objective and the simple ones it was compared with (Raffel et al. 2020, section 3.3).

    The row is one sequence, whatever segments it packs (T5 also joins documents before it corrupts). Both sides end
    with `vocabulary.eos` where there is one.

    Args:
      vocabulary: `span`, `iid` need sentinels, descending from `size - 1` in T5; `bert`, `mass` need `mask`.
      length: raw tokens per row; `span_corruption_lengths(512)[0]` of them give 512 inputs.
      rate, mean: noise density and mean span length.
      variant: `span`: see `random_spans`. `iid`: independent tokens, neighbours sharing a sentinel. `bert`: independent
        tokens become 90% mask, 10% random, the target is the whole row. `mass`: all mask. `drop`: the noise spans
        vanish from the input, the targets are the noise tokens without sentinels. `deshuffle`: the input is the
        row in random order, the target the row.
      roll: rotate the noise of `span` by a random offset, so that the last token is not always noise.
      layout: `encoder_decoder` or `prefix`, see `PairObjective`.
      start_id: first decoder input, by default `bos`, else `pad` (T5).

    Raises:
      ValueError: too few sentinels, or a bad value.

    >>> vocabulary = Vocabulary(size=32128, pad=0, eos=1, sentinels=tuple(range(32127, 32027, -1)))
    >>> objective = span_corruption(vocabulary, 568)
    >>> objective.input_length, objective.target_length
    (512, 114)
    """
    length = check_length(length)
    rate, mean = check_fraction("rate", rate), _check_mean(mean)
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}: expected one of {', '.join(VARIANTS)}")
    if mean > length:
        raise ValueError(f"mean={mean:g}: a span would be longer than the row of {length} tokens")
    if roll and variant not in ("span", "drop"):
        raise ValueError(f"roll=True: variant '{variant}' draws tokens independently, there is nothing to roll")
    if variant in ("span", "drop"):
        needs = vocabulary if variant == "span" else _without_sentinels(vocabulary, length)
        make: Any = _span_noise("span_corruption", needs, length, [(rate, mean)], (1.0,), (None,), roll)
        if variant == "drop":
            make = Variant(variant, length, rate, make.lengths, vocabulary, make)
        lengths, total = make.lengths, (make.total if variant == "span" else None)
    else:
        total = None
        eos = int(vocabulary.eos is not None)
        most = binomial_quantile(length, rate)
        lengths = (length + eos, (2 * most if variant == "iid" else length) + eos)
        if variant == "iid":
            vocabulary.require_sentinels(max(1, min(most, (length + 1) // 2)), "span_corruption")
        elif variant in ("bert", "mass"):
            vocabulary.require("mask", "span_corruption")
        make = Variant(variant, length, rate, lengths, vocabulary)
    return pair_objective(
        "span_corruption", vocabulary, length, layout, make, lengths, start_id, total, rate=rate,
        static_copies=static_copies, copies_input=variant in ("bert", "mass", "deshuffle"),
        description=f"span_corruption: {variant}, rate {rate:g}, mean span {mean:g}, {layout}",
        expected_spans=make.span_lengths if variant == "span" else None,
    )


def _without_sentinels(vocabulary: Vocabulary, length: int) -> Vocabulary:
    """A stand-in with enough sentinels for the span arithmetic of a variant that never shows one."""
    return Vocabulary(size=vocabulary.size + length, pad=vocabulary.pad, eos=vocabulary.eos,
                      sentinels=tuple(range(vocabulary.size, vocabulary.size + length)))


@dataclass(frozen=True, eq=False)
class Variant:
    """The simple variants of T5's table 5; see `span_corruption`."""

    kind: str
    length: int
    rate: float
    lengths: tuple[int, int]
    vocabulary: Vocabulary
    spans: SpanNoise | None = None

    def __call__(self, key: jax.Array, row: Row, rate) -> Pair:
        if rate is not None:
            raise ValueError("span corruption has static lengths made for its rate: build it with another rate")
        pad, shape, some = self.vocabulary.pad or 0, row.tokens.shape, row.size > 0
        if self.kind == "drop":
            assert self.spans is not None
            noise = self.spans.noise_mask(key, row.size, jnp.int32(0))
        else:
            noise = row.valid & randomness.below(randomness.bits(key, IID, shape), self.rate)
        whole = compact(row.tokens, row.valid, self.lengths[1], pad)
        if self.kind == "iid":
            sentinels = jnp.asarray(self.vocabulary.sentinels, jnp.int32)
            *inputs, targets, target_size = to_sentinels(row, noise, sentinels, self.lengths, pad)
            whole = (targets, target_size)
        elif self.kind == "drop":
            inputs = compact(row.tokens, row.valid & ~noise, self.lengths[0], pad)
            whole = compact(row.tokens, noise, self.lengths[1], pad)
        elif self.kind == "deshuffle":
            order = jnp.argsort(jnp.where(row.valid, randomness.bits(key, SHUFFLE, shape) >> 1, jnp.uint32(2**32 - 1)))
            inputs = compact(row.tokens[order], row.valid[order], self.lengths[0], pad)
        else:
            stands = jnp.full(shape, self.vocabulary.mask, jnp.int32)
            if self.kind == "bert":
                random = randomness.integers(key, SWAP + 1, shape, self.vocabulary.size)
                stands = jnp.where(randomness.below(randomness.bits(key, SWAP, shape), 0.1), random, stands)
            inputs = compact(jnp.where(noise, stands, row.tokens), row.valid, self.lengths[0], pad)
        inputs = append(*inputs, self.vocabulary.eos, some)
        targets = append(*whole, self.vocabulary.eos, some)
        return Pair(*inputs, *targets)


# (mode, mean span or None for a suffix, rate): UL2's seven denoisers (Tay et al. 2022, table 1).
UL2_DENOISERS = (
    ("R", 3.0, 0.15), ("R", 8.0, 0.15), ("S", None, 0.25),
    ("X", 3.0, 0.5), ("X", 8.0, 0.5), ("X", 64.0, 0.15), ("X", 64.0, 0.5),
)


def ul2(
    vocabulary: Vocabulary,
    length: int,
    *,
    denoisers: Sequence[Sequence[Any]] = UL2_DENOISERS,
    weights: Sequence[float] | None = None,
    mode_tokens: Mapping[str, int] | None = None,
    layout: str = "prefix",
    start_id: int | None = None,
    static_copies: int = 0,
) -> PairObjective:
    """UL2's mixture of denoisers: one is drawn for each row (Tay et al. 2022).

    Args:
      vocabulary: needs as many sentinels as the busiest denoiser has spans.
      length: raw tokens per row; the stack reads `objective.output_length`.
      denoisers: (mode, mean span, rate); a mean of None makes the noise one span, which is then the suffix.
      weights: relative chance of each denoiser; equal by default.
      mode_tokens: id put in front of the inputs for each mode, such as {"R": 97, "S": 98, "X": 99}; None for none.
      layout, start_id, static_copies: as in `span_corruption`.

    >>> sentinels = tuple(range(999, 899, -1))
    >>> vocabulary = Vocabulary(size=1000, pad=0, eos=1, sentinels=sentinels, special=(10, 11, 12))
    >>> ul2(vocabulary, 512, mode_tokens={"R": 10, "S": 11, "X": 12}).output_length
    685
    """
    length = check_length(length)
    settings, modes = [], []
    for denoiser in denoisers:
        if len(denoiser) != 3:
            raise ValueError(f"denoiser {denoiser!r}: expected (mode, mean span or None, rate)")
        mode, mean, rate = denoiser
        rate = check_fraction(f"rate of denoiser {mode}", rate, low_open=True)
        if mean is not None and _check_mean(mean) > length:
            raise ValueError(f"denoiser {mode}: mean span {mean:g} is longer than the row of {length} tokens")
        settings.append((rate, math.inf if mean is None else float(mean)))
        modes.append(None if mode_tokens is None else mode_tokens.get(mode))
        if mode_tokens is not None and modes[-1] is None:
            raise ValueError(f"mode_tokens has no id for mode {mode!r}; give one, or mode_tokens=None for none")
        if modes[-1] is not None and modes[-1] not in vocabulary.special_ids:
            raise ValueError(f"mode_tokens[{mode!r}]={modes[-1]}: list it in vocabulary.special")
    if not settings:
        raise ValueError("ul2: no denoisers given")
    weights = tuple(float(w) for w in (weights if weights is not None else [1.0] * len(settings)))
    if len(weights) != len(settings) or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"weights={weights}: expected {len(settings)} numbers of at least 0, some above 0")
    make = _span_noise("ul2", vocabulary, length, settings, weights, tuple(modes), roll=False)
    return pair_objective(
        "ul2", vocabulary, length, layout, make, make.lengths, start_id, make.total, static_copies=static_copies,
        description=f"ul2: {len(settings)} denoisers, {layout}", expected_spans=make.span_lengths,
    )
