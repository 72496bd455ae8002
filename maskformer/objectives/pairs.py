"""Objectives that turn a row into inputs and targets of other lengths, for an encoder-decoder or for one stack.

A recipe is a pure function `make_pair(key, row, rate) -> Pair`; a layout places the pair. Static lengths are bounds
over all row sizes; what they do not use is padding. Padding of the row must come last, as the pipeline packs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskformer import masks
from maskformer.objectives.objective import Objective
from maskformer.objectives.rows import Corrupted, Reads, Side
from maskformer.objectives.sequence import attend_by_prefix
from maskformer.objectives.vocabulary import Vocabulary

LAYOUTS = ("encoder_decoder", "prefix")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pair:
    """`inputs` int32 `[input_length]` of which `input_size` are used, `targets` likewise."""

    inputs: jax.Array
    input_size: jax.Array
    targets: jax.Array
    target_size: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CorruptedPair:
    """What an encoder-decoder reads and predicts, under T5X's names; all `[batch, encoder or decoder length]`.

    Attributes:
      encoder_input_tokens, encoder_segment_ids, encoder_positions: the encoder's row; segment 0 is padding.
      decoder_input_tokens: targets shifted right behind the start token, restarting with each segment.
      decoder_segment_ids, decoder_positions: the decoder's row.
      decoder_target_tokens: int32; decoder_loss_weights: float32, 0 on padding.
      denominators: see `Corrupted`.
    """

    encoder_input_tokens: jax.Array
    encoder_segment_ids: jax.Array
    encoder_positions: jax.Array
    decoder_input_tokens: jax.Array
    decoder_segment_ids: jax.Array
    decoder_positions: jax.Array
    decoder_target_tokens: jax.Array
    decoder_loss_weights: jax.Array
    denominators: jax.Array | None = None

    # As `Corrupted` has them: nothing is replaced in place.
    kinds: ClassVar[None] = None
    selected: ClassVar[None] = None
    bidirectional: ClassVar[None] = None

    @property
    def target_tokens(self) -> jax.Array:
        return self.decoder_target_tokens

    @property
    def loss_weights(self) -> jax.Array:
        return self.decoder_loss_weights

    def inputs(self, masks: PairMasks) -> dict[str, Any]:
        """Keyword arguments of an encoder-decoder's `apply(params, ...)` beside its parameters."""
        return {
            "source_tokens": self.encoder_input_tokens,
            "source_positions": self.encoder_positions,
            "source_segment_ids": self.encoder_segment_ids,
            "source_mask": masks.encoder,
            "tokens": self.decoder_input_tokens,
            "positions": self.decoder_positions,
            "segment_ids": self.decoder_segment_ids,
            "mask": masks.decoder,
            "cross_mask": masks.cross,
        }

    def sides(self) -> tuple[Side, ...]:
        """Encoder, then decoder; predictions are made on the decoder's."""
        return (
            Side("encoder", self.encoder_input_tokens, self.encoder_segment_ids),
            Side("decoder", self.decoder_input_tokens, self.decoder_segment_ids),
        )

    def stacks(self, masks: PairMasks) -> tuple[tuple[Reads, ...], ...]:
        """What a layer reads, for each stack of layers in the order in which they run."""
        decoder = (Reads(1, 1, masks.decoder, "decoder"), Reads(1, 0, masks.cross, "cross"))
        return (Reads(0, 0, masks.encoder, "encoder"),), decoder

    @property
    def places(self) -> jax.Array:
        """int32 `[batch, decoder length]`: where on the last side each prediction is made."""
        length = self.target_tokens.shape[1]
        return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), self.target_tokens.shape)


@dataclass(frozen=True)
class PairMasks:
    """Attention of an encoder-decoder: who may attend to whom in each of its three places."""

    encoder: masks.Mask
    decoder: masks.Mask
    cross: masks.Mask


def attend_pair(corrupted: CorruptedPair) -> PairMasks:
    """Encoder both ways, decoder causal, cross-attention from a target segment to the same source segment.

    Padding is segment 0 on both sides, so a real query never reads a padded key.
    """
    encoder, decoder = corrupted.encoder_segment_ids, corrupted.decoder_segment_ids
    return PairMasks(
        encoder=masks.segments(encoder),
        decoder=masks.causal() & masks.segments(decoder),
        cross=masks.segments(decoder, encoder),
    )


def compact(tokens: jax.Array, keep: jax.Array, length: int, pad: int) -> tuple[jax.Array, jax.Array]:
    """The kept tokens moved to the front of a row of `length`, and how many there are (at most `length`).

    >>> [x.tolist() for x in compact(jnp.array([5, 6, 7]), jnp.array([True, False, True]), 4, 0)]
    [[5, 7, 0, 0], 2]
    """
    to = jnp.where(keep, jnp.cumsum(keep) - 1, length)
    out = jnp.full(length, pad, jnp.int32).at[to].set(tokens.astype(jnp.int32), mode="drop")
    return out, jnp.minimum(jnp.sum(keep, dtype=jnp.int32), length)


