"""Span corruption, UL2, BART's noise and masked sources: exact against loops, and in distribution."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from maskformer import objectives
from maskformer.objectives import randomness
from maskformer.objectives.denoising import STARTS, poisson_lengths
from maskformer.objectives.span_corruption import noise_counts, random_spans, span_corruption_lengths
from tests.objectives.examples import make_batch
from tests.objectives.test_mlm import corrupt, reference_words

VOCABULARY = objectives.Vocabulary(
    size=96, pad=0, unk=1, cls=2, sep=3, mask=4, bos=5, eos=6, sentinels=tuple(range(95, 79, -1)), special=(7, 8, 9)
)
SENTINELS = set(VOCABULARY.sentinels)


def batch_of(rows, length, lengths=None, **kwargs):
    return make_batch(rows, length, lengths=lengths, size=80, **kwargs)


def splice(inputs, targets):
    """The original row: every sentinel of the inputs replaced by what follows it in the targets."""
    spans, current = {}, None
    for token in targets:
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        elif current is not None:
            current.append(token)
    return [t for token in inputs for t in (spans[token] if token in SENTINELS else [token])]


def used(tokens, segments):
    return tokens[segments > 0].tolist()


# --- T5 ---------------------------------------------------------------------------------------------------------------


def test_t5_lengths_are_the_published_ones():
    assert span_corruption_lengths(512, 0.15, 3.0) == (568, 114)
    assert span_corruption_lengths(1024, 0.15, 3.0) == (1137, 229)


def test_t5_row_of_568_tokens_fills_512_inputs_and_114_targets():
    vocabulary = objectives.Vocabulary(size=32128, pad=0, eos=1, sentinels=tuple(range(32127, 32027, -1)))
    objective = objectives.create("t5", vocabulary, 568)
    assert (objective.input_length, objective.target_length) == (512, 114)
    out = corrupt(objective, make_batch(2, 568, size=1000, markers=False))
    assert (out.encoder_segment_ids == 1).all() and (out.decoder_segment_ids == 1).all()
    assert (out.encoder_input_tokens[:, -1] == 1).all() and (out.decoder_target_tokens[:, -1] == 1).all()
    assert (out.decoder_input_tokens[:, 0] == 0).all()      # pad is T5's start token
    assert (out.decoder_input_tokens[:, 1:] == out.decoder_target_tokens[:, :-1]).all()
    # 85 noise tokens in 28 spans, the sentinels descending from the last id.
    sentinels = out.decoder_target_tokens[0][out.decoder_target_tokens[0] > 32027]
    assert sentinels.tolist() == list(range(32127, 32127 - 28, -1))


def test_t5_at_length_20_always_hides_the_final_three_tokens():
    batch = batch_of(8, 20)
    out = corrupt(objectives.create("t5", VOCABULARY, 20), batch)
    assert (out.decoder_target_tokens[:, 1:4] == batch["tokens"][:, 17:]).all()
    assert (out.encoder_input_tokens[:, :17] == batch["tokens"][:, :17]).all()


def test_every_way_of_cutting_text_and_noise_is_equally_likely():
    # 10 tokens, 4 noise in 2 spans: 3 ways to cut the noise, 5 ways to cut the text.
    draw = jax.jit(jax.vmap(lambda key: random_spans(key, 10, 4, 2, 12, 3)))
    noise = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
    assert not noise[:, [0, 10, 11]].any() and noise[:, 9].all()
    expected = {}
    for a, b in itertools.product(range(1, 6), range(1, 4)):
        mask = [0] * a + [1] * b + [0] * (6 - a) + [1] * (4 - b) + [0, 0]
        expected[tuple(mask)] = 0
    for row in noise.astype(int):
        expected[tuple(row)] += 1
    assert stats.chisquare(list(expected.values())).pvalue > 1e-3


@pytest.mark.parametrize("variant", ["span", "iid"])
def test_the_row_is_recovered_from_inputs_and_targets_at_any_size(variant):
    lengths = np.arange(25)
    batch = batch_of(25, 24, lengths=lengths, markers=False)
    out = corrupt(objectives.create("span_corruption", VOCABULARY, 24, variant=variant, rate=0.3), batch)
    for row, size in enumerate(lengths):
        inputs = used(out.encoder_input_tokens[row], out.encoder_segment_ids[row])
        targets = used(out.decoder_target_tokens[row], out.decoder_segment_ids[row])
        if size == 0:
            assert inputs == targets == []
            continue
        assert inputs[-1] == VOCABULARY.eos and (not targets or targets[-1] == VOCABULARY.eos)
        assert splice(inputs[:-1], targets[:-1]) == batch["tokens"][row, :size].tolist()
        if variant == "span":
            noise, spans = noise_counts(int(size), 0.3, 3.0)
            assert sum(t not in SENTINELS for t in targets[:-1]) == noise
            assert sum(t in SENTINELS for t in targets) == spans


def test_rolling_frees_the_last_token_and_keeps_the_row_recoverable():
    batch = batch_of(200, 24, markers=False)
    out = corrupt(objectives.create("span_corruption", VOCABULARY, 24, roll=True), batch)
    last_hidden = 0
    for row in range(200):
        inputs = used(out.encoder_input_tokens[row], out.encoder_segment_ids[row])[:-1]
        targets = used(out.decoder_target_tokens[row], out.decoder_segment_ids[row])[:-1]
        assert splice(inputs, targets) == batch["tokens"][row].tolist()
        last_hidden += inputs[-1] in SENTINELS
    assert 5 < last_hidden < 100     # 4 of 24 positions are noise


def test_simple_variants_do_what_their_names_say():
    batch = batch_of(64, 20, markers=False)
    tokens = batch["tokens"]

    def run(variant):
        return corrupt(objectives.create("span_corruption", VOCABULARY, 20, variant=variant), batch)

    mass, bert, drop, shuffled = (run(v) for v in ("mass", "bert", "drop", "deshuffle"))
    for out in (mass, bert, shuffled):
        assert (out.decoder_target_tokens[:, :20] == tokens).all()
    changed = mass.encoder_input_tokens[:, :20] != tokens
    assert (mass.encoder_input_tokens[:, :20][changed] == VOCABULARY.mask).all()
    hidden = bert.encoder_input_tokens[:, :20][bert.encoder_input_tokens[:, :20] != tokens]
    assert 0.8 < (hidden == VOCABULARY.mask).mean() < 0.98
    assert (np.sort(shuffled.encoder_input_tokens[:, :20]) == np.sort(tokens)).all()
    assert (shuffled.encoder_input_tokens[:, :20] != tokens).any()
    assert (drop.encoder_input_tokens[:, :17] == tokens[:, :17]).all()
    assert (drop.decoder_target_tokens[:, :3] == tokens[:, 17:]).all()


def test_prefix_layout_puts_targets_behind_inputs_and_predicts_only_them():
    batch = batch_of(6, 20, lengths=[20, 14, 9, 3, 1, 0])
    pair = corrupt(objectives.create("span_corruption", VOCABULARY, 20), batch)
    objective = objectives.create("span_corruption", VOCABULARY, 20, layout="prefix")
    out = corrupt(objective, batch)
    assert out.input_tokens.shape == (6, objective.output_length)
    for row in range(6):
        inputs = used(pair.encoder_input_tokens[row], pair.encoder_segment_ids[row])
        targets = used(pair.decoder_target_tokens[row], pair.decoder_segment_ids[row])
        assert used(out.input_tokens[row], out.segment_ids[row]) == inputs + targets
        slots = out.loss_weights[row] > 0
        assert out.target_tokens[row][slots].tolist() == targets
        assert out.predict_positions[row][slots].tolist() == [len(inputs) - 1 + i for i in range(len(targets))]
        assert out.bidirectional[row].sum() == len(inputs)


def test_too_few_sentinels_are_an_error_that_counts_them():
    with pytest.raises(ValueError, match="needs 26 sentinels and vocabulary.sentinels has 16"):
        objectives.create("t5", VOCABULARY, 512)
    with pytest.raises(ValueError, match="mean=40: a span would be longer than the row of 16"):
        objectives.create("t5", VOCABULARY, 16, mean=40)
    with pytest.raises(ValueError, match="layout='decoder': expected one of"):
        objectives.create("t5", VOCABULARY, 16, layout="decoder")
    with pytest.raises(ValueError, match="variant='spam'"):
        objectives.create("t5", VOCABULARY, 16, variant="spam")


# --- UL2 --------------------------------------------------------------------------------------------------------------


def test_ul2_draws_each_denoiser_by_weight_and_tells_the_mode():
    denoisers = [("R", 3, 0.15), ("S", None, 0.25), ("X", 3, 0.5)]
    rows = 900
    objective = objectives.create(
        "ul2", VOCABULARY, 24, denoisers=denoisers, weights=[2, 1, 1], mode_tokens={"R": 7, "S": 8, "X": 9}
    )
    batch = batch_of(rows, 24, markers=False)
    out = corrupt(objective, batch)
    modes = np.bincount(out.input_tokens[:, 0], minlength=10)[7:]
    assert stats.chisquare(modes, [rows / 2, rows / 4, rows / 4]).pvalue > 1e-3
    for row in range(60):
        size = int(out.bidirectional[row].sum())
        inputs = out.input_tokens[row, 1 : size - 1].tolist()
        targets = used(out.input_tokens[row], out.segment_ids[row])[size:]
        assert splice(inputs, targets[:-1]) == batch["tokens"][row].tolist()
        if out.input_tokens[row, 0] == 8:      # the suffix: one span, at the end
            assert inputs[-1] in SENTINELS and len(targets) == 1 + 6 + 1
    with pytest.raises(ValueError, match="no id for mode 'S'"):
        objectives.create("ul2", VOCABULARY, 24, denoisers=denoisers, mode_tokens={"R": 7})
    with pytest.raises(ValueError, match="longer than the row of 24"):
        objectives.create("ul2", VOCABULARY, 24, denoisers=[("X", 64, 0.5)])


# --- BART -------------------------------------------------------------------------------------------------------------


def test_poisson_lengths_are_poisson():
    lengths = poisson_lengths(3.0)
    assert np.allclose(lengths, stats.poisson(3.0).pmf(np.arange(len(lengths))), atol=1e-6)


def test_infilling_lengths_fill_the_budget_exactly_and_start_poisson():
    infilling = objectives.create("denoising", VOCABULARY, 40).make_pair.infilling
    draw = jax.jit(jax.vmap(lambda key: infilling.draw_lengths(key, 9)))
    lengths, in_use = (np.asarray(x) for x in draw(jax.random.split(jax.random.key(0), 3000)))
    assert (lengths.sum(1) == 9).all()
    assert (lengths[~in_use] == 0).all()
    observed = np.bincount(np.minimum(lengths[:, 0], 8), minlength=9)
    expected = stats.poisson(3.0).pmf(np.arange(8)) * 3000
    assert stats.chisquare(observed, np.append(expected, 3000 - expected.sum())).pvalue > 1e-3


def fairseq_spans(tokens, words, starts, lengths, replace_length, mask):
    """fairseq's loop, each span walked word by word from its start; tokens of later spans may be swallowed."""
    tokens, keep = list(tokens), [True] * len(tokens)
    by_first = {word[0]: index for index, word in enumerate(words)}
    if replace_length == 0:
        for start in starts:
            keep[start] = False
    else:
        for start in starts:
            tokens[start] = mask
    for start, length in zip(starts, lengths):
        first = by_first[start]
        last = first
        while last + 1 < len(words) and last + 1 - first < length and words[last + 1][0] == words[last][-1] + 1:
            last += 1
        for position in [p for word in words[first : last + 1] for p in word][1:]:
            if replace_length == -1:
                tokens[position] = mask
            else:
                keep[position] = False
    return [t for t, k in zip(tokens, keep) if k]


