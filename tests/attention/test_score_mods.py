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
    with pytest.raises(TypeError, match="one scalar"):
        mf.dot_product_attention(x, x, x, score_mod=lambda score, b, h, q, k: jnp.stack([score, score]))


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
