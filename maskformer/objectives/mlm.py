"""Masked language modelling: each recipe is a choice of what to select, how to replace it and what to predict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maskformer.checks import choose, number, shown
from maskformer.objectives import randomness, schedules
from maskformer.objectives.compat import COMPAT
from maskformer.objectives.counting import (
    Count,
    binomial_quantile,
    check_copies,
    check_fraction,
    check_length,
    check_slots,
    slots,
)
from maskformer.objectives.lexicon import Lexicon, LexiconUnits
from maskformer.objectives.objective import Masking
from maskformer.objectives.predict import PredictCorrupted, PredictSome
from maskformer.objectives.replace import Replace, check_policy
from maskformer.objectives.rows import Corrupted, Row, Selection
from maskformer.objectives.select import ORDER, Tokens, Words
from maskformer.objectives.select_spans import (
    Spans,
    geometric_lengths,
    inverse_lengths,
    uniform_lengths,
)
from maskformer.objectives.select_weighted import WEIGHT_SOURCES, Bernoulli, Weighted, check_table
from maskformer.objectives.vocabulary import Vocabulary

CONVENTIONS = ("bert", "roberta", "hf")


@dataclass(frozen=True)
class _Common:
    """The checked arguments that all recipes share."""

    length: int
    rate: float | schedules.Schedule
    most: float
    policy: tuple[float, float, float]
    markers: tuple[int, ...]


def _check_common(name, vocabulary, length, rate, replacement, max_predictions, static_copies) -> _Common:
    length = check_length(length)
    rate = schedules.as_rate("rate", rate)
    policy = check_policy(replacement)
    if policy[0] > 0:
        vocabulary.require("mask", name)
    check_slots(max_predictions, length)
    check_copies(static_copies)
    return _Common(length, rate, schedules.maximum(rate), policy, vocabulary.marker_ids)


def _assemble(name, vocabulary, common, select, replace, predict_rate, static_copies, what) -> Masking:
    predict: Any = PredictCorrupted()
    budget = select.most()
    if predict_rate is not None:
        predict_rate = check_fraction("predict_rate", predict_rate, low_open=True)
        if predict_rate > common.most:
            return _disjoint(name, vocabulary, common, select, replace, predict_rate, static_copies, what)
        if predict_rate < common.most:
            predict = PredictSome(Count("round", predict_rate, common.length, minimum=1))
            budget = min(budget, predict.count.largest())
    shown = f"{common.rate:g}" if isinstance(common.rate, float) else common.rate.description
    return Masking(
        name=name,
        vocabulary=vocabulary,
        length=common.length,
        budget=budget,
        rate=common.rate,
        static_copies=int(static_copies),
        needs=tuple(select.needs),
        takes_token_weights=isinstance(select, Weighted) and select.source != "positions",
        description=f"{name}: {what}, rate {shown}, (mask, random, keep) {common.policy}"
        + (f", predicts {predict_rate:g}" if predict_rate is not None else ""),
        select=select,
        replace=replace,
        predict=predict,
        replacement=common.policy,
    )


def mlm(
    vocabulary: Vocabulary,
    length: int,
    *,
    rate: Any = 0.15,
    compat: str = "bert",
    replacement: Sequence[float] = (0.8, 0.1, 0.1),
    whole_word: bool = False,
    predict_rate: float | None = None,
    max_predictions: int | None = None,
    static_copies: int = 0,
) -> Masking:
    """Hide some tokens, predict them from both sides (Devlin et al. 2019; Liu et al. 2019).

    The sequence of every convention is the packed row: all tokens of it that are not padding.

    Args:
      vocabulary: needs `mask` where the policy masks.
      length: tokens per row.
      rate: corruption rate: a fraction, a `Schedule`, or a mapping such as
        `{"schedule": "linear", "start": 0.3, "end": 0.15, "steps": 10000}`.
      compat: `bert` takes min(max_predictions, max(1, round(rate * size))) tokens, never a marker, and its random
        ids may be any id. `roberta` takes floor(rate * size + U) positions, markers included as in fairseq, and its
        random ids are never special. `hf` takes each non-special token with probability `rate`.
      replacement: (mask, random, keep).
      whole_word: hide all pieces of a word or none. `bert` counts tokens and decides mask/random/keep per piece;
        `roberta` counts words and decides per word; `hf` draws per word and decides per piece.
      predict_rate: None predicts all that is corrupted; a lower rate predicts some of it; a multiple of `rate` makes
        that many copies of each row with disjoint masks (Wettig et al. 2022, section 4).
      max_predictions: slots per row; by default what the rate needs, which is the whole row where words are drawn
        whatever their size (`whole_word` of `roberta` and `hf`). Fewer lower the realised rate: words that do not fit
        are passed over, and one longer than `max_predictions` is never hidden.
      static_copies: see `Objective`.

    Raises:
      ValueError: naming the parameter, its value and the fix.

    >>> vocabulary = Vocabulary(size=100, pad=0, unk=1, cls=2, sep=3, mask=4)
    >>> [mlm(vocabulary, 128, compat=c).budget for c in ("bert", "roberta", "hf")]
    [19, 20, 47]
    """
    common = _check_common("mlm", vocabulary, length, rate, replacement, max_predictions, static_copies)
    length = common.length
    never: tuple[int, ...] = ()
    if compat == "bert":
        count = Count("round", common.most, length, minimum=1, maximum=max_predictions)
        if whole_word:
            select: Any = Words(
                count, common.markers, vocabulary.special_ids, vocabulary.size, "tokens", count.largest()
            )
        else:
            select = Tokens(count, common.markers, vocabulary.size)
    elif compat == "roberta":
        never, avoid = vocabulary.special_ids, vocabulary.ids(("pad",))
        count = Count("stochastic", common.most, length, maximum=None if whole_word else max_predictions)
        if whole_word:
            limit = max_predictions or length
            select = Words(count, avoid, vocabulary.special_ids, vocabulary.size, "words", limit)
        else:
            select = Tokens(count, avoid, vocabulary.size)
    elif compat == "hf":
        limit = max_predictions or (length if whole_word else binomial_quantile(length, common.most))
        select = Bernoulli(common.most, limit, vocabulary.special_ids, vocabulary.size, per_word=whole_word)
    else:
        own = isinstance(compat, str) and compat in COMPAT
        hint = f"; '{compat}' is an objective of its own: create('{compat}', ...)" if own else ""
        raise ValueError(f"compat={shown(compat)}: expected one of {', '.join(CONVENTIONS)}{hint}")
    replace = Replace(
        common.policy, vocabulary.mask, vocabulary.size, never, per_unit=whole_word and compat == "roberta"
    )
    what = f"{compat} convention" + (", whole words" if whole_word else "")
    return _assemble("mlm", vocabulary, common, select, replace, predict_rate, static_copies, what)


def span_mlm(
    vocabulary: Vocabulary,
    length: int,
    *,
    rate: Any = 0.15,
    geometric_p: float = 0.2,
    longest: int = 10,
    shortest: int = 1,
    distribution: str = "geometric",
    in_words: bool = True,
    replacement: Sequence[float] = (0.8, 0.1, 0.1),
    per_span: bool = True,
    predict_rate: float | None = None,
    static_copies: int = 0,
) -> Masking:
    """Hide spans of words until ceil(rate * size) tokens are hidden (SpanBERT: Joshi et al. 2020, `masking.py`).

    Args:
      vocabulary, length, rate, replacement, predict_rate, static_copies: as in `mlm`.
      geometric_p, longest: of the `geometric` length distribution, cut at `longest` and renormalised.
      shortest: with `uniform`, the shortest length.
      distribution: `geometric`, `inverse` (P(n) proportional to 1/n) or `uniform` (shortest..longest).
      in_words: lengths count words; else tokens.
      per_span: one mask/random/keep decision for a whole span, touching spans being one; else one per token.

    Raises:
      ValueError: a span can be longer than the row, or another bad value.

    >>> vocabulary = Vocabulary(size=100, pad=0, unk=1, cls=2, sep=3, mask=4)
    >>> span_mlm(vocabulary, 128).budget
    20
    """
    common = _check_common("span_mlm", vocabulary, length, rate, replacement, None, static_copies)
    if longest > common.length:
        raise ValueError(
            f"longest={shown(longest)}: a span would be longer than the row of {common.length} tokens; "
            "lower it or lengthen the rows"
        )
    makers: dict[str, Callable[[], tuple[float, ...]]] = {
        "geometric": lambda: geometric_lengths(geometric_p, longest),
        "inverse": lambda: inverse_lengths(longest),
        "uniform": lambda: uniform_lengths(shortest, longest),
    }
    choose("distribution", distribution, makers)
    count = Count("ceil", common.most, common.length)
    select = Spans(count, makers[distribution](), common.markers, vocabulary.size, in_words)
    replace = Replace(common.policy, vocabulary.mask, vocabulary.size, vocabulary.special_ids, per_unit=per_span)
    what = f"spans of {distribution} length up to {longest} {'words' if in_words else 'tokens'}"
    made = _assemble("span_mlm", vocabulary, common, select, replace, predict_rate, static_copies, what)
    unit = "words" if in_words else "tokens"
    return dataclasses.replace(made, expected_spans=lambda: select.lengths, span_unit=unit)


def ngram_mlm(
    vocabulary: Vocabulary,
    length: int,
    *,
    rate: Any = 0.15,
    longest: int = 3,
    in_words: bool = True,
    replacement: Sequence[float] = (0.8, 0.1, 0.1),
    predict_rate: float | None = None,
    static_copies: int = 0,
) -> Masking:
    """Hide n-grams of words, P(n) proportional to 1/n up to `longest` (ALBERT: Lan et al. 2020, equation 3).

    Arguments as in `span_mlm`; the replacement is decided per token, as ALBERT's data code does.

    >>> vocabulary = Vocabulary(size=100, pad=0, unk=1, cls=2, sep=3, mask=4)
    >>> ngram_mlm(vocabulary, 128).budget
    20
    """
    made = span_mlm(
        vocabulary, length, rate=rate, longest=longest, distribution="inverse", in_words=in_words,
        replacement=replacement, per_span=False, predict_rate=predict_rate, static_copies=static_copies,
    )
    return dataclasses.replace(made, name="ngram_mlm", description=made.description.replace("span_mlm", "ngram_mlm", 1))


def pmi_mlm(
    vocabulary: Vocabulary,
    length: int,
    *,
    ngrams: Iterable[Sequence[int]] | Lexicon | str | None = None,
    rate: Any = 0.15,
    replacement: Sequence[float] = (0.8, 0.1, 0.1),
    predict_rate: float | None = None,
    static_copies: int = 0,
) -> Masking:
    """Hide collocations as wholes (PMI-masking: Levine et al. 2021).

    Every token belongs to the longest entry of `ngrams` that contains it there, or stands alone. Units are hidden in
    random order until round(rate * size) tokens are hidden, one that would overshoot being passed over. Mask, random
    or keep is decided per unit.

    Args:
      ngrams: tuples of 2 or more token ids, a `Lexicon`, or the path of a text file with the ids of one entry on each
        line; `pmi_ngrams` finds them in a corpus.
      vocabulary, length, rate, replacement, predict_rate, static_copies: as in `mlm`.

    >>> vocabulary = Vocabulary(size=100, pad=0, unk=1, cls=2, sep=3, mask=4)
    >>> pmi_mlm(vocabulary, 128, ngrams=[(10, 11), (12, 13, 14)]).budget
    19
    """
    common = _check_common("pmi_mlm", vocabulary, length, rate, replacement, None, static_copies)
    if ngrams is None:
        raise ValueError("objective 'pmi_mlm' needs ngrams: a list of id tuples, or a file of them (see pmi_ngrams)")
    if isinstance(ngrams, str):
        ngrams = Lexicon.read(ngrams)
    lexicon = ngrams if isinstance(ngrams, Lexicon) else Lexicon(ngrams)
    if lexicon.longest > common.length:
        raise ValueError(f"ngrams: an entry of {lexicon.longest} ids is longer than the row of {common.length} tokens")
    if lexicon.largest_id >= vocabulary.size:
        raise ValueError(f"ngrams: id {lexicon.largest_id} is outside the vocabulary of {vocabulary.size}")
    count = Count("round", common.most, common.length, minimum=1)
    select = LexiconUnits(count, lexicon, common.markers, vocabulary.size)
    replace = Replace(common.policy, vocabulary.mask, vocabulary.size, per_unit=True)
    return _assemble("pmi_mlm", vocabulary, common, select, replace, predict_rate, static_copies, "lexicon units")


def conditional_mlm(
    vocabulary: Vocabulary,
    length: int,
    *,
    weights: str = "table",
    table: Any = None,
    scaled: bool = True,
    decay: float | None = None,
    floor: float | None = None,
    rate: Any = 0.15,
    replacement: Sequence[float] = (0.8, 0.1, 0.1),
    predict_rate: float | None = None,
    max_predictions: int | None = None,
    static_copies: int = 0,
) -> Masking:
    """Hide tokens with unequal chances: by frequency, part of speech, tf-idf, position, or a running loss.

    p_i = min(1, c * w_i), with c such that the p_i of a row sum to rate * size; draws are independent.

    Args:
      weights: `table` = `table[token]`; `tf_idf` = term frequency in the row times `table[token]`; `positions` = the
        batch's `select_weights` `[batch, length]`; `loss` = the running mean of the token's own loss, which training
        keeps (adaptive masking): what is not learnt yet is hidden more often. Evaluation hides all tokens alike.
      table: float `[vocabulary.size]`, or the path of a `.npy` file with it; None = all ones. Made by
        `frequency_weights`, `tag_weights`, `inverse_document_frequencies`. A call may replace it:
        `objective(key, batch, token_weights=...)`.
      scaled: False uses the weights of `positions` as the probabilities themselves.
      decay: of the running mean under `loss`, at each step that predicts the token; None means 0.99.
      floor: under `loss`, a token learnt below this loss (in nats) weighs as if it had it, or it would never be
        hidden, and so measured, again; None means 0.1.
      max_predictions: slots per row, by default enough for all but one row in 1e9.
      vocabulary, length, rate, replacement, predict_rate, static_copies: as in `mlm`.

    >>> vocabulary = Vocabulary(size=100, pad=0, unk=1, cls=2, sep=3, mask=4)
    >>> conditional_mlm(vocabulary, 128, weights="positions", scaled=False).budget   # any position may be certain
    128
    """
    common = _check_common("conditional_mlm", vocabulary, length, rate, replacement, max_predictions, static_copies)
    choose("weights", weights, WEIGHT_SOURCES)
    if weights == "positions" and table is not None:
        raise ValueError("table: weights='positions' reads the batch's select_weights; drop one of the two")
    if not scaled and weights != "positions":
        raise ValueError("scaled=False: only weights='positions' gives probabilities; a table gives relative weights")
    adaptive = weights == "loss"
    if adaptive and table is not None:
        raise ValueError("table: weights='loss' makes its own, the running losses; drop one of the two")
    for field, value in (("decay", decay), ("floor", floor)):
        if value is not None and not adaptive:
            raise ValueError(f"{field}={shown(value)}: only weights='loss' keeps a running mean; drop it")
    decay = check_fraction("decay", 0.99 if decay is None else decay)
    floor = 0.1 if floor is None else floor
    # In float32 less would be 0, and more infinite.
    floor = number("floor", floor, "a loss above 0, from 1e-30 to below 1e30", 1e-30, 1e30)
    if weights != "positions":
        table = check_table([1.0] * vocabulary.size if table is None else table, vocabulary.size)
    limit = max_predictions or (binomial_quantile(common.length, common.most) if scaled else common.length)
    select = Weighted(
        common.most, limit, common.markers, vocabulary.size, weights, table, scaled, float(floor) if adaptive else 0.0
    )
    replace = Replace(common.policy, vocabulary.mask, vocabulary.size)
    made = _assemble(
        "conditional_mlm", vocabulary, common, select, replace, predict_rate, static_copies, f"weighted by {weights}"
    )
    return dataclasses.replace(made, token_loss_decay=decay) if adaptive else made


@dataclass(frozen=True, eq=False)
class DisjointCopies(Masking):
    """Several copies of each row whose masks do not overlap: more predictions than any one copy corrupts.

    The result has `copies` rows for each row of the batch, in order.
    """

    select: Tokens = dataclasses.field(kw_only=True)
    copies: int = 2
    total: Count = dataclasses.field(kw_only=True)

    def row(self, key: jax.Array, row: Row, rate, token_weights) -> Corrupted:
        draw = randomness.bits(key, ORDER, row.tokens.shape)
        member = self.select.eligible(row)
        score = jnp.where(member, randomness.sortable(draw), 0.0)
        per_copy = self.select.count(key, row.size, rate)
        rank = jnp.zeros(self.length, jnp.int32).at[jax.lax.top_k(score, self.length)[1]].set(jnp.arange(self.length))
        total = jnp.minimum(self.total(key, row.size), jnp.sum(member, dtype=jnp.int32))

        def copy(number):
            first = number * per_copy
            chosen = member & (rank >= first) & (rank < jnp.minimum(first + per_copy, total))
            own = jax.random.fold_in(key, number)
            tokens, kinds = self.replace(own, row.tokens, Selection(chosen))
            positions, used = slots(chosen, self.budget)
            return Corrupted(
                input_tokens=tokens, segment_ids=row.segment_ids, positions=row.positions,
                predict_positions=positions,
                target_tokens=jnp.where(used, row.tokens[positions], self.vocabulary.pad or 0),
                loss_weights=used.astype(jnp.float32),
                kinds=jnp.where(used, kinds[positions], 0).astype(jnp.int8),
                selected=chosen,
            )

        return jax.vmap(copy)(jnp.arange(self.copies))

    def finish(self, corrupted: Corrupted) -> Corrupted:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), corrupted)


def _disjoint(name, vocabulary, common, select, replace, predict_rate, static_copies, what) -> Masking:
    copies = round(predict_rate / common.most)
    if not isinstance(common.rate, float) or abs(copies * common.most - predict_rate) > 1e-6:
        raise ValueError(
            f"predict_rate={predict_rate:g}: above the corruption rate it is reached by copies with disjoint masks, "
            f"so it must be a multiple of a constant rate ({common.most:g})"
        )
    if not isinstance(select, Tokens):
        raise ValueError(f"predict_rate={predict_rate:g} above rate={common.most:g}: defined for single tokens only")
    return DisjointCopies(
        name=name, vocabulary=vocabulary, length=common.length, budget=select.most(), rate=common.rate,
        static_copies=int(static_copies), needs=tuple(select.needs),
        description=f"{name}: {what}, rate {common.most:g}, {copies} disjoint copies of each row",
        select=select, replace=replace, replacement=common.policy, copies=copies,
        total=Count("round", predict_rate, common.length, minimum=1),
    )
