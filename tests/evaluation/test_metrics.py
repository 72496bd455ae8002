"""Metric sums against plain numpy in float64."""

import numpy as np
import pytest

from maskformer.evaluation import finish, prediction_sums, unigram_log_probs


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
