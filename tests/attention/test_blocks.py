"""The tile sizes that a blockwise call chooses for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskformer as mf
from maskformer import masks
from maskformer.attention import blocks

CAUSAL = masks.causal()
TREE = masks.predicate(lambda q, k: (q // 300 == k // 300) & (k <= q))


def chosen(mask, length):
    q = jax.ShapeDtypeStruct((1, length, 2, 8), np.float32)
    return mf.attention.explain(mask, q, q, q, implementation="blockwise").block


@pytest.mark.parametrize(
    "mask, expected",
    [
        (None, 512),
        (CAUSAL, 512),
        (CAUSAL & masks.sliding_window(1024), 512),
        (CAUSAL & masks.sliding_window(256), 128),
        (masks.sliding_window(64, 64), 64),
    ],
    ids=str,
)
def test_dense_areas_get_large_tiles_and_narrow_ones_small(mask, expected):
    assert chosen(mask, 4096) == (expected, expected)


@pytest.mark.parametrize("length", [1, 130, 600, 1025, 2000])
@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL & masks.sliding_window(64), TREE, ~CAUSAL, masks.nothing()], ids=str)
def test_no_other_size_is_cheaper(mask, length):
    def cost(size, block):
        visited = mask.block_map(length, length, block).kinds()[0, 0] > 0
        spans = [np.ptp(np.flatnonzero(row)) + 1 for row in visited if row.any()]
        reach = max(spans, default=1)
        if reach * block[1] <= blocks.BAND:
            return blocks.BAND_COST[size] * reach * len(visited) * block[0] * block[1]
        return blocks.LIST_COST.get(size, np.inf) * visited.sum() * block[0] * block[1]

    def tiles(size):
        edge = -(-length // (8 * -(-length // size))) * 8
        return edge, edge

    costs = {tiles(size): cost(size, tiles(size)) for size in sorted(blocks.BAND_COST)}
    assert costs[chosen(mask, length)] == min(costs.values())


def test_a_mask_known_at_run_time_gets_small_tiles_unless_they_are_too_many():
    def at_run_time(length):
        found = []
        jax.eval_shape(lambda ids: found.append(chosen(masks.segments(ids), length)), jnp.zeros(length, jnp.int32))
        return found[0]

    assert at_run_time(512) == at_run_time(1024) == (128, 128)
    assert at_run_time(1 << 20) == (512, 512)


def test_tiles_cut_an_odd_length_evenly():
    assert chosen(CAUSAL, 600) == (304, 304)


def test_a_dense_mask_is_not_mapped_in_small_tiles(monkeypatch):
    asked = []
    original = masks.Mask.block_map
    monkeypatch.setattr(masks.Mask, "block_map", lambda self, *a, **k: asked.append(a[2]) or original(self, *a, **k))
    chosen(CAUSAL, 16_384)
    assert set(asked) == {(512, 512)}


def test_a_mask_of_partial_tiles_alone_is_not_mapped_in_ever_smaller_ones(monkeypatch):
    asked = []
    original = masks.Mask.block_map
    monkeypatch.setattr(masks.Mask, "block_map", lambda self, *a, **k: asked.append(a[2]) or original(self, *a, **k))
    chosen(CAUSAL & masks.predicate(lambda q, k: (q - k) % 7 == 0), 8192)
    assert set(asked) == {(512, 512), (256, 256), (128, 128)}


def test_queries_from_a_traced_position_get_the_tiles_of_their_mask():
    def tiles(mask, q_len=1024, kv_len=4096):
        q = jax.ShapeDtypeStruct((1, q_len, 2, 8), np.float32)
        kv = jax.ShapeDtypeStruct((1, kv_len, 2, 8), np.float32)
        found = []
        explain = lambda at: found.append(mf.explain(mask, q, kv, kv, q_offset=at, implementation="blockwise").block)
        jax.eval_shape(explain, jax.ShapeDtypeStruct((), np.int32))
        return found[0]

    assert tiles(CAUSAL) == (512, 512)
    assert tiles(CAUSAL & masks.sliding_window(100)) == (128, 128)
    assert tiles(CAUSAL & masks.key_padding(lengths=np.array([4096]))) == (128, 128)
    assert tiles(CAUSAL & masks.sliding_window(100), 1 << 17, 1 << 20) == (256, 256)  # 128 would be 8 Mi tiles
