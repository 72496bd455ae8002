"""Proof, before a step is spent, that nothing predicted can be read off what the model sees.

Three questions are asked of real rows:

1. *Targets.* Follow every token of the row from the batch into the corrupted input and into the targets. Does any
   prediction reach, through the declared masks of all layers, an input place that shows its own answer?
2. *Segments.* Do the declared masks, through all layers, connect two packed documents, or a token with padding?
3. *Influence.* With random weights, does any logit respond to an input that the declared masks keep from it?

The first two need only the objective; the third runs the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.inspection.declared import Example, Layers, Network, check_single_stack, declared_layers
from maskformer.inspection.reachability import Hop, Stack, forbidding_term, stack_of
from maskformer.masks import Mask
from maskformer.models import Params
from maskformer.objectives import KEEP, Corrupted, Objective, Vocabulary

# Relabellings of the text: a replacement that equals the hidden token by chance does so in one of them, not in all.
_RELABELLINGS = 3
# Relative change of a logit below which it is rounding: matrix products of other rows may be summed in another order.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Leak:
    """One offending pair.

    Attributes:
      kind: `target`, `segment` or `influence`.
      row: row of the batch.
      query, key: places in the row: the prediction or reader, and the input that it must not see.
      message: what is wrong, in one line.
      path: the hops from query to key, last layer first; empty where the place sees itself or the path is undeclared.
    """

    kind: str
    row: int
    query: int
    key: int
    message: str
    path: tuple[Hop, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"row {self.row}: {self.message}", *(f"  {hop}" for hop in self.path)])


@dataclass(frozen=True)
class LeakReport:
    """What `check_leaks` found: the first leak of each kind in each row, and how much was looked at.

    `parts` are those of a mixture, each looked at in `rows / len(parts)` rows that all follow it; empty otherwise.
    `responsive` is the share of the (output, input) pairs allowed by the masks to which the model responds: where
    it is small, that nothing else responds says little. None where no model was run.
    """

    objective: str
    leaks: tuple[Leak, ...]
    rows: int
    predictions: int
    influences: int
    responsive: float | None = None
    parts: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.leaks

    def __str__(self) -> str:
        looked = f"{self.rows} rows, {self.predictions} predictions"
        if self.parts:
            each = f"{self.rows // len(self.parts)} rows of each part, {' and '.join(self.parts)}"
            looked = f"{each}: {self.predictions} predictions"
        if self.responsive is not None:
            looked += f", {self.influences} (output, input) pairs, {self.responsive:.0%} of the allowed ones respond"
        if self.ok:
            return f"objective '{self.objective}': no leak found ({looked})"
        return "\n".join([f"objective '{self.objective}' leaks ({looked}):", *map(str, self.leaks)])

    def raise_if_leaking(self) -> None:
        """ValueError with the report where there is a leak."""
        if not self.ok:
            raise ValueError(str(self))


def check_leaks(
    objective: Objective,
    batch: Mapping[str, Any],
    *,
    key: jax.Array | None = None,
    model: Network | None = None,
    params: Params | None = None,
    apply: Callable[..., jax.Array] | None = None,
    embed: Callable[[jax.Array], jax.Array] | None = None,
    layer_masks: Callable[[Corrupted], Sequence[Mask]] | None = None,
    layers: int = 2,
    rows: int = 2,
    cross_segments: bool = False,
    **call: Any,
) -> LeakReport:
    """Looks for leaks in the first `rows` rows of `batch` (see the module's three questions).

    Of a mixture, every part that has weight at any step is looked at in all these rows, whatever the step draws.

    Args:
      objective: what is checked; its `attend` is the declared mask of every layer.
      batch: rows as the pipeline gives them. Their text is relabelled; lengths, segments and words are kept.
      key: the run's key; any key will do.
      model: a model of one stack, in float32. Its own masks are and-ed to the objective's, as it does itself.
      params: weights of `model`; random ones by default.
      apply: in place of `model`, `apply(inputs, corrupted, mask) -> logits [batch, length, ...]`, called on copies of
        one row; `inputs` is what `embed` makes of tokens, or the tokens themselves.
      embed: `embed(tokens) -> float [batch, length, width]`: influence is then the Jacobian with respect to it, else
        a response to the exchange of a token.
      layer_masks: `layer_masks(corrupted)`, the declared mask of each layer; by default the objective's `attend`, and
        the model's pattern, `layers` times.
      layers: how many, where no model says it.
      rows: how many rows to look at; the influence costs `length` forward passes for each.
      cross_segments: packed documents are meant to see each other.
      **call: what the objective's call needs: `step=`, `rate=`.

    Returns:
      a `LeakReport`; `report.raise_if_leaking()` makes an error of it.
    """
    settings: dict[str, Any] = dict(
        key=key, model=model, params=params, apply=apply, embed=embed, layer_masks=layer_masks, layers=layers,
        rows=rows, cross_segments=cross_segments, **call,
    )
    parts = objective.alone()
    if not parts:
        return _check_rows(objective, batch, **settings)
    reports = {name: _check_rows(part, batch, **settings) for name, part in parts.items()}
    return _joined(objective.name, reports)


def _check_rows(
    objective: Objective, batch: Mapping[str, Any], *, key, model, params, apply, embed, layer_masks, layers, rows,
    cross_segments, **call: Any,
) -> LeakReport:
    """`check_leaks` of the rows as the objective makes them."""
    check_tokens(objective, batch)
    key = jax.random.key(0) if key is None else key
    rows = min(rows, batch["tokens"].shape[0])
    batch = {name: np.asarray(value)[:rows] for name, value in batch.items()}
    relabelled = [relabel(objective, batch, turn) for turn in range(_RELABELLINGS)]
    made = [jax.tree.map(np.asarray, objective(key, one, **call)) for one in relabelled]
    copies = made[0].target_tokens.shape[0] // rows
    if layer_masks is None:
        declared = declared_layers(objective, made[0], model, layers)
    else:
        declared = tuple(reads for mask in layer_masks(made[0]) for reads in made[0].stacks(mask))
    run = _runner(objective, model, params, apply, made[0], key)
    leaks: list[Leak] = []
    predictions = influences = 0
    responses: list[float] = []
    for row in range(rows * copies):
        places = _places(made[0], row)
        stack = stack_of(made[0].sides(), declared, row)
        reached = stack.reach()
        predictions += int(np.sum(made[0].loss_weights[row] > 0))
        sources = [one["tokens"][row // copies] for one in relabelled]
        leaks += _target_leaks(objective, made, sources, row, stack, reached)
        if not cross_segments:
            leaks += _segment_leaks(places, row, stack, reached)
        if run is not None:
            found = run(row, embed)
            influences += found.size
            real = places.segments > 0
            allowed = reached[-1] & real[:, None] & real[None, :]
            responses.append(float(found[allowed].mean()) if allowed.any() else 0.0)
            leaks += _influence_leaks(found, row, stack, reached, declared)
    responsive = float(np.mean(responses)) if responses else None
    return LeakReport(objective.name, tuple(leaks), rows * copies, predictions, influences, responsive)


def _joined(name: str, reports: Mapping[str, LeakReport]) -> LeakReport:
    """One report of a mixture's parts."""
    found = tuple(
        dataclasses.replace(leak, message=f"part '{part}': {leak.message}")
        for part, report in reports.items()
        for leak in report.leaks
    )
    shares = [report.responsive for report in reports.values() if report.responsive is not None]
    return LeakReport(
        objective=name,
        leaks=found,
        rows=sum(report.rows for report in reports.values()),
        predictions=sum(report.predictions for report in reports.values()),
        influences=sum(report.influences for report in reports.values()),
        # The least: a part that hardly responds is not to hide behind one that does.
        responsive=min(shares) if shares else None,
        parts=tuple(reports),
    )


def check_tokens(objective: Objective, batch: Mapping[str, Any]) -> None:
    """ValueError where the text already holds ids that the objective puts in: the mask, a sentinel, or no id at all.

    A model could not tell such a token from a hidden one. Runs on the host.
    """
    vocabulary = objective.vocabulary
    tokens = np.asarray(batch["tokens"])[np.asarray(batch["segment_ids"]) > 0]
    outside = tokens[(tokens < 0) | (tokens >= vocabulary.size)]
    if outside.size:
        raise ValueError(
            f"the batch holds token {outside[0]}, outside the vocabulary of {vocabulary.size}: "
            "the vocabulary must be that of the tokenizer that made the data"
        )
    for name in ("mask", "sentinels"):
        found = np.isin(tokens, vocabulary.ids((name,)))
        if found.any():
            raise ValueError(
                f"the batch holds {found.sum()} tokens with id {tokens[found][0]}, which vocabulary.{name} reserves: "
                "choose ids that the text does not use"
            )


def relabel(objective: Objective, batch: Mapping[str, np.ndarray], turn: int) -> dict[str, np.ndarray]:
    """The batch with other text: no token twice in a row where the vocabulary allows, none as in another turn."""
    vocabulary = objective.vocabulary
    special = np.zeros(vocabulary.size, bool)
    special[list(vocabulary.special_ids)] = True
    text = np.flatnonzero(~special)
    tokens = batch["tokens"]
    length = tokens.shape[1]
    random = np.random.default_rng(0)
    fresh = np.empty_like(tokens)
    for row in range(tokens.shape[0]):
        if len(text) >= length + _RELABELLINGS:
            fresh[row] = np.roll(random.permutation(text), turn)[:length]
        else:
            fresh[row] = np.random.default_rng([turn, row]).choice(text, length)
    is_text = ~special[tokens] & (batch["segment_ids"] > 0)
    return {**batch, "tokens": np.where(is_text, fresh, tokens)}


@dataclass(frozen=True)
class _Places:
    """The places of one row of output, encoder before decoder where there are both."""

    tokens: np.ndarray
    segments: np.ndarray
    first_predicting: int


def _places(example: Example, row: int) -> _Places:
    sides = example.sides()
    return _Places(
        np.concatenate([side.tokens[row] for side in sides]),
        np.concatenate([side.segment_ids[row] for side in sides]),
        sum(side.tokens.shape[1] for side in sides[:-1]),
    )


def _answers(corrupted: Example, row: int, source: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, ...]:
    """(place, source position, kept) of every prediction of a token of the text."""
    where = np.full(int(max(source.max(), corrupted.target_tokens.max())) + 1, -1)
    where[source[text]] = np.flatnonzero(text)
    weights, targets = corrupted.loss_weights[row], corrupted.target_tokens[row]
    place = _places(corrupted, row).first_predicting + np.asarray(corrupted.places[row])
    kept = np.zeros(len(targets), bool) if corrupted.kinds is None else corrupted.kinds[row] == KEEP
    asked = (weights > 0) & (where[targets] >= 0)
    return place[asked], where[targets[asked]], kept[asked]


def _target_leaks(objective, made, sources, row, stack: Stack, reached) -> list[Leak]:
    """A prediction that reaches a place where its own answer stands, in every relabelling."""
    suspects: list[dict[int, tuple[int, int]]] = []
    asked: list[set[int]] = []
    special = np.zeros(objective.vocabulary.size, bool)
    special[list(objective.vocabulary.special_ids)] = True
    for corrupted, source in zip(made, sources):
        text = ~special[source]
        places = _places(corrupted, row)
        place, answer, kept = _answers(corrupted, row, source, text)
        seen: dict[int, tuple[int, int]] = {}
        for i, s, keep in zip(place, answer, kept):
            shows = reached[-1][i] & (places.tokens == source[s]) & (places.segments > 0)
            if objective.copies_input:
                # What the encoder (or the prefix) shows of the answer is the task; what the decoder shows is not.
                shows &= _decoding(corrupted, row, places)
            if keep:
                shows[i] = False
            if shows.any():
                seen.setdefault(int(s), (int(i), int(np.flatnonzero(shows)[0])))
        suspects.append(seen)
        asked.append(set(map(int, answer)))
    for s, (i, j) in suspects[0].items():
        turns = [turn for turn in range(len(made)) if s in asked[turn]]
        if len(turns) > 1 and all(s in suspects[turn] for turn in turns):
            how = "which stands there" if i == j else f"which stands at {stack.names(j)}"
            message = f"the prediction at {stack.names(i)} is token {s} of the row, {how} in the input"
            return [Leak("target", row, i, j, message, stack.path(i, j, reached))]
    return []


def _decoding(corrupted: Example, row: int, places: _Places) -> np.ndarray:
    """bool: places of the side that predicts, without a prefix that is read both ways."""
    decoding = np.arange(len(places.tokens)) >= places.first_predicting
    if corrupted.bidirectional is not None:
        decoding[places.first_predicting :] &= ~corrupted.bidirectional[row]
    return decoding


def _segment_leaks(places: _Places, row: int, stack: Stack, reached) -> list[Leak]:
    real = places.segments > 0
    joined = reached[-1] & (places.segments[:, None] != places.segments[None, :]) & real[:, None]
    if not joined.any():
        return []
    i, j = (int(x[0]) for x in np.nonzero(joined))
    other = f"segment {places.segments[j]}" if places.segments[j] else "padding"
    message = f"{stack.names(i)} of segment {places.segments[i]} sees {stack.names(j)} of {other}"
    return [Leak("segment", row, i, j, message, stack.path(i, j, reached))]


def _influence_leaks(found: np.ndarray, row: int, stack: Stack, reached, layers: Layers) -> list[Leak]:
    undeclared = found & ~reached[-1]
    if not undeclared.any():
        return []
    i, j = (int(x[0]) for x in np.nonzero(undeclared))
    mask = layers[-1][0].mask
    term = forbidding_term(mask.select(row if mask.shape[0] > 1 else 0, 0), i, j)
    message = f"the logits of {stack.names(i)} respond to {stack.names(j)}, which {term} keeps from it in every layer"
    return [Leak("influence", row, i, j, message)]


def _runner(objective: Objective, model: Network | None, params: Params | None, apply, corrupted, key):
    """`run(row, embed) -> bool [length, length]`, the observed influence of inputs on outputs; None without a model."""
    check_single_stack(objective, apply)
    if model is None and apply is None:
        return None
    if apply is None:
        assert model is not None
        weights = model.init(key) if params is None else params

        def apply(tokens, one, mask):
            return model.apply(weights, **{**one.inputs(mask), "tokens": tokens, "predict_positions": None})

    def run(row: int, embed) -> np.ndarray:
        one = jax.tree.map(lambda x: jnp.asarray(x)[row : row + 1], corrupted)
        if embed is not None:
            return influence_by_jacobian(lambda x: apply(x, one, objective.attend(one)), embed(one.input_tokens))
        return influence_by_exchange(
            lambda tokens, copies: apply(tokens, copies, objective.attend(copies)), one, objective.vocabulary
        )

    return run


def influence_by_exchange(apply: Callable[..., jax.Array], one: Corrupted, vocabulary: Vocabulary) -> np.ndarray:
    """bool `[length, length]`: do the logits at i change when the input token at j is exchanged?

    `apply(tokens, corrupted) -> [batch, length, ...]` gets copies of `one`, which has one row; copy j + 1 has another
    token at j.
    """
    length, together = one.input_tokens.shape[1], 8
    text = np.setdiff1d(np.arange(vocabulary.size), vocabulary.special_ids)
    copies = jax.tree.map(lambda x: jnp.repeat(x, together + 1, axis=0), one)
    original = np.asarray(one.input_tokens[0])

    @jax.jit
    def changes(tokens):
        logits = apply(tokens, copies).astype(jnp.float32)
        base = logits[:1]
        difference = jnp.max(jnp.abs(logits[1:] - base).reshape(together, length, -1), axis=-1)
        return difference / jnp.maximum(jnp.max(jnp.abs(base)), 1e-30)

    influence = np.zeros((length, length), bool)
    for first in range(0, length, together):
        places = np.minimum(np.arange(first, first + together), length - 1)
        tokens = np.repeat(original[None], together + 1, axis=0)
        for copy, place in enumerate(places):
            others = text[text != original[place]]
            tokens[copy + 1, place] = others[(7 * place) % len(others)]
        changed = np.asarray(changes(jnp.asarray(tokens))) > _ROUNDING
        influence[:, places] |= changed.T
    return influence


def influence_by_jacobian(apply: Callable[[jax.Array], jax.Array], inputs: jax.Array) -> np.ndarray:
    """bool `[length, length]`: where the Jacobian d logits_i / d inputs_j is not zero.

    Args:
      apply: `[1, length, width] -> [1, length, ...]`, differentiable.
      inputs: float `[1, length, width]`.
    """
    logits, pull = jax.vjp(apply, inputs)
    length = inputs.shape[1]
    # One random direction of the logits at a time: a Jacobian that is not zero is orthogonal to it with probability 0.
    direction = jax.random.normal(jax.random.key(0), logits.shape, logits.dtype)

    def gradient(i):
        at = jnp.arange(length).reshape(1, -1, *[1] * (logits.ndim - 2)) == i
        return jnp.max(jnp.abs(pull(jnp.where(at, direction, 0))[0][0]), axis=-1)

    sizes = np.asarray(jax.lax.map(gradient, jnp.arange(length)))
    return sizes > _ROUNDING * max(sizes.max(), 1e-30)
