"""The tile size of a blockwise call."""

from __future__ import annotations

import numpy as np

from maskformer import masks
from maskformer.attention.arguments import Call

# Measured on CPU (8 heads of 64): dense areas run at the same speed from 256x256 up and 12% slower at 128x128, while
# a narrow window has half the area in tiles of 128.
LARGE, SMALL = 256, 128
WORTH_SMALL = 0.85


def refuses(call: Call) -> str | None:
    """Why no block map can be made, or None."""
    if 0 in call.query.shape or 0 in call.key.shape:
        return "an axis of length 0 has no blocks"
    return None


def choose(call: Call) -> tuple[int, int]:
    """``(block_q, block_kv)``: large tiles, unless the mask leaves clearly less area in small ones.

    A mask known only at run time (packed segments, say) gets small tiles, which lose little on a dense area and skip
    more of a sparse one.
    """
    return fit(call, _size(call))


def _size(call: Call) -> int:
    if call.mask is None or max(call.q_len, call.kv_len) <= SMALL:
        return LARGE
    small, large = (
        call.mask.block_map(call.q_len, call.kv_len, fit(call, size), q_offset=call.q_offset)
        for size in (SMALL, LARGE)
    )
    if not isinstance(small.partial.count, np.ndarray):
        return SMALL
    areas = [float(np.sum(block_map.active_area())) for block_map in (small, large)]
    return SMALL if areas[0] < WORTH_SMALL * areas[1] else LARGE


def fit(call: Call, size: int) -> tuple[int, int]:
    """Square tiles, no longer than the sequences."""
    return min(size, _up(call.q_len)), min(size, _up(call.kv_len))


def _up(length: int) -> int:
    return -(-length // 8) * 8


def block_map(call: Call) -> tuple[masks.Mask, masks.BlockMap]:
    """The call's mask and its block map in the chosen tiles."""
    mask = masks.everything() if call.mask is None else call.mask
    return mask, mask.block_map(call.q_len, call.kv_len, choose(call), q_offset=call.q_offset)
