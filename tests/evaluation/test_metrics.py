"""Metric sums against plain numpy in float64."""

import jax
import numpy as np
import pytest
from scipy import special

from maskformer import objectives
from maskformer.evaluation import finish, objective_sums, prediction_sums, unigram_log_probs


def example(seed=0, batch=3, slots=5, vocabulary=11):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(batch, slots, vocabulary)).astype(np.float32)
    targets = generator.integers(0, vocabulary, (batch, slots))
    weights = (generator.random((batch, slots)) < 0.6).astype(np.float32)
    kinds = generator.integers(0, 3, (batch, slots))
    return logits, targets, weights, kinds


def test_means_equal_numpy_over_the_used_slots_and_by_kind():
    logits, targets, weights, kinds = example()
    result = finish(prediction_sums(logits, targets, weights, kinds))
    log_probs = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    order = np.argsort(-logits, -1)
    used = weights > 0
    np.testing.assert_allclose(result["loss"], loss[used].mean(), rtol=1e-5)
    np.testing.assert_allclose(result["perplexity"], np.exp(loss[used].mean()), rtol=1e-5)
    np.testing.assert_allclose(result["accuracy"], (order[..., 0] == targets)[used].mean(), rtol=1e-6)
    np.testing.assert_allclose(
        result["accuracy_top5"], (order[..., :5] == targets[..., None]).any(-1)[used].mean(), rtol=1e-6
    )
    random = used & (kinds == 1)
    np.testing.assert_allclose(result["loss_random"], loss[random].mean(), rtol=1e-5)
    assert result["predicted"] == used.sum()


def test_merging_two_batches_equals_one_batch_of_both():
    logits, targets, weights, kinds = example(batch=4)
    whole = prediction_sums(logits, targets, weights, kinds)
    parts = [prediction_sums(logits[s], targets[s], weights[s], kinds[s]) for s in (slice(0, 1), slice(1, 4))]
    merged = {name: np.asarray(parts[0][name]) + np.asarray(parts[1][name]) for name in whole}
    for name in whole:
        np.testing.assert_allclose(merged[name], whole[name], rtol=1e-5)


def test_an_unused_slot_with_nan_logits_does_not_reach_the_sums():
    logits, targets, weights, kinds = example()
    weights[0, 0] = 0.0
    logits[0, 0] = np.nan
    assert np.isfinite(finish(prediction_sums(logits, targets, weights, kinds))["loss"])


def test_a_kind_that_never_occurs_is_left_out_rather_than_divided_by_zero():
    logits, targets, weights, kinds = example()
    result = finish(prediction_sums(logits, targets, weights, np.zeros_like(kinds)))
    assert "loss_mask" in result and "loss_random" not in result


def test_nothing_predicted_is_an_error_that_says_so():
    logits, targets, weights, kinds = example()
    with pytest.raises(ValueError, match="predicted no token"):
        finish(prediction_sums(logits, targets, np.zeros_like(weights), kinds))


def test_the_unigram_baseline_always_guesses_the_most_frequent_text_token():
    logits, targets, weights, _ = example()
    counts = np.arange(11)
    counts[0] = 1000
    baseline = unigram_log_probs(counts, special_ids=(0,))
    result = finish(prediction_sums(logits, targets, weights, unigram=baseline))
    used = weights > 0
    np.testing.assert_allclose(result["unigram_accuracy"], (targets == 10)[used].mean(), rtol=1e-6)
    np.testing.assert_allclose(result["unigram_loss"], -baseline[targets][used].mean(), rtol=1e-5)


def corrupted_by(name, key=0, **params):
    """An objective, what it makes of two rows, and float32 logits for it."""
    vocabulary = objectives.Vocabulary(size=11, pad=0, cls=1, sep=2, mask=3)
    objective = objectives.create(name, vocabulary, 8, **params)
    generator = np.random.default_rng(5)
    batch = {
        "tokens": generator.integers(4, 11, (2, 8)),
        "segment_ids": np.array([[1] * 8, [1] * 5 + [0] * 3]),
        "positions": np.tile(np.arange(8), (2, 1)),
        "word_starts": np.ones((2, 8), bool),
        "example_id": np.arange(2),
        "epoch": np.zeros(2, int),
    }
    corrupted = objective(jax.random.key(key), batch)
    return objective, corrupted, generator.normal(size=(*corrupted.target_tokens.shape, 11)).astype(np.float32)


def test_diffusion_is_evaluated_by_its_own_loss_and_has_no_perplexity():
    objective, corrupted, logits = corrupted_by("diffusion", key=1)
    unigram = np.log(np.full(11, 1 / 11, np.float32))
    found = finish(objective_sums(objective, logits, corrupted, unigram=unigram))
    weights = np.asarray(corrupted.loss_weights, np.float64)
    used = weights > 0
    assert 0 < used.sum() < 13 and weights.max() > 1
    exact = logits.astype(np.float64)
    exact[..., 3] = -np.inf  # the mask token is no answer
    own = (
        special.logsumexp(exact, axis=-1)
        - np.take_along_axis(exact, np.asarray(corrupted.target_tokens)[..., None], -1)[..., 0]
    )
    assert found["loss"] == pytest.approx((own * weights).sum() / 13, rel=1e-5)  # 13 tokens, hidden or not
    assert found["token_loss"] == pytest.approx(own[used].mean(), rel=1e-5)
    assert found["unigram_loss"] == pytest.approx(np.log(11) * weights.sum() / 13, rel=1e-5)
    assert found["predicted"] == used.sum() and not {"perplexity", "loss_mask"} & found.keys()


def test_accuracies_are_of_the_logits_that_the_loss_is_of():
    """[MASK] is no answer under diffusion, however large its logit: it takes no place among the first five either."""
    objective, corrupted, logits = corrupted_by("diffusion", key=1)
    logits[..., 3] = 100.0
    targets, weights = np.asarray(corrupted.target_tokens), np.asarray(corrupted.loss_weights)
    allowed = np.where(np.arange(11) == 3, -np.inf, logits)
    rank = (allowed > np.take_along_axis(allowed, targets[..., None], -1)).sum(-1)
    found = finish(objective_sums(objective, logits, corrupted))
    assert 0 < found["accuracy_top5"] == pytest.approx(((rank < 5) * weights).sum() / weights.sum(), rel=1e-5)
    assert found["accuracy"] == pytest.approx(((rank < 1) * weights).sum() / weights.sum(), rel=1e-5)


@pytest.mark.parametrize("name", ["mlm", "causal_lm", "prefix_lm"])
def test_an_objective_whose_loss_is_the_mean_over_its_predictions_has_a_perplexity(name):
    objective, corrupted, logits = corrupted_by(name)
    found = finish(objective_sums(objective, logits, corrupted))
    loss, weight = objective.loss(logits, corrupted)
    assert found["loss"] == pytest.approx(float(loss / weight), rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(float(loss / weight)), rel=1e-6)
    assert "token_loss" not in found and found["predicted"] == (corrupted.loss_weights > 0).sum()