def append(tokens: jax.Array, size: jax.Array, token: int | None, when: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds `token` behind the first `size` (nothing where it is None or `when` is False)."""
    if token is None:
        return tokens, size
    index = jnp.arange(tokens.shape[0])
    return jnp.where((index == size) & when, token, tokens), size + when.astype(jnp.int32)


@dataclass(frozen=True, eq=False)
class PairObjective(Objective):
    """A pair recipe in one of two layouts.

    `encoder_decoder` gives a `CorruptedPair`. `prefix` gives a `Corrupted` for one stack: inputs, then targets, with
    the inputs read both ways and the targets predicted left to right (a prefix language model).
    """

    make_pair: Callable[..., Pair] = None  # type: ignore[assignment]
    input_length: int = 0
    target_length: int = 0
    total_length: int = 0
    start_id: int = 0
    layout: str = "encoder_decoder"

    @property
    def output_length(self) -> int:
        return self.total_length if self.layout == "prefix" else self.input_length

    @property
    def makes_pairs(self) -> bool:  # type: ignore[override]
        return self.layout == "encoder_decoder"

    @property
    def unmixable(self) -> str | None:
        return "changes the number or the kind of rows and cannot be mixed"

    def source(self, corrupted):
        read = super().source(corrupted)
        if self.layout != "prefix":
            return read
        # Behind the prefix the targets are read back.
        return dataclasses.replace(read, segment_ids=read.segment_ids * corrupted.bidirectional)

    def row(self, key, row, rate, token_weights):
        pair = self.make_pair(key, row, rate)
        return self._as_prefix(pair) if self.layout == "prefix" else self._as_encoder_decoder(pair)

    def _as_encoder_decoder(self, pair: Pair) -> CorruptedPair:
        source, target = jnp.arange(self.input_length), jnp.arange(self.target_length)
        encoder = (source < pair.input_size).astype(jnp.int32)
        decoder = (target < pair.target_size).astype(jnp.int32)
        shifted = jnp.concatenate([jnp.full(1, self.start_id, jnp.int32), pair.targets[:-1]])
        return CorruptedPair(
            encoder_input_tokens=pair.inputs,
            encoder_segment_ids=encoder,
            encoder_positions=source * encoder,
            decoder_input_tokens=jnp.where(decoder > 0, shifted, self.vocabulary.pad or 0),
            decoder_segment_ids=decoder,
            decoder_positions=target * decoder,
            decoder_target_tokens=pair.targets,
            decoder_loss_weights=decoder.astype(jnp.float32),
        )

    def _as_prefix(self, pair: Pair) -> Corrupted:
        length = self.output_length
        index = jnp.arange(length)
        pad = self.vocabulary.pad or 0
        tokens = jnp.concatenate([pair.inputs, jnp.full(length - self.input_length, pad, jnp.int32)])
        at = jnp.where(jnp.arange(self.target_length) < pair.target_size, pair.input_size, length)
        tokens = tokens.at[at + jnp.arange(self.target_length)].set(pair.targets, mode="drop")
        valid = index < pair.input_size + pair.target_size
        slot = jnp.arange(self.target_length)
        # The last input token predicts the first target, each target the next one.
        used = (slot < pair.target_size) & (pair.input_size > 0)
        return Corrupted(
            input_tokens=tokens,
            segment_ids=valid.astype(jnp.int32),
            positions=jnp.where(valid, index, 0),
            predict_positions=jnp.where(used, pair.input_size - 1 + slot, 0),
            target_tokens=jnp.where(used, pair.targets, pad),
            loss_weights=used.astype(jnp.float32),
            bidirectional=index < pair.input_size,
        )

    def attend(self, corrupted):
        return attend_by_prefix(corrupted) if self.layout == "prefix" else attend_pair(corrupted)


def pair_objective(
    name: str,
    vocabulary: Vocabulary,
    length: int,
    layout: str,
    make_pair: Callable[..., Pair],
    lengths: tuple[int, int],
    start_id: int | None,
    total: int | None = None,
    **fields,
) -> PairObjective:
    """Checks the layout and its start token, and puts the parts together.

    `total` bounds the sizes of inputs and targets together, where that is less than the sum of the two `lengths`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    if start_id is None:
        start_id = vocabulary.bos if vocabulary.bos is not None else vocabulary.pad
    if start_id is None and layout == "encoder_decoder":
        raise ValueError(f"{name}: the decoder input starts with vocabulary.bos (or pad), and there is neither")
    return PairObjective(
        name=name, vocabulary=vocabulary, length=length, budget=lengths[1], make_pair=make_pair,
        input_length=lengths[0], target_length=lengths[1], total_length=total or sum(lengths),
        start_id=start_id or 0, layout=layout, **fields,
    )
