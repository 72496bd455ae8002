"""Pseudo-log-likelihoods against loops that hide one token at a time: over a table, and over a float64 BERT."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from maskformer import evaluation, masks, models
from maskformer.evaluation import create_pseudo_step, finish_pseudo
from tests.models.test_bert_parity import bert, bert_params

CLS, SEP, MASK, SIZE = 1, 2, 3, 9
# Words of one to three pieces. In the first row a segment without text; in the last no special tokens, and a segment
# that begins in the middle of a word, as a cut of a word longer than the row does.
TOKENS = np.array(
    [[1, 4, 5, 6, 2, 1, 7, 8, 2, 1, 2, 0], [1, 8, 4, 4, 5, 6, 6, 7, 2, 0, 0, 0], [4, 5, 6, 7, 8, 4, 5, 0, 0, 0, 0, 0]]
)
SEGMENTS = np.array(
    [[1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0]]
)
POSITIONS = np.array(
    [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0], [0, 1, 2, 3, 0, 1, 2, 0, 0, 0, 0, 0]]
)
WORDS = np.array(
    [[0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]],
    bool,
)
BATCH = {
    "tokens": TOKENS,
    "segment_ids": SEGMENTS,
    "positions": POSITIONS,
    "word_starts": WORDS,
    "example_id": np.arange(3),
    "epoch": np.zeros(3, int),
}


def by_context(table, corrupted):
    """Logits by the sum over the token's own segment of one random vector for each (token read, distance)."""
    tokens, ids = corrupted.input_tokens, corrupted.segment_ids
    distance = jnp.arange(tokens.shape[1])[None, :] - jnp.arange(tokens.shape[1])[:, None] + tokens.shape[1]
    same = (ids[:, :, None] == ids[:, None, :])[..., None]
    logits = jnp.sum(jnp.where(same, table[tokens[:, None, :], distance], 0.0), axis=2)
    if corrupted.predict_positions is not None:
        logits = jnp.take_along_axis(logits, corrupted.predict_positions[..., None], axis=1)
    return logits


@pytest.fixture(scope="module")
def table():
    return np.random.default_rng(0).normal(size=(SIZE, 2 * TOKENS.shape[1], SIZE)).astype(np.float32)


def brute_force(table, within_word, every):
    """(nats, scored, text): hides tokens one at a time, in rows that hold nothing but one segment."""
    table = table.astype(np.float64)
    nats, scored, text = 0.0, 0, 0
    for row, (tokens, ids, words) in enumerate(zip(TOKENS, SEGMENTS, WORDS)):
        place = 0
        for number in range(1, ids.max() + 1):
            segment, starts = tokens[ids == number], words[ids == number]
            for i, token in enumerate(segment):
                if token in (CLS, SEP):
                    continue
                text, place = text + 1, place + 1
                if (place - 1) % every != row % every:
                    continue
                shown = segment.copy()
                shown[i] = MASK
                later = i + 1
                while within_word and later < len(segment) and not starts[later] and segment[later] not in (CLS, SEP):
                    shown[later] = MASK
                    later += 1
                logits = sum(table[t, j - i + TOKENS.shape[1]] for j, t in enumerate(shown))
                nats, scored = nats - (logits[token] - special.logsumexp(logits)), scored + 1
    return nats, scored, text


def run(table, **options):
    step = create_pseudo_step(
        by_context, mask_token=MASK, vocabulary_size=SIZE, segments=3, visible=(0, CLS, SEP), **options
    )
    return {name: np.asarray(pair, np.float64) for name, pair in jax.jit(step)(table, BATCH).items()}


@pytest.mark.parametrize("within_word", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_packed_rows_score_every_token_as_if_its_segment_were_alone(table, within_word, every):
    nats, scored, text = brute_force(table, within_word, every)
    found = finish_pseudo(run(table, within_word_l2r=within_word, every=every))
    assert (found["scored"], found["tokens"]) == (scored, text)
    assert found["pseudo_nll"] == pytest.approx(nats / scored, rel=1e-5)
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(nats / scored), rel=1e-5)


def test_bits_per_byte_count_the_scored_tokens_only(table):
    sizes = np.broadcast_to(np.arange(SIZE) * (np.arange(SIZE) > 3), (2, SIZE))
    sums = run(table, every=3, token_bytes=sizes)
    found = finish_pseudo(sums, evaluation.SplitBytes(sizes, text=300, decoded=100))
    place = np.cumsum(TOKENS > 3, axis=1) - 1
    scored = (TOKENS > 3) & (place % 3 == np.arange(3)[:, None])
    assert found["bytes"] == 3 * TOKENS[scored].sum()
    assert found["pseudo_bits_per_byte"] == pytest.approx(sums["nats"][0] / math.log(2) / found["bytes"])


