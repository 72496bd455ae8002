"""The algebra: what a mask is, how it broadcasts, and how it refuses."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskformer import masks
from tests.masks import oracle


def test_causal_lets_a_query_see_itself_and_the_past_only():
    matrix = np.asarray(masks.causal().dense(3, 3))
    assert matrix.tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_causal_lines_up_positions_through_the_offset():
    np.testing.assert_array_equal(masks.causal().dense(2, 5, q_offset=3), np.tri(5, dtype=bool)[3:])


@pytest.mark.parametrize("left, right", [(0, 0), (2, 0), (0, 3), (3, 1)])
def test_sliding_window_follows_jax_nn(left, right):
    x = jnp.eye(9)[None, :, None, :]
    weights = jax.nn.dot_product_attention(jnp.zeros_like(x), x, x, local_window_size=(left, right))
    np.testing.assert_array_equal(masks.sliding_window(left, right).dense(9, 9), weights[0, :, 0] > 0)


def test_precedence_is_pythons_so_a_missing_parenthesis_leaks_the_future():
    safe, leaky = masks.parse("causal & (window(2) | sinks(2))"), masks.parse("causal & window(2) | sinks(2)")
    assert not np.triu(np.asarray(safe.dense(6, 6)), 1).any()
    assert np.triu(np.asarray(leaky.dense(6, 6)), 1).any()


def test_operators_flatten_and_follow_boolean_algebra():
    a, b, c = masks.causal(), masks.sliding_window(2, 2), masks.strided(3)
    assert (a & b & c) == masks.And((a, b, c))
    matrices = [np.asarray(m.dense(8, 8)) for m in (a, b, c)]
    np.testing.assert_array_equal((~(a & b) | c).dense(8, 8), ~(matrices[0] & matrices[1]) | matrices[2])


def test_a_term_that_another_implies_is_left_out():
    ids = np.array([1, 1, 2, 2, 1], np.int32)
    causal, window, segments = masks.causal(), masks.sliding_window(2), masks.segments(ids)
    both = causal & segments
    assert both & masks.causal() & window & masks.segments(ids) == both & window
    assert causal & masks.causal() == causal
    assert causal | window | masks.causal() == causal | window
    assert (both & masks.segments(ids.copy())).terms == (causal, segments, segments)  # values are not looked at

    documents = masks.documents(ids)
    assert documents.implies(segments) and not segments.implies(documents)
    assert segments & causal & documents == causal & documents == causal & documents & segments
    assert documents | causal | segments == causal | segments
    assert len((documents & masks.segments(ids, padding=1)).terms) == 2
    assert len((documents & masks.segments(ids, ids)).terms) == 2


def test_a_copy_is_told_apart_from_its_original():
    ids = np.array([1, 1, 2], np.int32)
    mask = masks.segments(ids) & masks.causal()
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert other == mask and len((mask & other).terms) == 3  # the values of arrays are not looked at


def test_a_function_that_cannot_be_hashed_implies_itself_alone():
    class Table(list):
        def __call__(self, q, k):
            return q > k

    mask = masks.predicate(Table())
    assert mask & mask == mask and len((mask & masks.predicate(Table())).terms) == 2


def test_documents_equal_segments_where_ids_stand_together():
    packed = np.array([[3, 3, 1, 1, 1, 0], [0, 2, 2, 7, 7, 7]])
    np.testing.assert_array_equal(masks.documents(packed).dense(6, 6), masks.segments(packed).dense(6, 6))
    known, traced = masks.documents(packed), jax.jit(masks.documents)(packed)
    np.testing.assert_array_equal(known.starts, [[0, 0, 2, 2, 2, 5], [0, 1, 1, 3, 3, 3]])
    np.testing.assert_array_equal(known.starts, traced.starts)
    assert masks.documents(known.starts).starts.tolist() == known.starts.tolist()


def test_a_known_shift_is_structure_and_a_traced_one_is_data():
    shifted = masks.shift(masks.segments(jnp.array([[1, 1, 2], [1, 2, 2]])), 1, -1)
    assert len(jax.tree.leaves(shifted)) == 1
    mapped = jax.vmap(lambda mask: mask.dense(2, 3))(shifted)
    np.testing.assert_array_equal(mapped, shifted.dense(2, 3))
    assert len(jax.tree.leaves(masks.shift(masks.causal(), jnp.int32(1)))) == 1


def test_a_mask_is_a_pytree_whose_leaves_are_its_arrays():
    ids = jnp.array([[1, 1, 2]])
    mask = masks.causal() & masks.segments(ids)
    assert [leaf is ids for leaf in jax.tree.leaves(mask)] == [True]
    assert jax.tree.map(lambda x: x, mask) == mask
    assert jax.tree.leaves(masks.parse("causal & (window(4) | sinks(2))")) == []


def test_equal_masks_are_equal_and_hash_alike():
    ids = np.array([1, 1, 2])
    make = lambda: masks.causal() & masks.segments(ids.copy())
    assert make() == make() and hash(make()) == hash(make())
    assert make() != masks.causal() & masks.segments(ids + 1)
    assert masks.sliding_window(3) != masks.sliding_window(4)
    assert {masks.causal(): 1}[masks.causal()] == 1


def test_masks_of_different_kinds_are_different_structures_to_jax():
    ids, a, b = np.array([1, 1, 2], np.int32), masks.causal(), masks.sliding_window(2)
    kinds = [
        a, masks.everything(), masks.nothing(), ~a, ~masks.nothing(), a & b, a | b, masks.per_head([a, b]),
        masks.sinks(2), masks.strided(2), masks.key_padding(ids), masks.query_padding(ids), masks.prefix(marked=ids),
        masks.query_ranges(ids, ids + 1), masks.key_ranges(ids, ids + 1), masks.segments(ids), masks.shared_prefix(ids),
        masks.shift(a, 1), masks.shift(a, 2), masks.parse("segments"), masks.parse("documents"),
    ]  # fmt: skip
    structures = list(map(jax.tree.structure, kinds))
    for i, mine in enumerate(structures):
        assert [j for j, other in enumerate(structures) if mine == other] == [i], kinds[i]
        assert [j for j, other in enumerate(kinds) if kinds[i] == other] == [i], kinds[i]


def test_dense_has_only_the_batch_dimensions_of_the_arrays():
    ids = np.ones((2, 4), np.int32)
    assert masks.causal().dense(4, 4).shape == (4, 4)
    assert masks.segments(ids[0]).dense(4, 4).shape == (4, 4)
    assert masks.segments(ids[:1]).dense(4, 4).shape == (1, 4, 4)
    assert masks.segments(ids).dense(4, 4).shape == (2, 4, 4)
    assert masks.dense(np.ones((2, 3, 4, 4), bool)).dense(4, 4).shape == (2, 3, 4, 4)
    assert (masks.per_head([masks.causal()] * 3) & masks.segments(ids)).dense(4, 4).shape == (2, 3, 4, 4)


def test_batch_entries_and_heads_select_their_own_arrays():
    array = np.random.default_rng(0).random((2, 3, 4, 5)) < 0.5
    lengths = np.array([2, 5])
    mask = masks.dense(array) & masks.key_padding(lengths=lengths)
    pick = jax.jit(lambda b, h: mask.select(b, h).dense(4, 5))
    for b in range(2):
        for h in range(3):
            expected = array[b, h] & (np.arange(5) < lengths[b])
            np.testing.assert_array_equal(mask.dense(4, 5)[b, h], expected)
            np.testing.assert_array_equal(mask.select(b, h).dense(4, 5), expected)
            np.testing.assert_array_equal(pick(b, h), expected)


def test_calling_a_mask_gives_the_entries_of_its_matrix():
    ids = np.array([[1, 2, 1, 2]])
    mask = ~masks.causal() | masks.segments(ids)
    q, k = np.array([[0, 3]]), np.array([[1], [2]])
    np.testing.assert_array_equal(mask(q, k), mask.dense(4, 4)[0][q, k])
    with pytest.raises(ValueError, match=r"select\(b, h\)"):
        masks.segments(np.ones((2, 4), np.int32))(q, k)


def test_masks_work_inside_vmap_scan_and_grad():
    batch = jnp.array([[1, 1, 2], [1, 2, 2]])
    expected = batch[:, :, None] == batch[:, None, :]
    np.testing.assert_array_equal(jax.vmap(lambda ids: masks.segments(ids).dense(3, 3))(batch), expected)
    _, scanned = jax.lax.scan(lambda c, ids: (c, masks.segments(ids).dense(3, 3)), 0, batch)
    np.testing.assert_array_equal(scanned, expected)
    grad = jax.grad(lambda x: jnp.where(masks.segments(batch[0]).dense(3, 3), x, 0.0).sum())(2.0)
    assert grad == 5.0


def test_a_predicate_is_written_for_one_query_and_one_key():
    table = np.arange(12).reshape(4, 3)
    mask = masks.predicate(lambda q, k, table: jnp.any(table[q] == k + 3), table)
    expected = [[any(table[q, d] == k + 3 for d in range(3)) for k in range(6)] for q in range(4)]
    np.testing.assert_array_equal(mask.dense(4, 6), expected)


@pytest.mark.parametrize("number", [lambda q, k: (q - k) % 3, lambda q, k: (q - k) * 0.5])
def test_a_predicate_that_gives_a_number_attends_unless_it_is_zero_in_any_expression(number):
    mask = masks.predicate(number)
    q, k = np.arange(6)[:, None], np.arange(6)[None]
    attends = number(q, k) != 0
    for combined, expected in [(mask, attends), (~mask, ~attends), (mask & masks.everything(), attends)]:
        np.testing.assert_array_equal(combined.dense(6, 6), expected)
        assert oracle.broken_tiles(combined.block_map(6, 6, 1), expected) == []


def test_arrays_of_a_predicate_may_have_batch_and_head_dimensions():
    table = np.random.default_rng(0).integers(0, 2, (2, 3, 5))
    mask = masks.predicate(lambda q, k, t: t[q] == t[k], table, batch_dims=2)
    np.testing.assert_array_equal(mask.dense(5, 5), table[..., :, None] == table[..., None, :])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: masks.causal() & np.ones((3, 3), bool), r"masks\.dense\(array\)"),
        (lambda: np.ones((3, 3), bool) & masks.causal(), r"masks\.dense\(array\)"),
        (lambda: masks.causal() | 3, "expected another mask"),
        (lambda: bool(masks.causal()), r"& \| ~"),
        (lambda: masks.sliding_window(-1), "left=-1, expected an int of at least 0"),
        (lambda: masks.sliding_window(2.5), "left=2.5"),
        (lambda: masks.sliding_window(2**31), "left=2147483648, expected an int of at most 2147483647"),
        (lambda: masks.chunked(0), "size=0"),
        (lambda: masks.random_blocks(8, 2, count=1.5), "count=1.5"),
        (lambda: masks.key_padding(), "valid=.batch, length."),
        (lambda: masks.segments(np.ones(3)), "dtype float64, expected integer"),
        (lambda: masks.segments(np.ones((2, 2, 2, 2), int)), r"shape \(2, 2, 2, 2\)"),
        (lambda: masks.segments(np.array([0, 2**32])), "cuts off to int32; number them anew"),
        (lambda: masks.segments(np.array([0, 2**32], np.uint64)), "cuts off to uint32"),
        (lambda: masks.predicate(lambda q, k, t: t[q] == 0, np.array([0, 2**32])), r"arrays\[0\] has values"),
        (lambda: masks.segments(np.ones(3, int), padding=0.0), "padding=0.0, expected an int"),
        (lambda: masks.segments(np.ones(3, np.uint8), padding=-1), "the ids are uint8, 0 to 255"),
        (lambda: masks.shared_prefix(np.ones(3, int), shared_id=None), "shared_id=None"),
        (lambda: masks.key_padding(np.ones(3)), "dtype float64, expected bool or integer"),
        (lambda: masks.neighborhood((4, 4), 5), "kernel . dilation <= size"),
        (lambda: masks.neighborhood((4, 4), 3, causal=1), "expected one bool, or 2"),
        (lambda: masks.neighborhood((4, 4), 3, tile=(3, 4)), "not a multiple"),
        (lambda: masks.neighborhood((4, 4), (3, 3, 3)), "expected one int, or 2"),
        (lambda: masks.tiles((5, 4), 2, 1), "multiples"),
        (lambda: masks.tree(np.array([-1, 1])), "less than n"),
        (lambda: masks.tree(np.array([-1, 0]), context=1.5), "context has dtype float64"),
        (lambda: masks.tree(np.array([-1, 0]), context=-1), "context=-1"),
        (lambda: masks.tree(np.zeros(0, int)), "parents is empty"),
        (lambda: masks.shift(masks.causal(), 1.5), "shift: q_offset=1.5"),
        (lambda: masks.shift(3), "shift: mask=3, expected a mask"),
        (lambda: masks.random_blocks(2**20, 16, 3, near=2**15), "near=32768 leaves out more than half of 65536 blocks"),
        (lambda: masks.neighborhood((2**16, 2**16), 3), "at most 2147483647 points"),
        (lambda: masks.predicate(lambda q: q), "called with q, k and 0 arrays, and it takes"),
        (lambda: masks.segments(np.uint32([1]), np.int32([1])), "uint32 and kv_ids int32, which JAX compares as int32"),
        (lambda: masks.shift(masks.causal(), 0, np.array([1, 2])), "k_offset=array"),
        (lambda: masks.graph(np.ones((4, 3), int)), r"shape \(4, 3\)"),
        (lambda: masks.per_head([]), "one mask for each head"),
        (lambda: masks.per_head([masks.key_padding(lengths=[[1, 2, 3]]), masks.causal()]).shape, "arrays for 3 heads"),
        (lambda: masks.predicate(3), "takes a function"),
        (lambda: masks.predicate(lambda q, k: None).dense(2, 2), "returned a NoneType, expected one bool"),
        (lambda: masks.predicate(lambda q, k: q > k and k > 0).dense(2, 2), "ask for one answer"),
        (lambda: masks.predicate(lambda q, k: np.arange(3)[q] > k).dense(2, 2), r"predicate\(fn, array\)"),
        (lambda: masks.predicate(lambda q, k: [0, 1][q] > k).block_map(2, 2, 2), r"predicate\(fn, array\)"),
        (lambda: masks.causal().dense(4, 8, q_offset=2**31 - 2), "position 2147483649 is asked for"),
        (lambda: masks.shift(masks.causal(), 2**31 - 2).block_map(4, 4, 4), "position 2147483649 is asked for"),
        (lambda: masks.block_diagonal((1, 2), (3,)), "expected the same"),
        (lambda: masks.block_diagonal((1, 2), align=True), "'start' or 'end'"),
        (lambda: masks.segments(np.ones(3, int)).dense(4, 3), "q_ids has 3 entries; expected at least 4"),
        (lambda: masks.segments(np.ones(3, int)).dense(3, 3, q_offset=1), "from position 1 on"),
        (lambda: masks.segments(np.ones(3, int)).block_map(3, 8, 4), "expected at least 8"),
        (lambda: masks.dense(np.ones((3, 3), bool)).dense(3, 4), "3 x 3"),
        (lambda: (masks.segments(np.ones((2, 3), int)) & masks.dense(np.ones((3, 3, 3), int))).shape, "not broadcast"),
        (lambda: masks.segments(np.ones((2, 3), int)).select(2), r"select\(2\)"),
        (lambda: masks.predicate(lambda q, k, t: t == q, np.ones(3)).block_map(3, 3, 3), r"shape \(3,\) for one query"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        make()


def test_graphs_with_padding_duplicates_and_a_batch_match_their_adjacency():
    rng = np.random.default_rng(0)
    adjacency = rng.random((2, 10, 10)) < 0.2
    edges = np.full((2, 60, 2), -1, np.int32)
    for b in range(2):
        found = np.argwhere(adjacency[b])
        found = rng.permutation(np.concatenate([found, found[:5]]))
        edges[b, : len(found)] = found
    mask = masks.graph(edges)
    np.testing.assert_array_equal(mask.dense(10, 10), adjacency)
    both = jax.jit(lambda edges: masks.graph(edges, directed=False).dense(10, 10))(edges)
    np.testing.assert_array_equal(both, adjacency | adjacency.swapaxes(1, 2))


def test_the_padding_of_edges_is_no_edge_between_positions_below_zero():
    mask = masks.shift(masks.graph(np.array([[-1, -1], [0, 1]])), -1, -1)
    assert np.argwhere(mask.dense(3, 3)).tolist() == [[1, 2]]
    assert np.argwhere(mask.block_map(3, 3, 1).kinds()[0, 0]).tolist() == [[1, 2]]


def test_a_graph_without_edges_attends_nowhere():
    mask = masks.graph(np.zeros((0, 2), np.int32))
    assert not np.asarray(mask.dense(4, 4)).any() and mask.block_map(4, 4, 2).sparsity() == 1.0


def test_random_blocks_are_the_same_every_time_and_differ_by_seed():
    assert masks.random_blocks(512, 16, 3, seed=1) == masks.random_blocks(512, 16, 3, seed=1)
    assert masks.random_blocks(512, 16, 3, seed=1) != masks.random_blocks(512, 16, 3, seed=2)
    matrix = np.asarray(masks.bigbird(512, block=16, window=3, random=2, global_blocks=1).dense(512, 512))
    tiles = matrix.reshape(32, 16, 32, 16).any((1, 3))
    assert (tiles[2:31].sum(1) == 1 + 3 + 2).all()  # global, window, random: none drawn twice


def test_a_batch_of_trees_is_built_under_jit():
    parents = np.array([[-1, 0, 0, 1], [-1, -1, 1, 2]])
    dense = jax.jit(lambda parents: masks.tree(parents, context=1).dense(5, 5))(parents)
    for b in range(2):
        np.testing.assert_array_equal(dense[b], masks.tree(parents[b], context=1).dense(5, 5))


def test_tiled_order_visits_fewer_blocks_than_rows():
    rows = masks.neighborhood((64, 64), 13).block_map(4096, 4096, 64)
    tiled = masks.neighborhood((64, 64), 13, tile=(8, 8)).block_map(4096, 4096, 64)
    assert tiled.sparsity() > rows.sparsity()
