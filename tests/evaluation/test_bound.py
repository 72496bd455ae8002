"""The diffusion bound against enumeration of all masks, in float64."""

import math

import jax
import numpy as np
import pytest
from scipy import integrate, stats

from maskformer.evaluation import create_bound_step, finish_bound
from maskformer.evaluation.bound import SMALLEST_TIME
from tests.evaluation import tables

LENGTH = 4
# With the marker, which is neither hidden nor counted; each a different number of text tokens.
ROWS = np.array([[0, 1, 2, 1], [3, 2, 2, 0], [3, 1, 0, 3]])
COPIES = 512


def run_step(seed, predict=tables.predict, **options):
    step = create_bound_step(
        predict, mask_token=tables.MASK, vocabulary_size=tables.SIZE, seed=seed, visible=(tables.MARKER,), **options
    )
    return jax.jit(step)


def estimate(step, table, rows):
    sums = step(table, tables.batch_of(rows))
    return finish_bound({name: np.asarray(pair, np.float64) for name, pair in sums.items()})


@pytest.fixture(scope="module")
def table():
    return tables.random_table(0, LENGTH)


def exact_time_bound(table, row):
    """The integral over t from SMALLEST_TIME on, by quadrature of the enumerated sums."""
    sums = tables.sums_by_count(table, row)
    size = len(sums)

    def integrand(t):
        return sum(s * t ** (count - 1) * (1 - t) ** (size - count) for count, s in enumerate(sums, start=1))

    return integrate.quad(integrand, SMALLEST_TIME, 1.0)[0] / (1.0 - SMALLEST_TIME)


@pytest.mark.parametrize("estimator, exact", [("count", tables.any_order_bound), ("time", exact_time_bound)])
@pytest.mark.parametrize("samples", [2, 8])
def test_estimates_are_unbiased_and_their_standard_error_is_true(table, estimator, exact, samples):
    """Over 200 seeds: their mean within 4 of its standard errors, their variance in its chi-square interval (1e-4)."""
    rows = np.repeat(ROWS, COPIES, axis=0)
    counted = np.sum(rows != tables.MARKER)
    expected = COPIES * sum(exact(table, row) for row in ROWS) / counted
    batch = tables.batch_of(rows)
    step = run_step(0, samples=samples, estimator=estimator)
    estimates, errors = [], []
    for repetition in range(200):
        # Other example ids are other masks: one compiled step gives all the repetitions.
        batch["example_id"] = np.arange(len(rows), dtype=np.int32) + repetition * len(rows)
        sums = {name: np.asarray(pair, np.float64) for name, pair in step(table, batch).items()}
        result = finish_bound(sums)
        assert result["tokens"] == counted
        estimates.append(result["nll_bound"])
        errors.append(result["nll_bound_stderr"])
    assert abs(np.mean(estimates) - expected) < 4 * np.std(estimates, ddof=1) / math.sqrt(200)
    low, high = stats.chi2.ppf([5e-5, 1 - 5e-5], 199) / 199
    assert low < np.var(estimates, ddof=1) / np.mean(np.square(errors)) < high
    if estimator == "count":  # 1 / t has heavy tails, which ties the error to the estimate
        assert stats.kstest((np.array(estimates) - expected) / errors, "norm").pvalue > 1e-3


def test_the_bound_is_above_the_likelihood_of_every_order(table):
    """It is the mean over orders of -log p(row in that order), hence at least -log of their mean p."""
    import itertools

    row = ROWS[0]
    nlls = []
    for order in itertools.permutations(range(LENGTH)):
        nlls.append(sum(tables.losses(table, row, order[i:])[order[i]] for i in range(LENGTH)))
    assert tables.any_order_bound(table, row) == pytest.approx(np.mean(nlls), rel=1e-12)
    assert np.mean(nlls) > -math.log(np.mean(np.exp(-np.array(nlls))))
    result = estimate(run_step(3, samples=32), table, np.repeat(row[None], 2048, axis=0))
    assert abs(result["nll_bound"] - np.mean(nlls) / LENGTH) < 4 * result["nll_bound_stderr"]


