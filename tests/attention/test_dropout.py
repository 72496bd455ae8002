"""The counter-based keep-mask: its rate, its independence, and that it is a function of places only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maskformer.attention import dropout

ROWS, COLUMNS, RATE = 512, 2048, 0.1


@pytest.fixture(scope="module")
def kept():
    return np.asarray(dropout.keep_mask(jax.random.key(0), (ROWS, COLUMNS), RATE))


def standard_errors(share, count, expected=1 - RATE):
    return (share - expected) / np.sqrt(expected * (1 - expected) / count)


def test_an_integer_is_one_key_however_it_is_held():
    words = [dropout.seed_words(key) for key in (3, np.int64(3), jnp.int32(3), jax.random.key(3))]
    assert len({tuple(np.asarray(pair).tolist()) for pair in words}) == 1


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_met_within_four_standard_errors(rate):
    share = np.asarray(dropout.keep_mask(jax.random.key(1), (ROWS, COLUMNS), rate)).mean()
    assert abs(standard_errors(share, ROWS * COLUMNS, 1 - rate)) < 4


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_and_columns_keep_as_many_as_coin_tosses_would(kept, axis):
    scores = standard_errors(kept.mean(axis), kept.shape[axis])
    assert np.abs(scores).max() < 5
    assert 0.8 < scores.std() < 1.2  # neither patterned nor too even


@pytest.mark.parametrize("lag", [(0, 1), (1, 0), (1, 1), (0, 2), (0, 64), (16, 0), (0, 1024), (256, 0)])
def test_neighbours_are_uncorrelated(kept, lag):
    centred = kept - (1 - RATE)
    rows, columns = lag
    product = centred[: ROWS - rows, : COLUMNS - columns] * centred[rows:, columns:]
    assert abs(product.mean()) / (RATE * (1 - RATE) / np.sqrt(product.size)) < 5


def test_consecutive_keys_give_unrelated_masks(kept):
    for key in (jax.random.key(1), 2, 2**31, 2**32, jax.random.key(0, impl="rbg")):
        other = np.asarray(dropout.keep_mask(key, (ROWS, COLUMNS), RATE))
        agreement = (other == kept).mean()
        expected = (1 - RATE) ** 2 + RATE**2
        assert abs(standard_errors(agreement, kept.size, expected)) < 5


def test_runs_of_four_have_the_frequencies_of_independent_bits():
    bits = np.asarray(dropout.keep_mask(3, (ROWS, COLUMNS), 0.5)).astype(int)
    words = (bits.reshape(ROWS, -1, 4) * [8, 4, 2, 1]).sum(-1)
    counts = np.bincount(words.ravel(), minlength=16)
    chi_square = ((counts - words.size / 16) ** 2 / (words.size / 16)).sum()
    assert chi_square < 40  # 15 degrees of freedom: p = 0.0005


def test_sharding_does_not_change_the_mask():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    place = NamedSharding(mesh, PartitionSpec("a", "b"))
    make = lambda: dropout.keep_mask(jax.random.key(0), (64, 32), 0.3)
    sharded = jax.jit(make, out_shardings=place)()
    np.testing.assert_array_equal(sharded, jax.jit(make)())


def test_typed_raw_and_integer_keys_are_accepted_and_a_batch_is_refused():
    typed = dropout.keep_mask(jax.random.key(7), (8, 8), 0.5)
    np.testing.assert_array_equal(typed, dropout.keep_mask(jax.random.PRNGKey(7), (8, 8), 0.5))
    np.testing.assert_array_equal(typed, dropout.keep_mask(7, (8, 8), 0.5))
    assert dropout.keep_mask(jax.random.key(7, impl="rbg"), (8, 8), 0.5).shape == (8, 8)
    with pytest.raises(ValueError, match="vmap"):
        dropout.keep_mask(jax.random.split(jax.random.key(0), 3), (8, 8), 0.5)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_a_rate_outside_the_range_is_refused(rate):
    with pytest.raises(ValueError, match="0 <= rate < 1"):
        dropout.keep_mask(0, (4,), rate)


def test_dropout_keeps_the_mean_and_scalars_have_a_mask_too():
    x = jnp.ones((256, 256))
    assert abs(float(dropout.dropout(0, x, 0.25).mean()) - 1) < 0.01
    assert dropout.dropout(None, x, 0.25) is x
    assert dropout.keep_mask(0, (), 0.5).shape == ()
