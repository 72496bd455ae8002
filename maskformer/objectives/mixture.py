"""Several objectives in one run: each row draws which one it follows, with weights that may change with the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maskformer.checks import number, require, shown
from maskformer.objectives import randomness
from maskformer.objectives.objective import Objective
from maskformer.objectives.rows import Corrupted, rows_from_batch
from maskformer.objectives.schedules import Schedule, from_mapping, maximum
from maskformer.objectives.sequence import attend_by_prefix

CHOICE = 100


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MixedRows(Corrupted):
    """`Corrupted` rows of several objectives; `source` int32 `[batch]` says which one each row follows."""

    source: jax.Array | None = None


def to_common_shape(corrupted: Corrupted, length: int, budget: int | None, causal: bool) -> Corrupted:
    """The same predictions in `budget` slots, or at every position where `budget` is None; nothing optional is None."""
    valid = corrupted.segment_ids > 0
    batch = valid.shape[0]
    weights, targets, kinds = corrupted.loss_weights, corrupted.target_tokens, corrupted.kinds
    kinds = jnp.zeros(weights.shape, jnp.int8) if kinds is None else kinds
    denominators = jnp.sum(weights, axis=1) if corrupted.denominators is None else corrupted.denominators
    positions = corrupted.predict_positions
    if positions is not None and budget is None:
        at = (jnp.arange(batch)[:, None], jnp.where(weights > 0, positions, length))

        def scatter(values):
            return jnp.zeros((batch, length), values.dtype).at[at].set(values, mode="drop")

        weights, targets, kinds, positions = scatter(weights), scatter(targets), scatter(kinds), None
    elif positions is not None:
        extra = ((0, 0), (0, budget - weights.shape[1]))
        weights, targets, kinds, positions = (jnp.pad(x, extra) for x in (weights, targets, kinds, positions))
    bidirectional = corrupted.bidirectional
    if bidirectional is None:
        bidirectional = jnp.zeros_like(valid) if causal else valid
    selected = jnp.zeros_like(valid) if corrupted.selected is None else corrupted.selected
    return dataclasses.replace(
        corrupted, predict_positions=positions, target_tokens=targets, loss_weights=weights, kinds=kinds,
        denominators=denominators, bidirectional=bidirectional, selected=selected, units=None,
    )


@dataclass(frozen=True, eq=False)
class Mixture(Objective):
    """See `mixture`."""

    # Rows of different parts are weighted and divided as their own parts do it.
    loss_is_mean = False

    parts: tuple[Objective, ...] = ()
    weights: tuple[float | Schedule, ...] = ()

    @property
    def predicts_next(self) -> bool:  # type: ignore[override]
        return any(part.predicts_next for part in self.parts)

    @property
    def shows_mask(self) -> bool:  # type: ignore[override]
        return any(part.shows_mask for part in self.parts)

    @property
    def never_hidden(self) -> tuple[int, ...]:
        """What none of the parts hides, of those that hide tokens behind [MASK]."""
        hiding = [set(part.never_hidden) for part in self.parts if part.shows_mask]
        return tuple(sorted(set.intersection(*hiding))) if hiding else super().never_hidden

    @property
    def takes_label_smoothing(self) -> bool:  # type: ignore[override]
        return all(part.takes_label_smoothing for part in self.parts)

    @property
    def unmixable(self) -> str | None:
        return "is a mixture already; give its parts and weights to the one"

    def alone(self):
        names = [part.name for part in self.parts]
        made = {}
        for index, name in enumerate(names):
            if maximum(self.weights[index]) > 0:
                told_apart = name if names.count(name) == 1 else f"{name} [{index}]"
                weights = tuple(float(other == index) for other in range(len(names)))
                made[told_apart] = dataclasses.replace(self, weights=weights)
        return made

    def probabilities(self, step) -> jax.Array:
        """float32 `[parts]` at `step`, summing to 1."""
        if step is None and any(isinstance(w, Schedule) for w in self.weights):
            raise ValueError("the weights of the mixture change with the step: call objective(key, batch, step=step)")
        weights = jnp.stack([jnp.float32(w(step) if isinstance(w, Schedule) else w) for w in self.weights])
        return weights / jnp.maximum(jnp.sum(weights), 1e-30)

    def __call__(self, key, batch: Mapping[str, jax.Array], *, step=None, rate=None, token_weights=None) -> MixedRows:
        """As `Objective.__call__`; `rate` and `token_weights` are refused, as they would mean each part's own."""
        if rate is not None or token_weights is not None:
            raise ValueError("a mixture takes no rate or token_weights at the call: set them in its parts")
        rows_from_batch(batch, self.length, self.name, self.needs)
        made = [part(key, batch, step=step if isinstance(part.rate, Schedule) else None) for part in self.parts]
        budget = None if any(m.predict_positions is None for m in made) else self.budget
        made = [to_common_shape(m, self.length, budget, p.predicts_next) for m, p in zip(made, self.parts)]
        epoch, example_id = (jnp.asarray(batch[name], jnp.int32) for name in ("epoch", "example_id"))
        return _mix(self, key, epoch, example_id, self.probabilities(step), tuple(made))

    def attend(self, corrupted):
        return attend_by_prefix(corrupted)

    def as_causal(self):
        return next(filter(None, (part.as_causal() for part in self.parts)), None)

    def transform_logits(self, logits, corrupted):
        """Each row's logits as the objective that it follows has them."""
        for index, part in enumerate(self.parts):
            follows = (corrupted.source == index)[:, None, None]
            logits = jnp.where(follows, part.transform_logits(logits, corrupted), logits)
        return logits


