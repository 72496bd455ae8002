"""What goes into an objective (a packed row) and what comes out (a corrupted one)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maskformer import masks

# What happened to a predicted position, as stored in `Corrupted.kinds`.
MASK, RANDOM, KEEP = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Row:
    """One packed row, every field `[length]`. Padding has segment 0; positions restart with each segment.

    `weights` is what the batch gives per position (`select_weights`) for objectives that read it; else None.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    word_starts: jax.Array
    weights: jax.Array | None = None

    @property
    def valid(self) -> jax.Array:
        """bool `[length]`: not padding."""
        return self.segment_ids > 0

    @property
    def size(self) -> jax.Array:
        """int32: tokens that are not padding. A row's rate counts all of them, special tokens included."""
        return jnp.sum(self.valid, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Selection:
    """The positions that a corruption works on.

    Attributes:
      chosen: bool `[length]`.
      unit: int32 `[length]`, the first position of the unit (word, span) that each position belongs to, so that a
        decision per unit is one gather; None where every token is its own unit.
      probability: float32 `[length]` or None, the chance that a position had of being chosen, where it is known and
        a loss weight is made from it.
    """

    chosen: jax.Array
    unit: jax.Array | None = None
    probability: jax.Array | None = None


@dataclass(frozen=True)
class Side:
    """One row of tokens that a stack of layers reads, all `[batch, length]`; segment 0 is padding."""

    name: str
    tokens: jax.Array
    segment_ids: jax.Array


@dataclass(frozen=True)
class Reads:
    """Places of side number `query` attend to places of side number `key` (see `sides`), under `mask`; `name` tells it
    apart from the layer's other attention, where there is any."""

    query: int
    key: int
    mask: masks.Mask
    name: str = ""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Corrupted:
    """What one stack of layers reads and what it is asked to predict.

    Attributes:
      input_tokens, segment_ids, positions: int32 `[batch, length]`.
      predict_positions: int32 `[batch, budget]`, ascending, 0 in unused slots; None when every position predicts.
      target_tokens: int32 `[batch, budget]`.
      loss_weights: float32 `[batch, budget]`, 0 in unused slots.
      kinds: int8 `[batch, budget]`, 0 mask, 1 random, 2 keep; None where nothing is replaced.
      denominators: float32 `[batch]`, what the row adds to the loss denominator; None for the sum of its weights.
      bidirectional: bool `[batch, length]`, positions that attend to each other in both directions although the rest
        is causal (a prefix, one run in each segment); None where there is no such distinction.
      selected: bool `[batch, length]`, the corrupted positions (`kinds` covers the predicted ones only).
      units: int32 `[batch, length]`, the first position of each selected position's unit, or None.
    """

    input_tokens: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    predict_positions: jax.Array | None
    target_tokens: jax.Array
    loss_weights: jax.Array
    kinds: jax.Array | None = None
    denominators: jax.Array | None = None
    bidirectional: jax.Array | None = None
    selected: jax.Array | None = None
    units: jax.Array | None = None

    def inputs(self, mask: masks.Mask) -> dict[str, Any]:
        """Keyword arguments of a model's `apply(params, ...)` beside its parameters.

        Args:
          mask: who may attend to whom, from the objective's `attend`.
        """
        return {
            "tokens": self.input_tokens,
            "positions": self.positions,
            "mask": mask,
            "predict_positions": self.predict_positions,
            "segment_ids": self.segment_ids,
        }

    def sides(self) -> tuple[Side, ...]:
        """What is read, in the order in which it is read; predictions are made on the last side."""
        return (Side("row", self.input_tokens, self.segment_ids),)

    def stacks(self, mask: masks.Mask) -> tuple[tuple[Reads, ...], ...]:
        """What a layer reads, for each stack of layers in the order in which they run."""
        return ((Reads(0, 0, mask),),)

    @property
    def places(self) -> jax.Array:
        """int32 `[batch, budget]`: where on the last side each prediction is made."""
        if self.predict_positions is not None:
            return self.predict_positions
        return jnp.broadcast_to(jnp.arange(self.target_tokens.shape[1], dtype=jnp.int32), self.target_tokens.shape)


def rows_from_batch(batch: Mapping[str, jax.Array], length: int, objective: str, extra: tuple[str, ...] = ()) -> Row:
    """The batch's arrays as a `Row` with a leading batch axis; ValueError on a missing or misshapen one.

    `extra` names what this objective needs beyond the usual keys: `word_starts`, `select_weights`.
    """
    needed = ["tokens", "segment_ids", "positions", "example_id", "epoch", *extra]
    for name in needed:
        if name not in batch:
            raise ValueError(
                f"objective '{objective}': the batch has no '{name}'; expected the keys {', '.join(needed)}, "
                f"got {', '.join(sorted(batch))}"
            )
    shape = batch["tokens"].shape
    if len(shape) != 2 or shape[1] != length:
        raise ValueError(
            f"objective '{objective}' was built for rows of {length} tokens and batch['tokens'] has shape {shape}: "
            "build it with the data's row length"
        )
    for name in needed[1:]:
        expected = shape[:1] if name in ("example_id", "epoch") else shape
        if batch[name].shape != expected:
            raise ValueError(f"batch['{name}'] has shape {batch[name].shape}: expected {expected}")
    starts = jnp.asarray(batch["word_starts"], bool) if "word_starts" in batch else jnp.zeros(shape, bool)
    weights = jnp.asarray(batch["select_weights"], jnp.float32) if "select_weights" in extra else None
    fields = (jnp.asarray(batch[name], jnp.int32) for name in ("tokens", "segment_ids", "positions"))
    return Row(*fields, word_starts=starts, weights=weights)
