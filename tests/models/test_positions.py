"""Rotary and ALiBi positions against their formulas, written again in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskformer import attention, masks, models

POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3], [5, 4, 100, 7, 0, 0, 1]])


def test_rotary_turns_each_pair_of_channels_as_a_complex_number():
    head_dim, base = 8, 100.0
    x = np.random.default_rng(0).normal(size=(2, 7, 3, head_dim))
    pairs = x[..., : head_dim // 2] + 1j * x[..., head_dim // 2 :]
    frequencies = np.array([base ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    turned = pairs * np.exp(1j * POSITIONS[:, :, None, None] * frequencies)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    ours = models.apply_rotary(jnp.asarray(x, jnp.float32), models.rotary_tables(POSITIONS, head_dim, base))
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_rotary_scores_depend_on_relative_position_only():
    query, key = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(q, k):
        rotated_query = models.apply_rotary(query, models.rotary_tables(np.array([[q]]), 16))
        rotated_key = models.apply_rotary(key, models.rotary_tables(np.array([[k]]), 16))
        return float(jnp.sum(rotated_query * rotated_key))

    assert score(3, 10) == pytest.approx(score(13, 20), abs=1e-4)
    assert abs(score(3, 10) - score(3, 11)) > 1e-2


# The paper's own values: 8 heads are 1/2 ... 1/256; 12 heads add every other slope of 16 heads; 3 and 6 likewise.
SLOPES = {
    1: [-8],
    3: [-4, -8, -2],
    6: [-2, -4, -6, -8, -1, -3],
    8: [-1, -2, -3, -4, -5, -6, -7, -8],
    12: [-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5],
}


@pytest.mark.parametrize("heads", SLOPES)
def test_alibi_subtracts_slope_times_distance_of_the_given_positions(heads):
    random = np.random.default_rng(heads)
    query, key, value = random.normal(size=(3, 2, 7, heads, 4)).astype(np.float32)
    distance = np.abs(POSITIONS[:, :, None] - POSITIONS[:, None, :])
    slopes = 2.0 ** np.array(SLOPES[heads])
    scores = np.einsum("bqhd,bkhd->bhqk", query, key, dtype=np.float64) / 2 - slopes[:, None, None] * distance[:, None]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)
    ours = attention.dot_product_attention(
        query, key, value, score_mod=models.alibi(jnp.asarray(POSITIONS), heads), implementation="reference"
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def hidden(kind, tokens, **inputs):
    config = models.EncoderConfig(vocab_size=11, max_length=16, layers=2, width=16, heads=2, positions=kind)
    model = models.create(config)
    params = model.init(jax.random.key(0))
    # Larger weights than at initialisation, so that attention is far from uniform and positions show.
    params = jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 2 else leaf, params)
    return np.asarray(jax.jit(model.encode)(params, tokens, **inputs))


@pytest.mark.parametrize("kind", ["learned", "rotary", "alibi"])
def test_a_packed_segment_computes_what_it_computes_alone(kind):
    tokens = np.array([[3, 4, 5, 6, 7, 8, 9]])
    segments = np.array([[1, 1, 1, 2, 2, 2, 2]])
    packed = hidden(
        kind, tokens, positions=jnp.array([[0, 1, 2, 0, 1, 2, 3]]), mask=masks.segments(jnp.asarray(segments))
    )
    np.testing.assert_allclose(packed[:, :3], hidden(kind, tokens[:, :3]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 3:], hidden(kind, tokens[:, 3:]), atol=1e-5)


def test_without_positions_the_encoder_commutes_with_permutations_and_with_them_it_does_not():
    tokens, order = np.array([[3, 4, 5, 6, 7]]), np.array([4, 2, 0, 1, 3])
    difference = {
        kind: np.abs(hidden(kind, tokens)[:, order] - hidden(kind, tokens[:, order])).max()
        for kind in ("none", "learned", "rotary", "alibi")
    }
    assert difference["none"] < 1e-5
    assert all(difference[kind] > 1e-2 for kind in ("learned", "rotary", "alibi")), difference
