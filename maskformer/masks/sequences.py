"""Masks that depend on the batch: segments, padding, and what follows from them."""

from __future__ import annotations

from typing import Any

from maskformer.masks.expression import Mask, leaf, take
from maskformer.masks.registry import builder


@leaf(q_ids=1, kv_ids=1)
class Segments(Mask):
    """Equal ids; ``kv_ids=None`` means the keys are the queries' sequence. ``padding`` is an id that sees nothing."""

    q_ids: Any
    kv_ids: Any = None
    padding: int | None = None

    def attend(self, q: Any, k: Any) -> Any:
        q_id = take(self.q_ids, q)
        same = q_id == take(self.q_ids if self.kv_ids is None else self.kv_ids, k)
        return same if self.padding is None else same & (q_id != self.padding)


@leaf(valid=1, lengths=0)
class KeyPadding(Mask):
    """Keys that exist: ``valid[k]`` and ``k < lengths``, whichever are given."""

    valid: Any = None
    lengths: Any = None

    def attend(self, q: Any, k: Any) -> Any:
        real = [] if self.valid is None else [take(self.valid, k) != 0]
        real += [] if self.lengths is None else [k < self.lengths]
        return real[0] if len(real) == 1 else real[0] & real[1]


@builder(q_ids="segment_ids", kv_ids="kv_segment_ids")
def segments(q_ids: Any, kv_ids: Any = None, padding: int | None = None) -> Mask:
    """Packed examples: a query sees the keys whose id equals its own. ``q_ids`` int ``[batch, q_len]``."""
    return Segments(q_ids, kv_ids, padding)


@builder(valid="valid", lengths="lengths")
def key_padding(valid: Any = None, lengths: Any = None) -> Mask:
    """Hides padding keys: ``valid`` bool ``[batch, kv_len]`` (True = a real token) or ``lengths`` int ``[batch]``."""
    if valid is None and lengths is None:
        raise ValueError("key_padding() needs valid=[batch, kv_len] or lengths=[batch]")
    return KeyPadding(valid, lengths)