@partial(jax.jit, static_argnums=0)
def _mix(objective: Mixture, key, epoch, example_id, probabilities, made) -> MixedRows:
    keys = randomness.row_keys(key, epoch, example_id)
    draw = jax.vmap(lambda k: randomness.uniform(k, CHOICE))(keys)
    # The last part of positive weight takes what rounding leaves above the cumulative sum.
    source = jnp.sum(draw[:, None] >= jnp.cumsum(probabilities)[None, :-1], axis=1)

    def pick(*leaves):
        stacked = jnp.stack(leaves)
        return jnp.take_along_axis(stacked, source.reshape(1, -1, *[1] * (stacked.ndim - 2)), axis=0)[0]

    mixed = jax.tree.map(pick, *made)
    fields = {f.name: getattr(mixed, f.name) for f in dataclasses.fields(Corrupted)}
    return MixedRows(**fields, source=source.astype(jnp.int32))


def mixture(
    parts: Sequence[Objective], weights: Sequence[Any] | None = None, *, name: str = "mixture"
) -> Mixture:
    """One objective out of several: every row draws one of `parts`, statelessly.

    One stack of layers serves all parts under one mask: causal, and both ways between the positions that a row's
    objective reads so. All parts are computed and one is kept, which costs less than the draw of a batch per objective
    and never recompiles. A swap in mid-run is a pair of `schedules.step` weights.

    Args:
      parts: objectives on one stack, of the same row length and vocabulary.
      weights: relative weights, constants or schedules of the step; equal by default. They are normalised at
        every step.

    >>> from maskformer.objectives import Vocabulary, create
    >>> vocabulary = Vocabulary(size=100, pad=0, mask=4)
    >>> mixture([create("mlm", vocabulary, 16), create("causal_lm", vocabulary, 16)], [0.7, 0.3]).budget
    16
    """
    parts = tuple(parts)
    if not parts:
        raise ValueError("mixture: no objectives given")
    first = parts[0]
    for part in parts:
        if part.output_length != part.length or part.length != first.length:
            raise ValueError(
                f"mixture: '{part.name}' turns rows of {part.length} into {part.output_length} tokens; all parts must "
                f"keep rows of {first.length}"
            )
        if part.vocabulary != first.vocabulary:
            raise ValueError(f"mixture: '{part.name}' was built with another vocabulary than '{first.name}'")
        if part.unmixable is not None:
            raise ValueError(f"mixture: '{part.name}' {part.unmixable}")
    weights = tuple(weights) if weights is not None else (1.0,) * len(parts)
    if len(weights) != len(parts):
        raise ValueError(f"mixture: {len(parts)} objectives and {len(weights)} weights")
    checked = tuple(
        w if isinstance(w, Schedule) else from_mapping("weight", w) if isinstance(w, Mapping) else _weight(w)
        for w in weights
    )
    if not any(isinstance(w, Schedule) or w > 0 for w in checked):
        raise ValueError(f"mixture: weights={shown(weights)}: at least one must be above 0")
    return Mixture(
        name, first.vocabulary, first.length, max(part.budget for part in parts),
        needs=tuple(dict.fromkeys(need for part in parts for need in part.needs)),
        description=f"{name} of " + ", ".join(f"{p.name} ({w if isinstance(w, float) else w.description})"
                                              for p, w in zip(parts, checked)),
        parts=parts, weights=checked,
    )


def _weight(weight: Any) -> float:
    # A float32 sum of what is larger or smaller would be infinite, or 0.
    expected = "a number of at least 0: 0, or between 1e-30 and 1e30"
    weight = number("weight", weight, expected, 0.0, 1e30)
    require(weight == 0 or weight > 1e-30, "weight", weight, expected)
    return weight
