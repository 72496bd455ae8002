"""An objective is a composition: select positions, replace them, weight the predictions, say who attends to whom."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maskformer import masks
from maskformer.objectives import loss as losses
from maskformer.objectives import randomness
from maskformer.objectives.counting import slots
from maskformer.objectives.predict import PredictCorrupted
from maskformer.objectives.rows import Corrupted, Row, Selection, Side, rows_from_batch
from maskformer.objectives.schedules import Schedule
from maskformer.objectives.vocabulary import Vocabulary


def attend_within_segments(corrupted: Corrupted) -> masks.Mask:
    """Bidirectional attention inside each packed segment. Padding (segment 0) sees padding only, and is never read.

    Said as documents, which are the segments of a packed row: each is one run.
    """
    return masks.documents(corrupted.segment_ids)


@dataclass(frozen=True, eq=False)
class Objective:
    """Common part of all objectives on one stack of layers.

    An objective is immutable, holds no random state, and may be called inside or outside `jax.jit`:
    `objective(key, batch)` gives the same corruption of an example in whatever batch, order or sharding it comes.

    Attributes:
      name: as given to `create`.
      vocabulary: special ids.
      length: tokens per row, L.
      budget: prediction slots per row, P. `length` when every position predicts.
      rate: corruption rate, constant or a `Schedule` of the step.
      static_copies: 0 = a new corruption every epoch; k = k fixed corruptions per example, taken in turn.
      needs: batch keys it reads beyond the usual ones: `word_starts`, `select_weights`.
      takes_token_weights: it selects by a token's weight, which a call may replace.
      copies_input: the targets repeat tokens that the input shows, by design (denoising); `check_leaks` then looks at
        the decoder's side only.
      description: one line for logs.
      token_loss_decay: not None where the weight of a token is to be a running mean of its loss (adaptive masking): the
        share of the old mean that stays. Training keeps the mean; without it, tokens weigh the same.

    What an objective is, for whoever has to know (attributes of the class, or properties; no code asks for a class):
      copies: rows that it makes of each row of the batch; what a step costs grows with them.
      task: name of the task that trains a model on it, see `training.tasks`.
      predicts_next: a model trained on it predicts the next token.
      shows_mask: a model trained on it sees [MASK] in the place of what it has to predict.
      replacement: chances of (mask, random, keep) at a hidden token; 0 only for what never happens.
      makes_pairs: it gives `CorruptedPair`s, for an encoder and a decoder.
      trains_generator: it takes a second, smaller network beside the model.
      takes_label_smoothing: its loss is one of predictions, and may be smoothed.
      loss_is_mean: its loss is the mean cross-entropy of its predictions, whose exponential is a perplexity. A class
        that overrides `loss` has to say that it is not.
      expected_spans: gives the shares of the hidden spans of 1, 2, ... `span_unit` that it aims at, in rows without
        padding; None where it has none in mind.
      span_unit: what lengths of spans count, `tokens` or `words`.
    """

    # No annotation, and so no fields of the dataclass.
    copies = 1
    task = "tokens"
    predicts_next = False
    shows_mask = False
    replacement = (1.0, 1.0, 1.0)
    makes_pairs = False
    trains_generator = False
    takes_label_smoothing = True
    loss_is_mean = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "loss" in vars(cls) and cls.loss_is_mean is True:
            raise TypeError(f"class {cls.__name__} has a loss of its own: let it say loss_is_mean = False")

    name: str
    vocabulary: Vocabulary
    length: int
    budget: int
    rate: float | Schedule = 0.0
    static_copies: int = 0
    needs: tuple[str, ...] = ()
    takes_token_weights: bool = False
    description: str = ""
    copies_input: bool = False
    token_loss_decay: float | None = None
    expected_spans: Callable[[], tuple[float, ...]] | None = field(default=None, kw_only=True)
    span_unit: str = field(default="tokens", kw_only=True)

    @property
    def output_length(self) -> int:
        """Tokens per row that the stack of layers reads; differs from `length` where tokens are added or removed."""
        return self.length

    @property
    def unmixable(self) -> str | None:
        """Why it cannot be one part of a mixture, as the end of a sentence; None where it can."""
        if self.copies != 1 or self.makes_pairs:
            return "changes the number or the kind of rows and cannot be mixed"
        if self.trains_generator:
            return "trains two networks, and a mixture one; train it alone"
        if self.token_loss_decay is not None:
            return (
                "hides by running losses, which a mixture does not tell apart by part; give it a table, or train it "
                "alone"
            )
        return None

    def as_causal(self) -> Any:
        """The `CausalLM` that a model trained on this one can be run under; None where it never predicted the next
        token."""
        return None

    @property
    def never_hidden(self) -> tuple[int, ...]:
        """Ids that it never hides: those that stand for no text."""
        return self.vocabulary.marker_ids

    def row(self, key: jax.Array, row: Row, rate, token_weights) -> Corrupted:
        """Corrupts one row; every field of the result lacks the batch axis."""
        raise TypeError(f"{type(self).__name__} does not define row()")

    def finish(self, corrupted: Corrupted) -> Corrupted:
        """Last step on the whole batch, for objectives that change the number of rows."""
        return corrupted

    def attend(self, corrupted: Any) -> Any:
        """Who may attend to whom in the stack that reads `corrupted`: a mask, or `PairMasks` for a pair."""
        return attend_within_segments(corrupted)

    def source(self, corrupted: Any) -> Side:
        """What shows the row to a model: the first side, without targets that are read back; segment 0 elsewhere."""
        return corrupted.sides()[0]

    def alone(self) -> dict[str, Objective]:
        """Of a mixture: itself following one part only, for each part that any step follows. Of others: nothing."""
        return {}

    def initial_token_losses(self) -> jax.Array | None:
        """The running mean of every token's loss before the first step, float32 `[vocabulary.size]`; None where no
        such mean is kept.

        It is the loss of an even guess: a token that has not been predicted yet counts as not learnt.
        """
        if self.token_loss_decay is None:
            return None
        return jnp.full(self.vocabulary.size, math.log(self.vocabulary.size), jnp.float32)

    def rate_at(self, step, rate):
        """The rate to use: an override, the schedule's value at `step`, or None for the constant rate."""
        if rate is not None:
            return jnp.asarray(rate, jnp.float32)
        if isinstance(self.rate, Schedule):
            if step is None:
                raise ValueError(
                    f"objective '{self.name}' has a rate that changes with the step ({self.rate.description}): "
                    "call objective(key, batch, step=step)"
                )
            return self.rate(step)
        return None

    def __call__(
        self,
        key: jax.Array,
        batch: Mapping[str, jax.Array],
        *,
        step: jax.Array | int | None = None,
        rate: jax.Array | float | None = None,
        token_weights: jax.Array | None = None,
    ) -> Corrupted:
        """Corrupts a batch.

        Args:
          key: one key for the whole run (any JAX key); not folded with the step.
          batch: `tokens segment_ids positions` int32 `[batch, length]`, `example_id epoch` int32 `[batch]`, and
            `word_starts` bool `[batch, length]` or `select_weights` float `[batch, length]` where `needs` says so.
          step: the training step, needed only by a rate that follows a schedule.
          rate: overrides the corruption rate; may be traced. Above the rate that the budget was sized for, the surplus
            is not corrupted.
          token_weights: float `[vocabulary.size]`, relative chance of each token to be chosen, for adaptive masking;
            only objectives that select by token weight take it.
        """
        rows = rows_from_batch(batch, self.length, self.name, self.needs)
        if token_weights is not None and not self.takes_token_weights:
            raise ValueError(
                f"objective '{self.name}' does not select by token weight: drop token_weights, "
                "or use create('conditional_mlm', ...)"
            )
        return _corrupt(
            self, key, rows, jnp.asarray(batch["epoch"], jnp.int32), jnp.asarray(batch["example_id"], jnp.int32),
            self.rate_at(step, rate), token_weights,
        )

    def transform_logits(self, logits: jax.Array, corrupted: Corrupted) -> jax.Array:
        """The logits that the objective's predictions are made with, from the model's `[batch, budget, vocabulary]`.

        What it rules out is ruled out for all that is computed from them: the loss, accuracies, ranks, samples. To do
        it twice changes nothing.
        """
        return logits

    def loss(
        self, logits: jax.Array, corrupted: Corrupted, label_smoothing: float = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """(loss_sum, weight_sum) of the model's `logits` `[batch, budget, vocabulary]`; divide once, globally.

        Raises:
          ValueError: label smoothing of a loss that it would make meaningless.
        """
        self.check_label_smoothing(label_smoothing)
        logits = self.transform_logits(logits, corrupted)
        loss_sum, _ = losses.cross_entropy(logits, corrupted.target_tokens, corrupted.loss_weights, label_smoothing)
        return loss_sum, self.weight_sum(corrupted)

    def check_label_smoothing(self, label_smoothing: float) -> None:
        """ValueError where the loss does not take it."""
        if label_smoothing and not self.takes_label_smoothing:
            raise ValueError(
                f"label_smoothing={label_smoothing:g}: a smoothed loss bounds no likelihood; set it to 0 for "
                f"objective '{self.name}'"
            )

    def weight_sum(self, corrupted: Corrupted) -> jax.Array:
        """The denominator of `loss`, float32, which no logit has a part in: it is known before any forward pass."""
        rows = corrupted.loss_weights if corrupted.denominators is None else corrupted.denominators
        return jnp.sum(rows.astype(jnp.float32))


@partial(jax.jit, static_argnums=0)
def _corrupt(objective: Objective, key, rows: Row, epoch, example_id, rate, token_weights) -> Corrupted:
    # Jitted here as well, so that a call outside jit is one dispatch; inside another jit it is inlined.
    keys = randomness.row_keys(key, epoch, example_id, objective.static_copies)
    corrupted = jax.vmap(partial(objective.row, rate=rate, token_weights=token_weights))(keys, rows)
    return objective.finish(corrupted)


@dataclass(frozen=True, eq=False)
class Masking(Objective):
    """Hides positions in place: `select`, then `replace`, then `predict`. Lengths never change.

    Each part is a pure function and may be any callable of the same signature:
    `select(key, row, rate, token_weights) -> Selection`, `replace(key, tokens, selection) -> (tokens, kinds)`,
    `predict(key, row, selection) -> float32 [length]` loss weights, `attention(corrupted) -> Mask`. `replacement` says
    what `replace` puts there, see `Objective`.
    """

    select: Callable[..., Selection] = field(kw_only=True)
    replace: Callable[..., Any] = field(kw_only=True)
    predict: Callable[..., jax.Array] = field(default=PredictCorrupted(), kw_only=True)
    attention: Callable[[Corrupted], masks.Mask] = field(default=attend_within_segments, kw_only=True)
    replacement: tuple[float, float, float] = field(default=(1.0, 1.0, 1.0), kw_only=True)

    @property
    def shows_mask(self) -> bool:  # type: ignore[override]
        return self.replacement[0] > 0

    def row(self, key, row, rate, token_weights):
        selection = self.select(key, row, rate, token_weights)
        tokens, kinds = self.replace(key, row.tokens, selection)
        weights = self.predict(key, row, selection)
        positions, used = slots(weights > 0, self.budget)
        return Corrupted(
            input_tokens=tokens,
            segment_ids=row.segment_ids,
            positions=row.positions,
            predict_positions=positions,
            target_tokens=jnp.where(used, row.tokens[positions], self.vocabulary.pad or 0),
            loss_weights=jnp.where(used, weights[positions], 0.0),
            kinds=jnp.where(used, kinds[positions], 0).astype(jnp.int8),
            selected=selection.chosen,
            units=selection.unit,
        )

    def attend(self, corrupted):
        return self.attention(corrupted)


def with_attend(objective: Objective, attend: Callable[[Any], Any]) -> Objective:
    """A copy of an objective that declares another mask: to check, or to train, one objective under several masks."""
    fields = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
    changed = type(f"{type(objective).__name__}Attending", (type(objective),), {"attend": lambda self, c: attend(c)})
    return changed(**fields)
