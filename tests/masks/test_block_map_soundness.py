"""Block maps may be too cautious, never wrong: random masks against a NumPy oracle."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from tests.masks import oracle

few = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def check_static(pair: oracle.Pair, problem: tuple) -> None:
    q_len, kv_len, block_q, block_kv, q_offset = problem
    block_map = pair.mask.block_map(q_len, kv_len, (block_q, block_kv), q_offset)
    assert oracle.broken_tiles(block_map, pair.matrix(q_len, kv_len, q_offset)) == []


def check_traced(pair: oracle.Pair, problem: tuple) -> None:
    q_len, kv_len, block_q, block_kv, q_offset = problem
    build = jax.jit(lambda mask: mask.block_map(q_len, kv_len, (block_q, block_kv), q_offset))
    block_map = build.lower(pair.mask).compile({"xla_backend_optimization_level": 0})(pair.mask)
    assert oracle.broken_tiles(block_map, pair.matrix(q_len, kv_len, q_offset)) == []


any_leaf = hypothesis.strategies.one_of(oracle.leaves, oracle.predicates, oracle.leaves, oracle.slow_leaves)


@settings(max_examples=120, **few)
@given(oracle.expressions(4, any_leaf), oracle.problems)
def test_expressions_of_known_arrays_are_sound(pair, problem):
    check_static(pair, problem)


@settings(max_examples=200, **few)
@given(oracle.predicates, oracle.problems)
def test_random_predicates_are_sound(pair, problem):
    check_static(pair, problem)


@settings(max_examples=15, **few)
@given(oracle.expressions(4, oracle.leaves), oracle.problems)
def test_expressions_of_traced_arrays_are_sound(pair, problem):
    check_traced(pair, problem)


@settings(max_examples=40, **few)
@given(oracle.predicates, oracle.problems)
def test_random_predicates_of_traced_arrays_are_sound(pair, problem):
    check_traced(pair, problem)


@settings(max_examples=40, **few)
@given(any_leaf, oracle.problems)
def test_leaves_need_no_implicit_promotion_of_types(pair, problem):
    q_len, kv_len, block_q, block_kv, q_offset = problem
    with jax.numpy_dtype_promotion("strict"):
        pair.mask.dense(q_len, kv_len, q_offset)
        pair.mask.block_map(q_len, kv_len, (block_q, block_kv), q_offset)
        jax.eval_shape(lambda mask: mask.block_map(q_len, kv_len, (block_q, block_kv), q_offset), pair.mask)


@settings(max_examples=60, **few)
@given(any_leaf, oracle.problems)
def test_every_leaf_has_the_matrix_of_its_oracle(pair, problem):
    q_len, kv_len, _, _, q_offset = problem
    np.testing.assert_array_equal(
        np.asarray(pair.mask.dense(q_len, kv_len, q_offset)), pair.matrix(q_len, kv_len, q_offset)
    )


@pytest.mark.slow
@settings(max_examples=4000, **few)
@given(oracle.expressions(5, any_leaf), oracle.problems)
def test_thousands_of_expressions_of_known_arrays_are_sound(pair, problem):
    check_static(pair, problem)


@pytest.mark.slow
@settings(max_examples=500, **few)
@given(oracle.expressions(4, any_leaf), oracle.problems)
def test_hundreds_of_expressions_of_traced_arrays_are_sound(pair, problem):
    check_traced(pair, problem)
