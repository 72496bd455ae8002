"""ALiBi slopes and T5 buckets against independent definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskformer as mf
from maskformer.attention import score_mods


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 16, 20])
def test_alibi_slopes_follow_the_papers_recipe_for_any_head_count(heads):
    def recipe(n):  # the power of two case is a geometric series whose first term is its ratio
        if math.log2(n).is_integer():
            return [2 ** (-8 / n) ** 1 * (2 ** (-8 / n)) ** i for i in range(n)]
        closest = 2 ** math.floor(math.log2(n))
        return recipe(closest) + recipe(2 * closest)[0::2][: n - closest]

    np.testing.assert_allclose(score_mods.alibi_slopes(heads), recipe(heads), rtol=1e-12)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_equal_a_scalar_transcription(bidirectional):
    def bucket(relative, buckets=32, far=128):
        result, n = 0, -relative
        if bidirectional:
            buckets //= 2
            result += buckets if n < 0 else 0
            n = abs(n)
        else:
            n = max(n, 0)
        exact = buckets // 2
        if n < exact:
            return result + n
        large = exact + int(np.float32(math.log(n / exact)) / math.log(far / exact) * (buckets - exact))
        return result + min(large, buckets - 1)

    relative = np.arange(-300, 301)
    found = score_mods.relative_position_bucket(jnp.asarray(relative), bidirectional=bidirectional)
    # At a bucket's exact edge float32 may round either way.
    assert (np.asarray(found) != [bucket(int(r)) for r in relative]).mean() < 0.01


def test_t5_bias_adds_the_tables_entry_of_bucket_and_head():
    table = jax.random.normal(jax.random.key(0), (32, 2))
    q, k, v = jax.random.normal(jax.random.key(1), (3, 1, 24, 2, 8))
    distance = np.arange(24)[None] - np.arange(24)[:, None]
    bias = table[score_mods.relative_position_bucket(jnp.asarray(distance))].transpose(2, 0, 1)[None]
    found = mf.dot_product_attention(q, k, v, score_mod=score_mods.t5_bias(table))
    np.testing.assert_allclose(found, mf.dot_product_attention(q, k, v, bias=bias), atol=2e-6)


def test_a_score_mod_may_index_in_any_way_a_scalar_function_can():
    table = jax.random.normal(jax.random.key(0), (2, 3, 24))
    q, k, v = jax.random.normal(jax.random.key(1), (3, 2, 24, 3, 8))
    bias = jnp.broadcast_to(table[:, :, None, :], (2, 3, 24, 24))
    found = mf.dot_product_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + table[b][h][j])
    np.testing.assert_allclose(found, mf.dot_product_attention(q, k, v, bias=bias), atol=2e-6)


def test_a_score_mod_that_returns_no_scalar_is_refused():
    x = jnp.ones((1, 4, 1, 8))
    with pytest.raises(ValueError, match="one scalar"):
        mf.dot_product_attention(x, x, x, score_mod=lambda score, b, h, q, k: jnp.stack([score, score]))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: score_mods.alibi(2), "alibi: slopes=2: expected one for each head, e.g. alibi_slopes(8)"),
        (lambda: score_mods.alibi([]), "alibi: slopes=[]: expected one for each head"),
        (lambda: score_mods.alibi("steep"), "alibi: slopes='steep': expected"),
        (lambda: score_mods.alibi(jnp.ones((2, 3))), "alibi: slopes of shape (2, 3): expected"),
        (lambda: score_mods.alibi([[1.0], [1.0, 2.0]]), "alibi: slopes=[[1.0], [1.0, 2.0]]: expected"),
        (lambda: score_mods.alibi_slopes(0), "alibi_slopes: heads=0: expected an integer of at least 1"),
        (lambda: score_mods.alibi_slopes("8"), "alibi_slopes: heads='8': expected an integer"),
        (lambda: score_mods.t5_bias(32), "t5_bias: table=32: expected shape [buckets, heads]"),
        (lambda: score_mods.t5_bias(jnp.ones((3, 2))), "t5_bias: buckets=3: expected an integer of at least 4"),
        (lambda: score_mods.t5_bias(jnp.ones((32, 2)), max_distance=8), "max_distance=8: expected an integer of at"),
        (lambda: score_mods.t5_bias(jnp.ones((32, 2)), bidirectional=0), "bidirectional=0: expected True or False"),
        (lambda: score_mods.relative_bias([1.0, 2.0]), "relative_bias: table=[1.0, 2.0]: expected shape [heads, 2"),
        (lambda: score_mods.relative_position_bucket(jnp.arange(3), buckets=1), "buckets=1: expected an integer"),
        (lambda: score_mods.chain(3), "score_mod=3: expected a function of (score, batch"),
        (lambda: score_mods.chain(score_mods.alibi([1.0]), score_mods.alibi([1.0, 2.0])), "chain: heads=(1, 2)"),
        (lambda: attend(lambda score, q, k: score), "got one of (score, q, k): too many positional arguments"),
        (lambda: attend(0), "score_mod=0: expected a function"),
        (lambda: attend(jnp.ones(4)), "expected a function"),
        (lambda: attend(lambda score, b, h, q, k: score if q > k else 0.0), "use &, |, ~ and jnp.where"),
        (lambda: attend(score_mods.alibi([1.0, 0.5])), "its table has 2 heads, but query has 4"),
        (lambda: attend(score_mods.chain(score_mods.t5_bias(jnp.ones((32, 8))))), "8 heads, but query has 4"),
    ],
)
def test_mistakes_are_named_in_one_line(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and str(error.value).isprintable()


def attend(score_mod):
    x = jax.ShapeDtypeStruct((1, 4, 4, 8), jnp.float32)
    return mf.explain(None, x, x, x, score_mod=score_mod)


def test_a_relative_table_of_even_width_has_no_centre():
    with pytest.raises(ValueError, match="2 \\* reach \\+ 1"):
        score_mods.relative_bias(jnp.zeros((2, 8)))


def test_a_score_mod_of_float64_logits_keeps_their_precision():
    with jax.enable_x64(True):
        table = jnp.linspace(0.0, 1.0, 9)
        query, value = jnp.zeros((1, 1, 1, 4)), jnp.arange(9.0).reshape(1, 9, 1, 1)
        adds = lambda score, b, h, q, k: score + table[k]
        key = jnp.zeros((1, 9, 1, 4))
        out = mf.dot_product_attention(query, key, value, score_mod=adds, implementation="reference")
        weights = np.exp(np.linspace(0.0, 1.0, 9))
        np.testing.assert_allclose(out[0, 0, 0, 0], (weights * np.arange(9.0)).sum() / weights.sum(), rtol=1e-15)
