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
BAND_COST = {512: 0.7, 256: 0.9, 128: 1.05, 64: 1.4}

# Tiles that are classified at run time, at most: their lists take some tens of MB. A million tokens get tiles of 512.
GRID = 2**22


def refuses(call: Call) -> str | None:
    """Why no block map can be made, or None."""
    if 0 in call.query.shape or 0 in call.key.shape:
        return "an axis of length 0 has no blocks"
    return None


def choose(call: Call) -> tuple[int, int]:
    """``(block_q, block_kv)``: what makes the visited tiles cheapest, large on a dense area and small on a narrow one.

    A mask known only at run time (packed segments, say) gets small tiles, which skip most. Where only the position of
    the queries is, under a mask without arrays, they are taken to end with the keys, as a prompt's last chunk does.
    """
    mask = masks.everything() if call.mask is None else call.mask
    known = isinstance(call.q_offset, int)
    if not known and jax.tree.leaves(mask):
        return smallest(call)
    q_offset = call.q_offset if known else max(0, call.kv_len - call.q_len)
    best, least = smallest(call), math.inf
    for size in BAND_COST if known else _few(call):
        block_map = mask.block_map(call.q_len, call.kv_len, fit(call, size), q_offset=q_offset)
        if not isinstance(block_map.partial.count, np.ndarray):
            return smallest(call)
        cost = _cost(block_map, size, known)
        if cost < least:
            best, least = fit(call, size), cost
        if not _smaller_may_win(block_map, size, least):
            break
    return best


def _cost(block_map: masks.BlockMap, size: int, known: bool) -> float:
    """Of a concrete map in tiles of about ``size``, as `LIST_COST` and `BAND_COST` count."""
    area = block_map.block_q * block_map.block_kv
    # Of queries anywhere no band is known.
    band = band_blocks(block_map, transposed=False) if known else None
    if band is not None and block_map.band is not None:
        return BAND_COST[size] * band * area * block_map.band.first.size
    return LIST_COST.get(size, math.inf) * _tiles(block_map.partial, block_map.full) * area


def _smaller_may_win(block_map: masks.BlockMap, size: int, least: float) -> bool:
    """Whether smaller tiles may make a band, or save more on partial tiles than they cost on full ones."""
    if block_map.band is not None and (block_map.band.reach - 2) * block_map.block_kv <= BAND:
        return True
    smaller = [cost for other, cost in LIST_COST.items() if other < size]
    return bool(smaller) and min(smaller) * _tiles(block_map.full) * block_map.block_q * block_map.block_kv < least


def _tiles(*lists: masks.TileLists) -> float:
    return float(sum(each.count.sum(dtype=np.int64) for each in lists))


def _few(call: Call) -> list[int]:
    """Sizes of which there are at most `GRID` tiles, largest first; the largest in any case."""

    def tiles(size: int) -> int:
        return math.prod(-(-n // edge) for n, edge in zip((call.q_len, call.kv_len), fit(call, size), strict=True))

    sizes = list(LIST_COST)
    return [size for size in sizes if tiles(size) <= GRID] or sizes[:1]


def smallest(call: Call) -> tuple[int, int]:
    """The smallest tiles that are not too many, for masks of which nothing is known."""
    return fit(call, _few(call)[-1])


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
