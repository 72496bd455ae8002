"""What an objective does to real batches, counted before a step is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from maskformer.checks import printable
from maskformer.inspection.declared import Example, Network, declared_layers
from maskformer.inspection.leaks import check_tokens, relabel
from maskformer.objectives import KEEP, MASK, RANDOM, Objective

# How a token of a sample row is shown.
STYLES = ("plain", "mask", "random", "keep", "hidden", "special", "prefix", "target", "padding")


@dataclass(frozen=True)
class SampleRow:
    """One row as (text, style) pairs: the original, what the model reads, and what it is asked."""

    original: tuple[tuple[str, str], ...]
    inputs: tuple[tuple[str, str], ...]
    targets: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class MaskReport:
    """Counts over the batches that were looked at.

    Attributes:
      objective: its description. rows, tokens: how much was looked at (tokens without padding).
      step: the training step whose rates and weights were looked at; None where none was given.
      corrupted_rate: share of the tokens that the input hides or changes.
      predicted_per_batch: (least, mean, most) predicted tokens in a batch.
      predicted_rate: predicted tokens over tokens.
      slots: static prediction slots in a row; slots_used: mean share of them in use; slots_full: share of rows that
        use all of them (many such rows mean that `max_predictions` cuts the rate).
      coverage: float `[length]`, share of the tokens at each position that are hidden or changed; nan where there is
        none.
      span_unit: `words` or `tokens`; span_lengths: share of the spans of each length 1, 2, ...
      target_lengths: the distribution that the objective aims at, or None where it has none. Spans that touch are
        counted as one and the last is cut to the budget, so the two differ a little by design.
      replacement: shares of (mask, random, keep) among predicted tokens, or None.
      attended_fraction: share of all (query, key) pairs of a row, padding included, that may attend.
      flops_per_token: (dense, active) training FLOPs per input token, or None without a model.
      samples: rows to look at.
    """

    objective: str
    rows: int
    tokens: int
    corrupted_rate: float
    predicted_per_batch: tuple[int, float, int]
    predicted_rate: float
    slots: int
    slots_used: float
    slots_full: float
    coverage: np.ndarray
    span_unit: str
    span_lengths: tuple[float, ...]
    target_lengths: tuple[float, ...] | None
    replacement: tuple[float, float, float] | None
    attended_fraction: float
    flops_per_token: tuple[float, float] | None
    samples: tuple[SampleRow, ...]
    step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the sample rows, in plain Python types, for JSON."""
        plain = {name: value for name, value in vars(self).items() if name != "samples"}
        return {**plain, "coverage": [None if math.isnan(x) else float(x) for x in self.coverage]}

    def to_text(self, color: bool = False, width: int = 100) -> str:
        """The report for a terminal; `color` adds ANSI colours to the sample rows."""
        from maskformer.inspection.report_render import to_text

        return to_text(self, color, width)

    def to_html(self) -> str:
        """The report as one HTML page without any outside reference."""
        from maskformer.inspection.report_render import to_html

        return to_html(self)


def mask_report(
    objective: Objective,
    batches: Iterable[Mapping[str, Any]],
    *,
    key: jax.Array | None = None,
    decode: Callable[[int], str] | None = None,
    samples: int = 3,
    model: Network | None = None,
    **call: Any,
) -> MaskReport:
    """Runs an objective over batches and counts what it does.

    Args:
      objective: what is looked at.
      batches: as the pipeline gives them; a few hundred rows make the shares exact to a percent.
      key: the run's key, so that the rows are those the run will see.
      decode: the text of one token id, shown as one line that a terminal only shows; by default the id itself.
      samples: rows to show.
      model: one stack; its own masks are and-ed to the objective's, and it says how many FLOPs it takes.
      **call: what the objective's call needs: `step=`, `rate=`.

    Raises:
      ValueError: there is no batch.
    """
    key = jax.random.key(0) if key is None else key
    decode = decode or str
    counts = _Counts(objective)
    shown: list[SampleRow] = []
    for batch in batches:
        batch = {name: np.asarray(value) for name, value in batch.items()}
        check_tokens(objective, batch)
        # Twice: as it is, for the counts, and with unique tokens, which tell where each token went.
        made = jax.tree.map(np.asarray, objective(key, batch, **call))
        marked = relabel(objective, batch, 0)
        traced = made if made.selected is not None else objective(key, marked, **call)
        hidden = _hidden(objective, jax.tree.map(np.asarray, traced), marked)
        counts.add(batch, made, hidden, model)
        while len(shown) < min(samples, len(batch["tokens"])) and hidden.shape[0] == len(batch["tokens"]):
            row = len(shown)
            shown.append(_sample(objective, batch["tokens"][row], made, hidden[row], row, decode))
    if not counts.rows:
        raise ValueError("mask_report: no batches given")
    step = call.get("step")
    return counts.finish(tuple(shown), model, None if step is None else int(step))


