"""Exact likelihoods against sums over a table of conditional probabilities."""

import math

import jax
import numpy as np
import pytest

from maskformer import evaluation, objectives
from maskformer.evaluation import create_nll_step, finish_nll

SIZE = 7
VOCABULARY = objectives.Vocabulary(size=SIZE, pad=0, cls=1, sep=2, mask=3)
# Two segments and padding; a segment of one token predicts nothing.
TOKENS = np.array([[1, 4, 5, 2, 1, 6, 2, 0], [1, 6, 6, 4, 2, 5, 0, 0]])
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 2, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 0, 0]])
BYTES = np.array([[0, 0, 0, 0, 3, 5, 7], [0, 0, 0, 0, 4, 6, 8]])


def bigram(table, corrupted):
    """Logits by the last token read, so a wrong shift or a leak across segments shows."""
    return table[corrupted.input_tokens]


def result(shift, table, ignored=(), split=None):
    batch = {
        "tokens": TOKENS,
        "segment_ids": SEGMENTS,
        "positions": POSITIONS,
        "word_starts": TOKENS > 3,
        "example_id": np.arange(2),
        "epoch": np.zeros(2, int),
    }
    objective = objectives.create("causal_lm", VOCABULARY, TOKENS.shape[1], shift=shift)
    step = create_nll_step(bigram, objective, ignored=ignored, token_bytes=BYTES if split else None)
    sums = jax.jit(step)(table, batch)
    return finish_nll({name: np.asarray(pair, np.float64) for name, pair in sums.items()}, split)


@pytest.fixture(scope="module")
def table():
    return np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32)


def expected(table, shift, ignored=()):
    """(nats, tokens, decoded bytes) by a loop over the text, float64."""
    logits = table.astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats, count, size = 0.0, 0, 0
    for tokens, ids in zip(TOKENS, SEGMENTS):
        for number in range(1, ids.max() + 1):
            segment = tokens[ids == number]
            first_text = True
            for i, token in enumerate(segment):
                own = BYTES[0 if first_text else 1][token]
                first_text = first_text and own == 0
                before = segment[i - 1] if i else (VOCABULARY.cls if shift == "right" else None)
                if before is None or token in ignored:
                    continue
                nats, count, size = nats - log_probs[before, token], count + 1, size + own
    return nats, count, size


@pytest.mark.parametrize("shift", ["next", "right"])
@pytest.mark.parametrize("ignored", [(), (2,)])
def test_every_predicted_token_and_its_bytes_count_once_and_the_first_only_where_it_is_predicted(table, shift, ignored):
    nats, count, size = expected(table, shift, ignored)
    # Twice as many bytes of text as the tokens decode to.
    found = result(shift, table, ignored, evaluation.SplitBytes(BYTES, text=200, decoded=100))
    assert found["tokens"] == count
    assert found["bytes"] == 2 * size
    assert found["nll"] == pytest.approx(nats / count, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / (2 * size), rel=1e-6)


def test_a_model_that_knows_nothing_needs_the_log_of_the_vocabulary_for_each_token():
    found = result("next", np.zeros((SIZE, SIZE), np.float32))
    assert found["nll"] == pytest.approx(math.log(SIZE)) and "bits_per_byte" not in found


def test_another_objective_and_an_empty_split_are_errors():
    with pytest.raises(TypeError, match="expected the objective 'causal_lm', got 'mlm'"):
        create_nll_step(bigram, objectives.create("mlm", VOCABULARY, 8))
    with pytest.raises(ValueError, match="counted no token"):
        finish_nll({"nats": np.zeros(2)})


def test_what_predicted_the_next_token_can_be_run_as_a_causal_model():
    vocabulary = objectives.Vocabulary(size=20, pad=0, cls=1, sep=2, mask=3, special=(4, 5, 6))

    def made(name, **options):
        return objectives.create(name, vocabulary, 8, **options)

    causal = made("causal_lm", shift="right")
    assert causal.as_causal() is causal
    for name in ("prefix_lm", "fim"):
        assert made(name).as_causal().shift == "next" and made(name).as_causal().name == "causal_lm"
    mixed = objectives.mixture([made("mlm"), made("prefix_lm")])
    assert mixed.as_causal().name == "causal_lm" and mixed.predicts_next
    for none in (made("mlm"), made("diffusion"), objectives.mixture([made("mlm"), made("diffusion")])):
        assert none.as_causal() is None and not none.predicts_next
