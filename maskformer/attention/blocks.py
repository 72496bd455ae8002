"""The tile size of a blockwise call."""

from __future__ import annotations

import math

import jax
import numpy as np

from maskformer import masks
from maskformer.attention.arguments import Call
from maskformer.attention.blockwise_layout import BAND, band_blocks

# Edge of a tile -> time per query-key pair on a CPU, forward and backward, relative to the largest tiles visited one
# by one (`benchmarks/tiles.py` measures it). Small ones leave the products short of work, and each costs its dispatch.
LIST_COST = {512: 1.0, 256: 1.4, 128: 1.5}
# The same where a row's band of tiles is visited at once.
BAND_COST = {512: 0.8, 256: 0.85, 128: 1.05, 64: 1.4}

# Tiles that are classified at run time, at most: their lists take some tens of MB. A million tokens get tiles of 512.
GRID = 2**22


def refuses(call: Call) -> str | None:
    """Why no block map can be made, or None."""
    if 0 in call.query.shape or 0 in call.key.shape:
        return "an axis of length 0 has no blocks"
    return None


def choose(call: Call) -> tuple[int, int]:
    """``(block_q, block_kv)``: what makes the visited tiles cheapest, large on a dense area and small on a narrow one.

    A mask known only at run time (packed segments, say) gets small tiles, which skip most; or one that holds all.
    Where only the position of the queries is, under a mask without arrays, they are taken to end with the keys, as the
    last chunk of a prompt does.
    """
    mask = masks.everything() if call.mask is None else call.mask
    known = isinstance(call.q_offset, int)
    if not known and jax.tree.leaves(mask):
        return smallest(call)
    q_offset = call.q_offset if known else max(0, call.kv_len - call.q_len)
    best, least = smallest(call), math.inf
    for size in BAND_COST:
        block = fit(call, size)
        block_map = mask.block_map(call.q_len, call.kv_len, block, q_offset=q_offset)
        if not isinstance(block_map.partial.count, np.ndarray):
            return block if block_map.grid == (1, 1) else smallest(call)
        area, reach = block[0] * block[1], block_map.band.reach
        partial, full = (float(lists.count.sum()) * area for lists in (block_map.partial, block_map.full))
        # Of queries anywhere no band is known.
        if known and band_blocks(block_map, transposed=False) == reach:
            cost = BAND_COST[size] * reach * area * block_map.band.first.size
        else:
            cost = LIST_COST.get(size, math.inf) * (partial + full)
        if cost < least:
            best, least = block, cost
        # Where no smaller tiles make a band, they can only save on partial ones: where few are, they need not be made.
        wide = (reach - 2) * block[1] > BAND
        if wide and min((LIST_COST[other] for other in LIST_COST if other < size), default=math.inf) * full >= least:
            break
    return best


def smallest(call: Call) -> tuple[int, int]:
    """The smallest tiles that are not too many, for masks of which nothing is known."""
    blocks = [fit(call, size) for size in sorted(LIST_COST)]
    few = [block for block in blocks if math.ceil(call.q_len / block[0]) * math.ceil(call.kv_len / block[1]) <= GRID]
    return (few or blocks[-1:])[0]


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
