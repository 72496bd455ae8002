"""Masks as one run of keys per query, against their matrices."""

import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from maskformer import masks
from maskformer.attention import arguments, intervals

BATCH, LENGTH = 2, 24
QUICK = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
numbers = st.integers(0, 30)


def of_seed(build):
    return st.builds(lambda seed: build(np.random.default_rng(seed)), st.integers(0, 2**31 - 1))


def some_lengths(rng):
    return rng.integers(-3, LENGTH + 5, BATCH).astype(np.int32)


def some_ids(rng):
    return rng.integers(0, 3, (BATCH, LENGTH)).astype(np.int32)


from_zero = st.one_of(
    st.just(masks.causal()),
    st.just(masks.nothing()),
    st.builds(masks.sinks, numbers),
    of_seed(lambda rng: masks.key_padding(lengths=some_lengths(rng))),
    of_seed(lambda rng: masks.prefix(lengths=some_lengths(rng))),
    of_seed(lambda rng: masks.query_padding(some_ids(rng) > 0, lengths=some_lengths(rng))),
)
leaves = st.one_of(
    from_zero,
    st.just(masks.everything()),
    st.builds(masks.sliding_window, numbers, numbers),
    st.builds(masks.sliding_window, st.just(2**31 - 1), st.just(2**31 - 1)),
    st.builds(masks.chunked, st.integers(1, 30), numbers, numbers),
    st.builds(masks.chunked, st.sampled_from([2, 2**31 - 1]), st.just(2**31 - 1), st.just(2**31 - 1)),
    of_seed(lambda rng: masks.documents(some_ids(rng))),
    of_seed(lambda rng: masks.segments(np.sort(some_ids(rng), axis=-1))),
    of_seed(lambda rng: masks.query_ranges(10 * some_ids(rng) - 5, 15 * some_ids(rng))),
)
sees_itself = st.one_of(
    st.just(masks.causal()),
    st.builds(masks.sliding_window, numbers, numbers),
    st.builds(masks.chunked, st.integers(1, 30), numbers, numbers),
    of_seed(lambda rng: masks.documents(some_ids(rng))),
)
both = lambda a, b: a & b
unions = st.one_of(
    st.builds(lambda a, b: a | b, from_zero, st.builds(both, from_zero, from_zero)),
    st.builds(lambda a, b: a | b, sees_itself, st.builds(both, sees_itself, sees_itself)),
)
runs = st.builds(lambda a, b, c: a & b & c, leaves, leaves, st.one_of(leaves, unions))


def rows_of(mask, q_len, kv_len, q_offset):
    q = jnp.zeros((BATCH, q_len, 4, 8))
    k = jnp.zeros((BATCH, kv_len, 4, 8))
    options = dict(mask=mask, bias=None, score_mod=None, sink_logits=None, scale=None, logits_soft_cap=None)
    options |= dict(dropout_rate=0.0, dropout_key=None, q_offset=q_offset, return_residual=False)
    return intervals.rows(arguments.check(q, k, k, **options))


@QUICK
@hypothesis.given(runs, st.sampled_from([(24, 24, 0), (9, 24, 0), (5, 20, 11), (24, 3, 0)]))
def test_the_run_of_keys_of_every_query_is_what_the_mask_says(mask, lengths):
    q_len, kv_len, q_offset = lengths
    rows = rows_of(mask, *lengths)
    assert isinstance(rows, intervals.Rows), rows
    k = np.arange(kv_len)
    found = np.ones((BATCH, q_len, kv_len), bool)
    if rows.starts is not None:
        assert rows.starts.dtype == np.int32 and (rows.starts >= 0).all()
        found &= np.asarray(rows.starts)[..., None] <= k
    if rows.ends is not None:
        assert rows.ends.dtype == np.int32 and (rows.ends <= kv_len).all()
        found &= k < np.asarray(rows.ends)[..., None]
    if rows.causal:
        found &= np.tri(q_len, kv_len, dtype=bool)
    np.testing.assert_array_equal(found, np.broadcast_to(mask.dense(q_len, kv_len, q_offset), found.shape))


def test_documents_are_runs_whatever_their_ids_turn_out_to_be():
    @jax.jit
    def bounds(ids):
        rows = rows_of(masks.causal() & masks.documents(ids), 6, 6, 0)
        return rows.starts, rows.ends

    starts, ends = bounds(np.array([[7, 7, 0, 7, 7, 7], [1, 2, 2, 2, 2, 0]]))
    np.testing.assert_array_equal(starts, [[0, 0, 2, 3, 3, 3], [0, 1, 1, 1, 1, 5]])
    np.testing.assert_array_equal(ends, [[2, 2, 3, 6, 6, 6], [1, 5, 5, 5, 5, 6]])


@pytest.mark.parametrize(
    "mask, reason",
    [
        (masks.causal() & (masks.sliding_window(3) | masks.sinks(2)), r"sliding_window\(3\) \| sinks\(2\), which"),
        (masks.sliding_window(3) | masks.prefix(lengths=np.array(2)), "which is not known to be one run"),
        (~masks.causal(), "~causal, which is not one run"),
        (masks.dilated_window(4, 0, 2), "dilated_window.*not one run"),
        (masks.segments(np.array([1, 2, 1])), "segment 1 is not one run of keys"),
        (masks.per_head([masks.causal(), masks.sliding_window(2)] * 2), "differs between heads"),
        (masks.prefix(marked=np.array([1, 0, 1])), "prefix.*not one run"),
        (masks.key_padding(np.array([1, 0, 1])), "key_padding.*not one run"),
    ],
)
def test_what_is_not_one_run_is_refused_with_its_term(mask, reason):
    found = rows_of(mask, 3, 3, 0)
    assert isinstance(found, str)
    assert re.search(reason, found), found


def test_traced_segments_name_the_mask_that_would_do():
    found = []
    jax.eval_shape(lambda ids: found.append(rows_of(masks.segments(ids), 6, 6, 0)), np.zeros((2, 6), np.int32))
    assert "masks.documents" in found[0]
