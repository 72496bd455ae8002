"""What a block map must be beyond sound: sharp, small, compiled once, and honest about what it could not see."""

import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskformer import masks
from tests.masks import oracle


def packed(seed: int, length: int, count: int = 6) -> np.ndarray:
    """Segment ids 1, 2, ... and then 0, as packing makes them."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.choice(np.arange(1, length), count, replace=False))
    ids = 1 + np.searchsorted(ends, np.arange(length), side="right")
    return np.where(ids > count, 0, ids).astype(np.int32)


def tile_classes(matrix: np.ndarray, block: int) -> np.ndarray:
    """0 empty, 1 partial, 2 full, straight from the matrix; lengths are multiples of the block."""
    rows, columns = (size // block for size in matrix.shape)
    tiles = matrix.reshape(rows, block, columns, block)
    return tiles.any((1, 3)).astype(int) + tiles.all((1, 3))


ids = packed(0, 128)
SHARP = {
    "causal": masks.causal(),
    "window": masks.sliding_window(37, 5),
    "causal window": masks.causal() & masks.sliding_window(50),
    "window and sinks": masks.parse("causal & (window(20) | sinks(4))"),
    "chunked": masks.chunked(32),
    "blocked window": masks.chunked(8, 1, 1),
    "packed": masks.segments(ids),
    "packed causal": masks.causal() & masks.segments(ids),
    "packed causal without padding": masks.causal() & masks.segments(ids, padding=0),
    "prefix": masks.causal() | masks.prefix(lengths=np.int32(50)),
    "lengths": masks.key_padding(lengths=np.int32(50)),
    "global": masks.sliding_window(5, 5) | masks.global_tokens(3),
    "graph": masks.graph(np.argwhere(np.random.default_rng(0).random((128, 128)) < 0.004)),
    "random blocks": masks.random_blocks(128, 8, 3),
    "large random blocks": masks.random_blocks(128, 32, 1),
    "block diffusion": masks.block_diffusion(16, 64),
    "sliding tiles": masks.tiles((16, 8), (4, 4), (3, 1)),
    "block diagonal": masks.block_diagonal(np.array([10, 50, 68])),
    "dense": masks.dense(np.kron(np.random.default_rng(1).random((16, 16)) < 0.5, np.ones((8, 8))).astype(bool)),
}


UNIONS = {"window and sinks", "global"}


@pytest.mark.parametrize("name", SHARP)
def test_block_map_finds_exactly_the_tiles_of_common_masks(name):
    mask = SHARP[name]
    expected = tile_classes(np.asarray(mask.dense(128, 128)), 8)
    found = mask.block_map(128, 128, 8).kinds()[0, 0]
    if name in UNIONS:  # two terms may fill a tile together that neither fills alone: partial, though it is full
        np.testing.assert_array_equal(found > 0, expected > 0)
        assert (found <= expected).all()
    else:
        np.testing.assert_array_equal(found, expected)


def test_a_tree_skips_the_future_and_other_branches_of_the_root():
    branches = np.concatenate([[-1], np.arange(63), [-1], 64 + np.arange(63)])  # two chains of 64
    found = masks.tree(branches).block_map(128, 128, 16).kinds()[0, 0]
    np.testing.assert_array_equal(found > 0, np.kron(np.eye(2), np.tri(4)) > 0)


@pytest.mark.parametrize("largest", [2, np.iinfo(np.int32).max])
@pytest.mark.parametrize("padding", [None, 0])
def test_padding_at_the_end_is_told_apart_from_every_segment(largest, padding):
    smallest = 1 if largest == 2 else np.iinfo(np.int32).min  # no id is free to stand for padding
    ids = np.array([smallest, smallest, 2, 2, largest, largest, 0, 0], np.int32)
    mask = masks.segments(ids, padding=padding)
    other = masks.segments(ids, ids[::-1].copy(), padding=padding)
    for each in (mask, other):
        matrix = np.asarray(each.dense(8, 8))
        assert oracle.broken_tiles(each.block_map(8, 8, 2), matrix) == []
        assert oracle.broken_tiles(jax.jit(lambda m: m.block_map(8, 8, 2))(each), matrix) == []
    if largest == 2:  # the tile of the last segment and the padding is not mistaken for all ids between
        packed = np.array([1, 1, 2, 2, 3, 3, 3, 0], np.int32)
        visited = masks.segments(packed).block_map(8, 8, 2).kinds()[0, 0] > 0
        assert not visited[3, :2].any()


@pytest.mark.parametrize("name", ["packed", "packed causal without padding", "lengths", "graph", "dense", "prefix"])
def test_traced_arrays_give_the_same_tiles_as_known_ones(name):
    mask = SHARP[name]
    traced = jax.jit(lambda mask: mask.block_map(128, 128, 8))(mask)
    np.testing.assert_array_equal(traced.kinds(), mask.block_map(128, 128, 8).kinds())


@pytest.mark.parametrize("q_offset", [0, 7, 1024])
def test_odd_lengths_and_offsets_are_sound_and_overhang_is_never_full(q_offset):
    ids = packed(3, 3000, 20)
    pair = oracle.Pair(
        masks.causal() & (masks.segments(ids) | masks.sinks(9)),
        lambda q, k: (k <= q) & ((ids[q] == ids[k]) | (k < 9)),
    )
    block_map = pair.mask.block_map(1025, 1537, (128, 256), q_offset)
    assert oracle.broken_tiles(block_map, pair.matrix(1025, 1537, q_offset)) == []
    full = masks.everything().block_map(1025, 1537, (128, 256))
    assert full.grid == (9, 7)
    np.testing.assert_array_equal(full.kinds()[0, 0, :8, :6], 2)
    np.testing.assert_array_equal(full.kinds()[0, 0, 8, :], 1)
    np.testing.assert_array_equal(full.kinds()[0, 0, :, 6], 1)


def test_one_compilation_serves_a_thousand_packings():
    compilations = []

    @jax.jit
    def visited(mask):
        compilations.append(1)
        return mask.block_map(256, 256, 32).partial.count

    mask = masks.parse("causal & window(100) & segments")
    packings = [packed(seed, 256)[None] for seed in range(1000)]
    counts = {tuple(np.asarray(visited(mask.bind(segment_ids=ids))).ravel()) for ids in packings}
    assert len(compilations) == 1
    assert len(counts) > 100  # they really were different packings


def test_a_window_bounds_the_width_of_traced_lists():
    mask = masks.causal() & masks.sliding_window(4096) & masks.segments(jnp.zeros(1 << 20, jnp.int32))
    lists = jax.eval_shape(lambda mask: mask.block_map(1 << 20, 1 << 20, 1024), mask)
    for tiles in (lists.partial, lists.partial_t):
        assert tiles.width == 5
        assert tiles.index.shape == (1, 1, 1024 * 5 - 10)  # the first four rows are shorter
    assert lists.band is lists.band_t is None  # the run may leave any of them empty


def test_memory_of_a_traced_map_under_a_window_grows_linearly():
    def memory(length):
        mask = masks.causal() & masks.sliding_window(512) & masks.segments(jnp.zeros(length, jnp.int32))
        compiled = jax.jit(lambda mask: mask.block_map(length, length, 128)).lower(mask).compile()
        usage = compiled.memory_analysis()
        return usage.temp_size_in_bytes + usage.output_size_in_bytes

    assert memory(1 << 17) < 2.5 * memory(1 << 16)


def test_the_candidates_of_a_traced_map_are_compiled_in_once():
    length = 1 << 14
    mask = masks.causal() & masks.segments(jnp.zeros(length, jnp.int32))
    text = jax.jit(lambda mask: mask.block_map(length, length, 128)).lower(mask).as_text()
    candidates = 128 * 129 // 2
    assert len(re.findall(rf"constant dense<.*> : tensor<{candidates}xi", text)) <= 3  # rows, columns and their order


def test_a_million_tokens_are_classified_without_a_matrix():
    length = 1 << 20
    mask = masks.parse("causal & window(4096) & segments", segment_ids=packed(1, length, 2000))
    block_map = mask.block_map(length, length, 1024)
    assert block_map.partial.index.nbytes + block_map.full.index.nbytes < 100_000
    assert 0.99 < block_map.sparsity() < 1.0


def test_a_global_token_does_not_widen_the_lists_of_other_rows():
    length, block = 1 << 20, 128
    mask = masks.causal() & (masks.sliding_window(1024) | masks.sinks(4))
    for block_map in (
        mask.block_map(length, length, block),
        jax.eval_shape(
            lambda ids: (mask & masks.segments(ids)).block_map(length, length, block), jnp.zeros(length, jnp.int32)
        ),
    ):
        tiles = length // block * (1024 // block + 2)
        for lists in (block_map.partial, block_map.full, block_map.partial_t, block_map.full_t):
            assert lists.index.size <= tiles


def test_the_search_looks_into_few_tiles():
    from maskformer.masks.tiles import Programs, search

    found = search(masks.causal() & masks.sliding_window(256), 1 << 16, 1 << 16, (128, 128), Programs())
    assert found.examined < 12 * (found.partial[0].size + found.full[0].size) < 512 * 512


def test_batch_and_head_dimensions_broadcast():
    batch = np.stack([packed(seed, 64) for seed in range(3)])
    per_head = masks.per_head([masks.causal(), masks.sliding_window(9, 9)])
    mask = per_head & masks.segments(batch)
    assert mask.shape == (3, 2)
    for block_map in (mask.block_map(64, 64, 8), jax.jit(lambda m: m.block_map(64, 64, 8))(mask)):
        kinds = block_map.kinds()
        matrix = np.asarray(mask.dense(64, 64))
        assert kinds.shape == (3, 2, 8, 8)
        for b in range(3):
            for h in range(2):
                np.testing.assert_array_equal(kinds[b, h] > 0, tile_classes(matrix[b, h], 8) > 0)


def test_arrays_with_a_head_dimension_are_mapped_over_heads():
    valid = np.random.default_rng(0).random((2, 3, 64)) < 0.05
    mask = masks.causal() & masks.key_padding(valid)
    traced = jax.jit(lambda mask: mask.block_map(64, 64, 8))(mask)
    np.testing.assert_array_equal(traced.kinds(), mask.block_map(64, 64, 8).kinds())
    assert traced.shape == (2, 3)


def test_a_traced_head_chooses_its_mask():
    mask = masks.per_head([masks.causal(), ~masks.causal()])
    pick = jax.jit(lambda h: mask.select(0, h).dense(4, 4))
    for h in range(2):
        np.testing.assert_array_equal(pick(h), mask.dense(4, 4)[0, h])
    kinds = jax.jit(lambda h: mask.select(0, h).block_map(32, 32, 8))(1).kinds()
    np.testing.assert_array_equal(kinds, mask.heads[1].block_map(32, 32, 8).kinds())


def test_a_traced_offset_is_data_and_gives_the_map_of_that_offset():
    mask = masks.causal() & masks.sliding_window(11)
    build = jax.jit(lambda offset: mask.block_map(32, 64, 8, offset))
    for offset in (0, 5, 32):
        block_map = build(offset)
        assert oracle.broken_tiles(block_map, np.asarray(mask.dense(32, 64, offset))) == []
        np.testing.assert_array_equal(block_map.kinds(), mask.block_map(32, 64, 8, offset).kinds())


@pytest.mark.parametrize("traced", [False, True])
def test_tables_with_an_entry_for_each_chunk_of_positions_leave_the_tiles_that_they_say(traced):
    table = np.random.default_rng(3).random((16, 16)) < 0.2
    wide = np.repeat(table, 32, axis=1)
    for mask in (
        masks.predicate(lambda q, k, t: t[q // 32, k // 32], table),
        masks.predicate(lambda q, k, t: t[q >> 5, k], wide),
        masks.predicate(lambda q, k, t: t[q, k // 32], wide.T),
    ):
        build = lambda mask: mask.block_map(512, 512, 32)
        block_map = jax.jit(build)(mask) if traced else build(mask)
        attends = np.asarray(mask.dense(512, 512)).reshape(16, 32, 16, 32)
        np.testing.assert_array_equal(block_map.kinds()[0, 0] == 2, attends.all((1, 3)))
        np.testing.assert_array_equal(block_map.kinds()[0, 0] > 0, attends.any((1, 3)))
    chosen = masks.predicate(lambda q, k, t: t[k // 32], table[0])
    np.testing.assert_array_equal(chosen.block_map(512, 512, 32).kinds()[0, 0, 0] > 0, table[0])



def test_shifted_masks_agree_with_a_slice_of_the_whole():
    mask = masks.causal() & masks.segments(packed(5, 96))
    whole = np.asarray(mask.dense(96, 96))
    piece = masks.shift(mask, q_offset=64, k_offset=32)
    np.testing.assert_array_equal(np.asarray(piece.dense(32, 32)), whole[64:96, 32:64])
    assert oracle.broken_tiles(piece.block_map(32, 32, 8), whole[64:96, 32:64]) == []


def test_what_the_analysis_cannot_see_is_visited_and_named():
    mask = masks.causal() & masks.predicate(lambda q, k: jnp.sort(jnp.stack([q, k]))[0] < 5)
    block_map = mask.block_map(64, 64, 8)
    assert [name.split()[0] for name in block_map.widened] == ["sort"]
    assert oracle.broken_tiles(block_map, np.asarray(mask.dense(64, 64))) == []
    assert masks.causal().block_map(64, 64, 8).widened == ()


def test_a_function_named_like_a_library_one_is_not_believed():
    @jax.jit
    def floor_divide(a, b):
        return b - a

    mask = masks.predicate(lambda q, k: floor_divide(q, 40) > k)
    np.testing.assert_array_equal(
        mask.block_map(64, 64, 8).kinds()[0, 0] > 0, tile_classes(np.asarray(mask.dense(64, 64)), 8) > 0
    )


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k, t: t[q] >= t[k],
        lambda q, k, t: ~(t[q] < 0.5),
        lambda q, k, t: jnp.exp(-(q - k) ** 2 / 50.0) > 0.3,
        lambda q, k, t: jnp.where(k > 20, t[q] * t[k], 1.0 / (q - 30.0)) < 1.0,
        lambda q, k, t: jnp.sqrt(t[q]) + jnp.log(k + 1.0) != 2.0,
        lambda q, k, t: jnp.maximum(t[q], 0.0) <= 3.0,
        lambda q, k, t: jnp.floor(q / 7.0) == jnp.floor(k / 7.0),
        lambda q, k, t: jnp.isfinite(t[q]) & (t[k].astype(jnp.int32) % 2 == 0),
        lambda q, k, t: t[(q * 7) % 64].astype(jnp.bfloat16) + 1 > t[k].astype(jnp.bfloat16),
        lambda q, k, t: jax.lax.cond(q > 30, lambda: t[k], lambda: t[q]) > 0,
        lambda q, k, t: jnp.any(t.reshape(8, 8)[q // 8] > t[k]),
        lambda q, k, t: jnp.stack([q, k, q + k]).sum() < 60,
        lambda q, k, t: jnp.concatenate([t[:3], t[q][None]]).max() > t[k],
        lambda q, k, t: jnp.take(t, q - k, mode="fill", fill_value=1.0) > 0,
    ],
)
@pytest.mark.parametrize("special", [False, True])
def test_float_predicates_with_nan_and_infinity_are_sound(fn, special):
    table = np.sort(np.random.default_rng(0).normal(0, 2, 64)).astype(np.float32)
    if special:
        table[[3, 17, 40]] = np.nan, np.inf, -np.inf
    mask = masks.predicate(fn, table)
    matrix = np.asarray(mask.dense(64, 64))
    assert oracle.broken_tiles(mask.block_map(64, 64, 8), matrix) == []
    assert oracle.broken_tiles(jax.jit(lambda m: m.block_map(64, 64, 8))(mask), matrix) == []


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k: q * 123456789 < k,
        lambda q, k: q + (2**31 - 20) > k,
        lambda q, k: -(2**31) + k - q < 0,
        lambda q, k: jnp.abs(q - (2**31 - 1) + 30 - k) > 5,
        lambda q, k: (q * q * q * q * q * q) % 7 == k % 7,
        lambda q, k: (q << 26) > k,
        lambda q, k: jnp.sum(jnp.stack([q, k]) * 50_000_000) > 0,
        lambda q, k: (q * 4).astype(jnp.int8) > k.astype(jnp.int8),
        lambda q, k: q.astype(jnp.uint32) - k.astype(jnp.uint32) < 9,
        lambda q, k: (q - k).astype(jnp.uint8) // 3 < 9,
        lambda q, k: (q * 1e8).astype(jnp.int32) > k,
    ],
)
def test_integers_that_wrap_around_are_sound(fn):
    mask = masks.predicate(fn)
    matrix = np.asarray(mask.dense(64, 64))
    assert oracle.broken_tiles(mask.block_map(64, 64, 8), matrix) == []
    offset = jax.jit(lambda offset: mask.block_map(64, 64, 8, offset))(0)
    assert oracle.broken_tiles(offset, matrix) == []


def test_predicates_may_close_over_traced_arrays():
    def build(table):
        return masks.predicate(lambda q, k: table[q] == table[k]).block_map(64, 64, 8)

    table = packed(2, 64)
    np.testing.assert_array_equal(jax.jit(build)(table).kinds(), build(jnp.asarray(table)).kinds())


def test_maps_are_the_same_under_vmap_as_one_by_one():
    batch = jnp.stack([packed(seed, 64) for seed in range(3)])
    together = jax.vmap(lambda ids: masks.segments(ids).block_map(64, 64, 8))(batch)
    for b in range(3):
        alone = masks.segments(batch[b]).block_map(64, 64, 8)
        one = jax.tree.map(operator.itemgetter(b), together)
        np.testing.assert_array_equal(one.kinds(), alone.kinds())


def test_sparsity_and_flops_count_visited_tiles():
    block_map = masks.causal().block_map(100, 100, 32)
    assert block_map.sparsity() == pytest.approx(6 / 16)
    area = sum((min(100, 32 * i + 32) - 32 * i) * min(100, 32 * i + 32) for i in range(4))
    assert float(block_map.active_area()[0, 0]) == area
    assert block_map.active_flops(64) == 4 * 64 * area
    assert block_map.active_flops(64, batch=2, heads=8) == 16 * 4 * 64 * area
    assert block_map.active_flops(64, v_head_dim=32) == 2 * (64 + 32) * area
    assert block_map.active_flops(64, backward=True) == 14 * 64 * area
    with pytest.raises(ValueError, match="heads 2"):
        masks.per_head(masks.causal(), masks.causal()).block_map(8, 8, 4).active_flops(64, heads=3)


def test_an_empty_mask_has_empty_lists_and_a_full_one_no_partial_tile():
    empty = masks.nothing().block_map(64, 64, 16)
    assert empty.partial.count.sum() == empty.full.count.sum() == 0 and empty.sparsity() == 1.0
    full = masks.everything().block_map(64, 64, 16)
    assert full.partial.count.sum() == 0 and (full.full.count == 4).all() and full.sparsity() == 0.0


@pytest.mark.parametrize(
    "sizes, said",
    [
        ((0, 8, 4), "q_len=0, expected an int of at least 1"),
        ((8, 0, 4), "kv_len=0, expected an int of at least 1"),
        ((8.0, 8, 4), "q_len=8.0, expected an int"),
        ((8, 8, 0), "block=0, expected an int of at least 1"),
        ((8, 8, (4, -1)), "block=-1, expected an int of at least 1"),
        ((8, 8, None), "block=None, expected an int"),
        ((8, 8, (4, 4, 4)), r"expected an int or \(block_q, block_kv\)"),
        ((8, 8, 4, 1.5), "q_offset=1.5, expected an int or an integer scalar array"),
        ((8, 8, 4, 2**31), "q_offset=2147483648, expected an int of at most"),
    ],
)
def test_impossible_sizes_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        masks.causal().block_map(*sizes)


def test_a_predicate_may_take_a_random_key():
    draw = lambda q, k, key: jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, q), k))
    mask = masks.causal() & masks.predicate(draw, jax.random.key(0))
    block_map = mask.block_map(32, 32, 8)
    assert (block_map.kinds()[0, 0] == np.tril(np.ones((4, 4)))).all()  # drawn anew per pair, so nothing is known