@pytest.mark.parametrize("replace_length", [1, 0, -1])
def test_infilling_equals_fairseqs_loop_on_the_same_draws(replace_length):
    batch = batch_of(24, 32, words=0.7)
    batch["tokens"][:, 20] = VOCABULARY.sep
    batch["word_starts"][:, 20] = False
    objective = objectives.create("denoising", VOCABULARY, 32, replace_length=replace_length, random_rate=0.0)
    infilling = objective.make_pair.infilling
    out = corrupt(objective, batch)
    keys = randomness.row_keys(jax.random.key(7), jnp.asarray(batch["epoch"]), jnp.asarray(batch["example_id"]))
    for row in range(24):
        words = reference_words(batch, row, VOCABULARY)
        budget = math.ceil(0.3 * len(words))
        lengths, in_use = (np.asarray(x) for x in infilling.draw_lengths(keys[row], jnp.int32(budget)))
        spans = [int(x) for x in lengths if x > 0]
        insertions = int(np.sum(in_use & (lengths == 0)))
        bits = np.asarray(randomness.bits(keys[row], STARTS, (32,))) >> 2
        starts = sorted((word[0] for word in words), key=lambda p: -int(bits[p]))[: len(spans)]
        expected = fairseq_spans(batch["tokens"][row], words, starts, spans, replace_length, VOCABULARY.mask)
        result = used(out.encoder_input_tokens[row], out.encoder_segment_ids[row])
        assert len(result) == len(expected) + insertions
        if insertions == 0:
            assert result == expected
        else:
            left = list(result)
            for token in expected:
                assert token in left
                left.remove(token)
            assert left == [VOCABULARY.mask] * insertions
            assert result[0] == expected[0] and result[-1] == expected[-1]


