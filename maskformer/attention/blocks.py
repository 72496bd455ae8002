"""The tile size of a call."""

from __future__ import annotations

import numpy as np

from maskformer.attention.arguments import Call


def refuses(call: Call) -> str | None:
    """Why no block map can be made, or None."""
    if 0 in call.query.shape or 0 in call.key.shape:
        return "an axis of length 0 has no blocks"
    return None


def choose(call: Call) -> tuple[int, int]:
    """``(block_q, block_kv)``."""
    return min(256, _up(call.q_len, 8)), min(512, _up(call.kv_len, 8))


def _up(length: int, multiple: int) -> int:
    return int(-(-length // multiple) * multiple) if length else int(np.int32(multiple))