def test_independent_tokens_under_their_true_marginals_have_the_entropy_as_bound():
    marginals = np.array([0.5, 0.25, 0.25])
    logits = np.full(tables.SIZE, -1e9, np.float32)
    logits[:3] = np.log(marginals)
    rows = np.array([[0, 0, 1, 2, 0, 0, 1, 2]] * 256)  # every row has exactly the marginals
    result = estimate(
        run_step(1, predict=lambda params, corrupted: params + np.zeros((*corrupted.input_tokens.shape, 1))),
        logits,
        rows,
    )
    entropy = -np.sum(marginals * np.log(marginals))
    assert 0 < result["nll_bound_stderr"] < 0.01
    assert abs(result["nll_bound"] - entropy) < 4 * result["nll_bound_stderr"]


def test_a_model_that_knows_nothing_has_the_log_of_the_text_vocabulary_without_any_error():
    """Counting hidden tokens leaves no noise where every token costs the same; drawing a probability does."""
    blank = np.zeros((tables.SIZE**LENGTH, LENGTH, tables.SIZE))
    rows = np.repeat(ROWS, 64, axis=0)
    counted = estimate(run_step(0, estimator="count"), blank, rows)
    assert counted["nll_bound"] == pytest.approx(math.log(4), rel=1e-6)  # four answers: the mask is none
    assert counted["nll_bound_stderr"] < 1e-6
    assert estimate(run_step(0, estimator="time"), blank, rows)["nll_bound_stderr"] > 1e-3


def test_a_half_of_strata_hides_every_number_of_tokens_once():
    """With as many strata as tokens each count comes once, so a loss that depends on the count alone has no error."""
    length = 8

    def by_count(params, corrupted):
        hidden = (corrupted.input_tokens == tables.MASK).sum(axis=1)[:, None, None]
        return (hidden * 0.5) * (np.arange(tables.SIZE) == 0) + np.zeros((*corrupted.input_tokens.shape, 1))

    rows = np.zeros((32, length), int)
    result = estimate(run_step(0, predict=by_count, samples=2 * length), None, rows)
    expected = np.mean([math.log(np.exp(0.5 * k) + 3) - 0.5 * k for k in range(1, length + 1)])
    assert result["nll_bound"] == pytest.approx(expected, rel=1e-5)
    assert result["nll_bound_stderr"] < 1e-5
    assert estimate(run_step(0, predict=by_count, samples=2), None, rows)["nll_bound_stderr"] > 1e-2


def test_padding_is_neither_hidden_nor_counted(table):
    batch = tables.batch_of(np.repeat(ROWS[:1], 4, axis=0))
    batch["segment_ids"] = batch["segment_ids"].at[:, 2:].set(0).at[3].set(0)
    seen = []

    def spy(params, corrupted):
        jax.debug.callback(lambda tokens: seen.append(np.asarray(tokens)), corrupted.input_tokens)
        return tables.predict(params, corrupted)

    sums = run_step(0, predict=spy)(table, batch)
    jax.effects_barrier()
    assert float(sums["nats"][1]) == 3 * 2
    assert len(seen) == 8 and all((tokens[:, 2:] != tables.MASK).all() for tokens in seen)
    assert all((tokens[3] != tables.MASK).all() and (tokens[:3] == tables.MASK).any(axis=1).all() for tokens in seen)
    assert np.isfinite(float(sums["nats"][0]))


@pytest.mark.parametrize("samples", [1, 3, 0, True])
def test_a_number_of_samples_without_two_halves_is_refused(samples):
    with pytest.raises(ValueError, match=f"samples={samples}: expected an even number"):
        run_step(0, samples=samples)


def test_an_unknown_estimator_is_refused_and_nothing_counted_is_an_error():
    with pytest.raises(ValueError, match="estimator='elbo': expected one of count, time"):
        run_step(0, estimator="elbo")
    with pytest.raises(ValueError, match="counted no token"):
        finish_bound({"nats": np.zeros(2), "variance": np.zeros(2)})
