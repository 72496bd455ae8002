"""The BERT and RoBERTa conventions against their published rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from maskformer import objectives
from tests.objectives.examples import make_batch, make_vocabulary

VOCABULARY = make_vocabulary()


def corrupt(objective, batch, seed=7, **kwargs):
    return jax.tree.map(np.asarray, jax.jit(objective)(jax.random.key(seed), batch, **kwargs))


@pytest.mark.parametrize("rate", [0.1, 0.15, 0.5])
def test_bert_count_is_python_rounding_of_rate_times_length_for_every_length(rate):
    length = 50
    batch = make_batch(length - 2, length, lengths=np.arange(3, length + 1))
    objective = objectives.create("mlm", VOCABULARY, length, rate=rate)
    out = corrupt(objective, batch)
    size = batch["segment_ids"].sum(1)
    expected = [min(max(1, round(rate * int(n))), int(n) - 2) for n in size]
    assert out.loss_weights.sum(1).tolist() == expected


def test_bert_never_hides_a_marker_and_always_can_hide_every_other_token():
    batch = make_batch(400, 12, lengths=np.full(400, 10))
    out = corrupt(objectives.create("mlm", VOCABULARY, 12, rate=0.3), batch)
    hidden = out.selected.sum(0)
    assert hidden[[0, 9, 10, 11]].tolist() == [0, 0, 0, 0]
    assert (hidden[1:9] > 0).all()
    # 3 of 8 positions, without replacement, each equally likely.
    assert stats.chisquare(hidden[1:9]).pvalue > 1e-3


def test_inputs_differ_from_tokens_only_where_selected_and_targets_are_the_original():
    batch = make_batch(16, 40)
    out = corrupt(objectives.create("mlm", VOCABULARY, 40, rate=0.4), batch)
    assert (out.input_tokens == batch["tokens"])[~out.selected].all()
    used = out.loss_weights > 0
    rows = np.broadcast_to(np.arange(16)[:, None], used.shape)
    assert (out.target_tokens == batch["tokens"][rows, out.predict_positions])[used].all()
    assert out.selected[rows, out.predict_positions][used].all()
    assert used.sum() == out.selected.sum()


def test_replacement_shares_are_80_10_10_and_random_ids_are_uniform_over_the_whole_vocabulary():
    batch = make_batch(3000, 32)
    out = corrupt(objectives.create("mlm", VOCABULARY, 32, rate=0.5), batch)
    used = out.loss_weights > 0
    kinds = np.bincount(out.kinds[used], minlength=3)
    assert stats.chisquare(kinds, used.sum() * np.array([0.8, 0.1, 0.1])).pvalue > 1e-3
    rows = np.broadcast_to(np.arange(3000)[:, None], used.shape)
    stands = out.input_tokens[rows, out.predict_positions]
    assert (stands[used & (out.kinds == objectives.MASK)] == VOCABULARY.mask).all()
    kept = used & (out.kinds == objectives.KEEP)
    assert (stands[kept] == out.target_tokens[kept]).all()
    random = np.bincount(stands[used & (out.kinds == objectives.RANDOM)], minlength=VOCABULARY.size)
    assert stats.chisquare(random).pvalue > 1e-3


def test_roberta_count_is_the_floor_of_rate_times_size_plus_a_uniform():
    # 0.15 * 30 = 4.5: four or five, evenly; 0.15 * 20 = 3 exactly (in float64), always three.
    for size, expected in ((30, {4: 0.5, 5: 0.5}), (20, {3: 1.0})):
        batch = make_batch(2000, 32, lengths=np.full(2000, size))
        out = corrupt(objectives.create("mlm", VOCABULARY, 32, compat="roberta"), batch)
        counts = out.loss_weights.sum(1).astype(int)
        assert set(counts) == set(expected)
        observed = [np.sum(counts == n) for n in expected]
        assert len(observed) == 1 or stats.chisquare(observed, [2000 * p for p in expected.values()]).pvalue > 1e-3


def test_roberta_random_ids_are_never_special_and_otherwise_uniform():
    batch = make_batch(2000, 32)
    objective = objectives.create("mlm", VOCABULARY, 32, rate=0.5, compat="roberta", replacement=(0.0, 1.0, 0.0))
    out = corrupt(objective, batch)
    drawn = np.bincount(out.input_tokens[out.selected], minlength=VOCABULARY.size)
    special = list(VOCABULARY.special_ids)
    assert drawn[special].sum() == 0
    assert stats.chisquare(np.delete(drawn, special)).pvalue > 1e-3


def reference_words(batch, row, vocabulary=VOCABULARY):
    """Words as position lists, by a plain loop: a piece joins the word before it unless a marker stands between."""
    found, previous = [], False
    for position, token in enumerate(batch["tokens"][row]):
        member = bool(batch["segment_ids"][row, position]) and token not in vocabulary.special_ids
        if member:
            if batch["word_starts"][row, position] or not previous:
                found.append([])
            found[-1].append(position)
        previous = member
    return found


def test_whole_words_are_hidden_together_or_not_at_all():
    batch = make_batch(64, 40, words=0.5)
    for compat in ("bert", "roberta"):
        out = corrupt(objectives.create("mlm", VOCABULARY, 40, rate=0.3, compat=compat, whole_word=True), batch)
        for row in range(64):
            for word in reference_words(batch, row):
                assert len(set(out.selected[row, word])) == 1


@pytest.mark.parametrize("compat", ["hf", "roberta"])
def test_a_word_is_hidden_as_often_as_any_other_however_long_it_is(compat):
    # One word of 50 pieces, longer than most rows' share, among short ones: all of its pieces or none.
    rows, length = 3000, 64
    batch = make_batch(rows, length, words=1.0)
    batch["word_starts"][:, 8:57] = False
    objective = objectives.create("mlm", VOCABULARY, length, rate=0.15, compat=compat, whole_word=True)
    out = corrupt(objective, batch)
    long = out.selected[:, 7:57]
    assert (long.all(axis=1) == long.any(axis=1)).all()
    # roberta counts markers as words, and the same share of all words of a row.
    deviation = np.sqrt(0.15 * 0.85 / rows)
    assert abs(long[:, 0].mean() - 0.15) < 4 * deviation
    assert abs(out.selected[:, 57:63].mean() - 0.15) < 4 * deviation
    assert (out.loss_weights.sum(axis=1) == out.selected.sum(axis=1)).all(), "all that is hidden is predicted"


@pytest.mark.parametrize("compat", ["hf", "roberta"])
def test_fewer_slots_pass_over_whole_words_at_random_and_not_those_at_the_end(compat):
    batch = make_batch(2000, 64, words=0.5)
    objective = objectives.create(
        "mlm", VOCABULARY, 64, rate=0.5, compat=compat, whole_word=True, max_predictions=12
    )
    out = corrupt(objective, batch)
    assert objective.budget == 12 and out.selected.sum(axis=1).max() == 12
    for row in range(50):
        for word in reference_words(batch, row):
            assert len(set(out.selected[row, word])) == 1
    first, last = out.selected[:, 2:20].mean(), out.selected[:, 44:62].mean()
    assert abs(first - last) < 0.02


def test_whole_word_bert_passes_over_a_word_that_would_overshoot_and_goes_on():
    """Against the loop over a shuffled list, replayed with the same order for every row."""
    from maskformer.objectives.units import take_in_random_order, units_from_starts

    random = np.random.default_rng(0)
    take = jax.jit(take_in_random_order)
    for _ in range(60):
        member = random.random(24) < 0.9
        units = units_from_starts(jnp.asarray(member), jnp.asarray(random.random(24) < 0.4))
        draw = random.integers(0, 2**32, 24, dtype=np.uint32)
        room = int(random.integers(0, 14))
        taken = np.asarray(take(draw, units, room))
        start, size = np.asarray(units.start), np.asarray(units.size)
        expected, total = np.zeros(24, bool), 0
        for position in sorted(np.flatnonzero(start), key=lambda p: -int(draw[p] >> 2)):
            if total >= room:
                break
            if total + size[position] <= room:
                expected[position] = True
                total += size[position]
        assert taken.tolist() == expected.tolist()


def test_whole_word_roberta_decides_once_per_word():
    batch = make_batch(200, 40, words=0.4)
    objective = objectives.create("mlm", VOCABULARY, 40, rate=0.4, compat="roberta", whole_word=True,
                                  replacement=(0.5, 0.0, 0.5))
    out = corrupt(objective, batch)
    masked = out.input_tokens == VOCABULARY.mask
    seen = set()
    for row in range(200):
        for word in reference_words(batch, row):
            if out.selected[row, word[0]]:
                assert len(set(masked[row, word])) == 1
                seen.add(bool(masked[row, word[0]]))
    assert seen == {True, False}


def test_an_empty_row_is_left_alone():
    batch = make_batch(3, 16, lengths=[16, 0, 0])
    for kwargs in ({}, {"compat": "roberta", "whole_word": True}):
        out = corrupt(objectives.create("mlm", VOCABULARY, 16, **kwargs), batch)
        assert out.loss_weights[1:].sum() == 0
        assert (out.input_tokens[1:] == 0).all()
        assert not out.selected[1:].any()


def test_a_row_is_corrupted_the_same_in_any_batch_order_and_alone():
    batch = make_batch(8, 32)
    objective = objectives.create("mlm", VOCABULARY, 32, rate=0.3, whole_word=True)
    whole = corrupt(objective, batch)
    order = np.array([5, 1, 7])
    part = corrupt(objective, {name: value[order] for name, value in batch.items()})
    for name in ("input_tokens", "predict_positions", "target_tokens", "loss_weights", "kinds"):
        assert (getattr(whole, name)[order] == getattr(part, name)).all()


def test_masks_change_with_the_epoch_unless_copies_are_static():
    dynamic = objectives.create("mlm", VOCABULARY, 64)
    static = objectives.create("mlm", VOCABULARY, 64, static_copies=2)

    def hidden(objective, epoch):
        return corrupt(objective, make_batch(4, 64, epoch=epoch)).selected

    assert (hidden(dynamic, 0) != hidden(dynamic, 2)).any()
    assert (hidden(static, 0) == hidden(static, 2)).all()
    assert (hidden(static, 0) != hidden(static, 1)).any()


def test_any_kind_of_key_gives_reproducible_rows():
    batch = make_batch(4, 32)
    objective = objectives.create("mlm", VOCABULARY, 32)
    typed, raw = objective(jax.random.key(3), batch), objective(jax.random.PRNGKey(3), batch)
    assert (typed.input_tokens == raw.input_tokens).all()
    rbg = jax.random.key(3, impl="rbg")
    alone = objective(rbg, {name: value[2:3] for name, value in batch.items()})
    assert (objective(rbg, batch).input_tokens[2:3] == alone.input_tokens).all()