def _hidden(objective: Objective, made: Example, marked: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool `[rows, length]`: tokens of the row that the input does not show, or shows changed."""
    tokens, valid = marked["tokens"], marked["segment_ids"] > 0
    if made.selected is not None:
        return np.asarray(made.selected)
    if objective.predicts_next:
        return np.zeros(valid.shape, bool)
    source = objective.source(made)
    hidden = np.zeros(valid.shape, bool)
    for row in range(len(tokens)):
        # A marker may stand more than once in a row: as many as are left out count as hidden, from the end.
        shown = np.asarray(source.tokens[row])[np.asarray(source.segment_ids[row]) > 0]
        ids, given = np.unique(shown, return_counts=True)
        left = dict(zip(ids.tolist(), given.tolist()))
        for position in np.flatnonzero(valid[row]):
            token = int(tokens[row, position])
            hidden[row, position] = left.get(token, 0) == 0
            left[token] = left.get(token, 0) - 1
    return hidden


class _Counts:
    """Running sums of a report."""

    def __init__(self, objective: Objective):
        self.objective = objective
        self.rows = self.tokens = self.hidden = 0
        self.predicted: list[int] = []
        self.slots_used: list[float] = []
        self.covered = np.zeros(objective.length)
        self.present = np.zeros(objective.length)
        self.kinds = np.zeros(3, int)
        self.spans = np.zeros(objective.length + 1, int)
        self.attended: list[float] = []
        self.length = objective.output_length

    def add(
        self, batch: Mapping[str, np.ndarray], made: Example, hidden: np.ndarray, model: Network | None
    ) -> None:
        copies = len(hidden) // len(batch["tokens"])
        valid = np.repeat(batch["segment_ids"] > 0, copies, axis=0)
        weights = made.loss_weights
        self.rows += len(batch["tokens"])
        self.tokens += int(valid.sum())
        self.hidden += int((hidden & valid).sum())
        self.covered += (hidden & valid).sum(0)
        self.present += valid.sum(0)
        self.predicted.append(int((weights > 0).sum()))
        self.slots_used += list((weights > 0).mean(1))
        if made.kinds is not None:
            self.kinds += np.bincount(made.kinds[weights > 0], minlength=3)[:3]
        starts = batch.get("word_starts") if self.objective.span_unit == "words" else None
        for row in range(len(hidden)):
            source = row // copies
            lengths = _span_lengths(
                hidden[row], batch["segment_ids"][source], None if starts is None else starts[source]
            )
            np.add.at(self.spans, lengths, 1)
        self.attended += _attended(self.objective, made, model)

    def finish(self, samples: tuple[SampleRow, ...], model: Network | None, step: int | None) -> MaskReport:
        predicted, kinds = np.array(self.predicted), self.kinds.tolist()
        total = sum(kinds)
        longest = int(np.flatnonzero(self.spans).max(initial=0))
        spans = self.spans[1 : longest + 1] / max(self.spans.sum(), 1)
        with np.errstate(invalid="ignore"):
            coverage = self.covered / self.present
        share = predicted.sum() / max(self.tokens, 1)
        fraction = float(np.mean(self.attended)) if self.attended else float("nan")
        flops = None
        if model is not None:
            slots = self.objective.budget / self.length
            flops = (
                float(model.flops_per_token(self.length, slots, attended=None)),
                float(model.flops_per_token(self.length, slots, attended=fraction * self.length)),
            )
        return MaskReport(
            objective=self.objective.description or self.objective.name,
            rows=self.rows,
            tokens=self.tokens,
            corrupted_rate=self.hidden / max(self.tokens, 1),
            predicted_per_batch=(int(predicted.min()), float(predicted.mean()), int(predicted.max())),
            predicted_rate=float(share),
            slots=self.objective.budget,
            slots_used=float(np.mean(self.slots_used)),
            slots_full=float(np.mean(np.array(self.slots_used) >= 1.0)),
            coverage=coverage,
            span_unit=self.objective.span_unit,
            span_lengths=tuple(map(float, spans)),
            target_lengths=self.objective.expected_spans() if self.objective.expected_spans else None,
            replacement=(kinds[0] / total, kinds[1] / total, kinds[2] / total) if sum(kinds) else None,
            attended_fraction=fraction,
            flops_per_token=flops,
            samples=samples,
            step=step,
        )


def _span_lengths(hidden: np.ndarray, segments: np.ndarray, starts: np.ndarray | None) -> np.ndarray:
    """Lengths of the runs of hidden tokens that lie in one segment, in tokens or in the words that begin in them."""
    edge = hidden & ~np.concatenate([[False], hidden[:-1] & (segments[1:] == segments[:-1])])
    run = np.cumsum(edge)[hidden]
    counted = np.ones(hidden.sum(), int) if starts is None else starts[hidden].astype(int)
    lengths = np.bincount(run, weights=counted, minlength=1)[1:].astype(int)
    return np.maximum(lengths, 1)


def _attended(objective: Objective, made: Example, model: Network | None, most: int = 4) -> list[float]:
    """Share of the (query, key) pairs of some rows that may attend, over all layers of `model` where it is given."""
    lengths = [side.tokens.shape[1] for side in made.sides()]
    reads = [one for layer in declared_layers(objective, made, model, layers=1) for one in layer]
    pairs = sum(lengths[one.query] * lengths[one.key] for one in reads)
    shares = []
    for row in range(min(most, len(made.target_tokens))):
        active = 0.0
        for one in reads:
            batch, heads = one.mask.shape
            at = row if batch > 1 else 0
            shape = lengths[one.query], lengths[one.key]
            active += float(np.mean([np.asarray(one.mask.select(at, h).dense(*shape)).sum() for h in range(heads)]))
        shares.append(active / pairs)
    return shares


def _sample(
    objective: Objective, tokens: np.ndarray, made: Example, hidden: np.ndarray, row: int, decode: Callable[[int], str]
) -> SampleRow:
    vocabulary = objective.vocabulary

    def style(token: int, otherwise: str) -> str:
        if token == vocabulary.mask:
            return "mask"
        return "special" if token in vocabulary.special_ids and otherwise == "plain" else otherwise

    def line(ids: Iterable[int], styles: Iterable[str]) -> tuple[tuple[str, str], ...]:
        # A token may hold anything, and is never to reach a terminal as it is.
        return tuple((printable(decode(int(i))), s) for i, s in zip(ids, styles) if int(i) != vocabulary.pad)

    original = line(tokens, ["hidden" if h else style(int(t), "plain") for t, h in zip(tokens, hidden)])
    shown = made.sides()[0].tokens[row]
    styles = [style(int(t), "plain") for t in shown]
    weights, positions = made.loss_weights[row], np.asarray(made.places[row])
    names = {MASK: "mask", RANDOM: "random", KEEP: "keep"}
    if made.kinds is not None:
        for slot in np.flatnonzero(weights > 0):
            styles[positions[slot]] = names[int(made.kinds[row, slot])]
    elif made.bidirectional is not None:
        styles = ["prefix" if both and s == "plain" else s for both, s in zip(made.bidirectional[row], styles)]
    asked = made.target_tokens[row][weights > 0]
    return SampleRow(original, line(shown, styles), line(asked, [style(int(t), "target") for t in asked]))