def numpy_bert(golden, tokens, valid, types):
    """Logits [batch, length, vocabulary] of the golden file's BERT in float64, from its own weights."""
    weight = {name.removeprefix("weight/"): v.astype(np.float64) for name, v in golden.items() if "weight/" in name}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * weight[f"{name}.weight"] + weight[f"{name}.bias"]

    def dense(x, name):
        return x @ weight[f"{name}.weight"].T + weight[f"{name}.bias"]

    def gelu(x):
        return x * special.ndtr(x)

    def heads(x):
        return x.reshape(*x.shape[:2], 4, -1).swapaxes(1, 2)

    x = sum(
        weight[f"bert.embeddings.{name}_embeddings.weight"][ids]
        for name, ids in (("word", tokens), ("token_type", types), ("position", np.arange(tokens.shape[1])))
    )
    x = norm(x, "bert.embeddings.LayerNorm")
    for i in range(3):
        layer = f"bert.encoder.layer.{i}"
        q, k, v = (heads(dense(x, f"{layer}.attention.self.{name}")) for name in ("query", "key", "value"))
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]) + np.where(valid, 0.0, -1e30)[:, None, None, :]
        mixed = (special.softmax(scores, axis=-1) @ v).swapaxes(1, 2).reshape(x.shape)
        x = norm(x + dense(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        up = gelu(dense(x, f"{layer}.intermediate.dense"))
        x = norm(x + dense(up, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    head = "cls.predictions"
    x = norm(gelu(dense(x, f"{head}.transform.dense")), f"{head}.transform.LayerNorm")
    return x @ weight["bert.embeddings.word_embeddings.weight"].T + weight[f"{head}.bias"]


@pytest.fixture(scope="module")
def golden():
    path = pathlib.Path(__file__).parents[1] / "golden" / "bert_tiny.npz"
    with np.load(path) as file:
        return dict(file)


def test_the_pseudo_likelihood_of_hugging_face_bert_is_that_of_a_float64_loop(golden):
    tokens, valid, types = (golden[f"input/{name}"] for name in ("tokens", "valid", "token_types"))
    mask_token = 66
    np.testing.assert_allclose(numpy_bert(golden, tokens, valid, types), golden["float64/logits"], atol=1e-9)

    nats, float32_error = 0.0, np.abs(golden["float32/logits"] - golden["float64/logits"]).max()
    for row, place in zip(*np.nonzero(valid)):
        shown = tokens[row : row + 1].copy()
        shown[0, place] = mask_token
        logits = numpy_bert(golden, shown, valid[row : row + 1], types[row : row + 1])[0, place]
        nats -= logits[tokens[row, place]] - special.logsumexp(logits)

    model, params = bert(), jax.tree.map(jnp.asarray, bert_params(golden))
    assert isinstance(model, models.Model)

    def predict(params, corrupted):
        return model.apply(
            params,
            corrupted.input_tokens,
            mask=masks.segments(corrupted.segment_ids),
            predict_positions=corrupted.predict_positions,
            token_types=jnp.asarray(types),
        )

    batch = {
        "tokens": tokens,
        "segment_ids": valid.astype(np.int32),
        "positions": np.where(valid, np.arange(14), 0),
        "word_starts": valid,
        "example_id": np.arange(3),
        "epoch": np.zeros(3, np.int32),
    }
    step = create_pseudo_step(predict, mask_token=mask_token, vocabulary_size=67, segments=1)
    sums = jax.jit(step)(params, batch)
    assert float(sums["nats"][1]) == valid.sum()
    # A log-probability moves by at most twice its logits' error, which may be ten times PyTorch's own in float32.
    assert abs(float(sums["nats"][0]) - nats) <= 2 * 10 * float32_error * valid.sum()
    assert abs(float(sums["nats"][0]) - nats) < 1e-4 * nats


@pytest.mark.parametrize("field, value", [("every", 0), ("every", 1.5), ("segments", 0), ("every", True)])
def test_a_step_that_scores_nothing_is_refused(table, field, value):
    with pytest.raises(ValueError, match=f"{field}={value}: expected an integer of at least 1"):
        create_pseudo_step(
            by_context,
            **{
                "mask_token": MASK,
                "vocabulary_size": SIZE,
                "segments": 3,
                field: value,
            },
        )


def test_nothing_scored_is_an_error():
    with pytest.raises(ValueError, match="scored no token"):
        finish_pseudo({"nats": np.zeros(2), "text": np.zeros(2)})
