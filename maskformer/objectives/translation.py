"""Objectives over labelled data whose input is corrupted while the answer stays what it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maskformer.objectives.counting import check_length
from maskformer.objectives.mlm import mlm
from maskformer.objectives.objective import Masking, Objective
from maskformer.objectives.pairs import CorruptedPair, attend_pair
from maskformer.objectives.rows import Row
from maskformer.objectives.sequence import shift_right
from maskformer.objectives.units import segment_starts
from maskformer.objectives.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class MaskedSource(Objective):
    """Sequence to sequence with a corrupted source: the loss stays on the whole target."""

    makes_pairs = True

    source: Masking | None = None
    target_length: int = 0
    start_id: int = 0

    def __call__(  # type: ignore[override]
        self, key: jax.Array, batch: Mapping[str, jax.Array], *, step=None, rate=None, token_weights=None
    ) -> CorruptedPair:
        """Args as `Objective.__call__`. The batch is packed pairs:

        `tokens segment_ids positions` (and `word_starts`) `[batch, length]` hold the sources, `target_tokens
        target_segment_ids target_positions` `[batch, target_length]` the targets; segment s of one belongs to segment s
        of the other.
        """
        for name in ("target_tokens", "target_segment_ids", "target_positions"):
            if name not in batch:
                raise ValueError(f"objective '{self.name}': the batch has no '{name}'")
            if batch[name].shape[1] != self.target_length:
                raise ValueError(
                    f"batch['{name}'] has shape {batch[name].shape}: expected [batch, {self.target_length}]"
                )
        corrupted = self.source(key, batch, step=step, rate=rate, token_weights=token_weights)
        targets = Row(*(jnp.asarray(batch[n], jnp.int32) for n in
                        ("target_tokens", "target_segment_ids", "target_positions")),
                      word_starts=jnp.zeros(batch["target_tokens"].shape, bool))
        shifted = jax.vmap(lambda row: shift_right(row.tokens, segment_starts(row), self.start_id))(targets)
        return CorruptedPair(
            encoder_input_tokens=corrupted.input_tokens,
            encoder_segment_ids=corrupted.segment_ids,
            encoder_positions=corrupted.positions,
            decoder_input_tokens=jnp.where(targets.valid, shifted, self.vocabulary.pad or 0),
            decoder_segment_ids=targets.segment_ids,
            decoder_positions=targets.positions,
            decoder_target_tokens=targets.tokens,
            decoder_loss_weights=targets.valid.astype(jnp.float32),
        )

    def attend(self, corrupted):
        return attend_pair(corrupted)


def masked_source(
    vocabulary: Vocabulary,
    length: int,
    *,
    target_length: int | None = None,
    rate: Any = 0.15,
    compat: str = "bert",
    replacement: Sequence[float] = (0.8, 0.1, 0.1),
    whole_word: bool = False,
    static_copies: int = 0,
    source: Masking | None = None,
    start_id: int | None = None,
) -> MaskedSource:
    """Translation or summarisation with a masked source.

    Args:
      length, target_length: tokens per source row and per target row, by default as many.
      rate, compat, replacement, whole_word, static_copies: of the corruption, as in `mlm`.
      source: another corruption in place of these, any objective that hides in place.
      start_id: first decoder input, by default `bos`, else `pad`.

    >>> masked_source(Vocabulary(size=100, pad=0, mask=4), 16, target_length=12, rate=0.1).budget
    12
    """
    target_length = length if target_length is None else check_length(target_length)
    if source is None:
        source = mlm(vocabulary, length, rate=rate, compat=compat, replacement=replacement, whole_word=whole_word,
                     static_copies=static_copies)
    if not isinstance(source, Masking) or source.length != length:
        raise ValueError("masked_source: `source` must hide in place, in rows of the source's length")
    start = next((i for i in (start_id, vocabulary.bos, vocabulary.pad) if i is not None), None)
    if start is None:
        raise ValueError("masked_source: the decoder input starts with vocabulary.bos (or pad), and there is neither")
    return MaskedSource(
        "masked_source", vocabulary, length, target_length, source.rate, source.static_copies, source.needs,
        source.takes_token_weights, f"masked_source over {source.description}",
        copies_input=True,
        source=source, target_length=target_length, start_id=start,
    )


def augment(objective: Masking, key: jax.Array, batch: Mapping[str, jax.Array], **call) -> dict[str, jax.Array]:
    """The batch with its tokens corrupted and everything else, labels for one, as it was.

    Masking as data augmentation for classification: the loss stays on the class.
    """
    return {**batch, "tokens": objective(key, batch, **call).input_tokens}