def test_bart_targets_are_the_row_and_the_decoder_starts_with_eos():
    batch = batch_of(8, 24, lengths=np.arange(17, 25))
    out = corrupt(objectives.create("bart", VOCABULARY, 24, full_stops=(10,)), batch)
    for row in range(8):
        targets = used(out.decoder_target_tokens[row], out.decoder_segment_ids[row])
        assert targets == batch["tokens"][row, : 17 + row].tolist()
        assert out.decoder_input_tokens[row, : len(targets)].tolist() == [VOCABULARY.eos, *targets[:-1]]


def test_sentences_are_permuted_whole_between_the_end_markers():
    batch = batch_of(300, 14)
    batch["tokens"][:, 1:13] = [11, 12, 10, 21, 10, 31, 32, 33, 10, 41, 42, 43]
    objective = objectives.create("denoising", VOCABULARY, 14, rate=0.0, permute_sentences=1.0, full_stops=(10,))
    out = corrupt(objective, batch)
    sentences = {11: [11, 12, 10], 21: [21, 10], 31: [31, 32, 33, 10], 41: [41, 42, 43]}
    orders = {}
    for row in range(300):
        tokens = out.encoder_input_tokens[row].tolist()
        assert tokens[0] == VOCABULARY.cls and tokens[-1] == VOCABULARY.sep
        body, order = tokens[1:-1], []
        while body:
            sentence = sentences[body[0]]
            assert body[: len(sentence)] == sentence
            order.append(body[0])
            body = body[len(sentence) :]
        orders[tuple(order)] = orders.get(tuple(order), 0) + 1
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


