"""The tile size of a blockwise call."""

from __future__ import annotations

import math

import numpy as np

from maskformer import masks
from maskformer.attention.arguments import Call

# Edge of a tile -> time per query-key pair on a CPU (8 heads of 64, either pass), relative to the largest: small tiles
# leave the matrix products short of work, and every tile costs its dispatch.
COST = {512: 1.0, 256: 1.5, 128: 1.65}


def refuses(call: Call) -> str | None:
    """Why no block map can be made, or None."""
    if 0 in call.query.shape or 0 in call.key.shape:
        return "an axis of length 0 has no blocks"
    return None


def choose(call: Call) -> tuple[int, int]:
    """``(block_q, block_kv)``: what makes the visited tiles cheapest, large on a dense area and small on a narrow one.

    A mask known only at run time (packed segments, say) gets small tiles, which skip most.
    """
    mask = masks.everything() if call.mask is None else call.mask
    best, least = smallest(call), math.inf
    for size, cost in COST.items():
        block = fit(call, size)
        block_map = mask.block_map(call.q_len, call.kv_len, block, q_offset=call.q_offset)
        if not isinstance(block_map.partial.count, np.ndarray):
            break
        area = block[0] * block[1]
        partial, full = (float(lists.count.sum()) * area for lists in (block_map.partial, block_map.full))
        if cost * (partial + full) < least:
            best, least = block, cost * (partial + full)
        # Smaller tiles can only save on partial ones: where few are, their maps need not be made.
        if min((COST[smaller] for smaller in COST if smaller < size), default=math.inf) * full >= least:
            break
    return best


def smallest(call: Call) -> tuple[int, int]:
    """The smallest tiles, for masks of which nothing is known."""
    return fit(call, min(COST))


def fit(call: Call, size: int) -> tuple[int, int]:
    """Tiles of at most `size` that cut both sequences evenly, rounded up to a multiple of 8."""
    return _even(call.q_len, size), _even(call.kv_len, size)


def _even(length: int, size: int) -> int:
    tiles = -(-length // size)
    return -(-length // (8 * tiles)) * 8


def block_map(call: Call) -> tuple[masks.Mask, masks.BlockMap]:
    """The call's mask and its block map in the chosen tiles."""
    mask = masks.everything() if call.mask is None else call.mask
    return mask, mask.block_map(call.q_len, call.kv_len, choose(call), q_offset=call.q_offset)