def test_rotation_starts_the_row_at_a_uniformly_random_token():
    batch = batch_of(600, 10)
    out = corrupt(objectives.create("denoising", VOCABULARY, 10, rate=0.0, rotate=1.0), batch)
    offsets = np.zeros(8, int)
    for row in range(600):
        body, turned = batch["tokens"][row, 1:9].tolist(), out.encoder_input_tokens[row, 1:9].tolist()
        matches = [k for k in range(1, 9) if body[k % 8 :] + body[: k % 8] == turned]
        assert matches
        offsets[matches[0] - 1] += 1
    assert stats.chisquare(offsets).pvalue > 1e-4
    assert (out.encoder_input_tokens[:, [0, 9]] == batch["tokens"][:, [0, 9]]).all()


def test_deletion_shortens_and_repads():
    batch = batch_of(20, 24, words=1.1)
    deletion = {"rate": 0.25, "poisson_mean": None, "replace_length": 0}
    out = corrupt(objectives.create("denoising", VOCABULARY, 24, **deletion), batch)
    assert ((out.encoder_segment_ids > 0).sum(1) == 24 - math.ceil(0.25 * 22)).all()
    assert not (out.encoder_input_tokens == VOCABULARY.mask).any()


def test_denoising_errors():
    with pytest.raises(ValueError, match="full_stops is empty"):
        objectives.create("denoising", VOCABULARY, 16, permute_sentences=1.0)
    with pytest.raises(ValueError, match="replace_length=2"):
        objectives.create("denoising", VOCABULARY, 16, replace_length=2)


# --- labelled data ----------------------------------------------------------------------------------------------------


def test_masked_source_corrupts_the_source_and_scores_every_target_token():
    source = batch_of(4, 16)
    target = batch_of(4, 12, lengths=[12, 8, 5, 0], markers=False, seed=9)
    batch = {**source, **{f"target_{n}": target[n] for n in ("tokens", "segment_ids", "positions")}}
    out = corrupt(objectives.create("masked_source", VOCABULARY, 16, target_length=12, rate=0.3), batch)
    assert (out.encoder_input_tokens != source["tokens"]).any()
    assert (out.decoder_target_tokens == target["tokens"]).all()
    assert (out.decoder_loss_weights.sum(1) == [12, 8, 5, 0]).all()
    assert out.decoder_input_tokens[0, :3].tolist() == [VOCABULARY.bos, *target["tokens"][0, :2]]


def test_masking_as_augmentation_leaves_the_label():
    batch = {**batch_of(4, 16), "label": np.arange(4)}
    out = objectives.augment(objectives.create("mlm", VOCABULARY, 16, rate=0.3), jax.random.key(0), batch)
    assert (np.asarray(out["tokens"]) != batch["tokens"]).any()
    assert (out["label"] == batch["label"]).all() and set(out) == set(batch)
