"""Spans, n-grams, lexicons, weighted and Bernoulli selection, separate rates, schedules: against plain loops."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from maskformer import objectives
from maskformer.objectives import lexicon, schedules, select_spans, select_weighted
from tests.objectives.examples import make_batch, make_vocabulary
from tests.objectives.test_mlm import corrupt, reference_words

VOCABULARY = make_vocabulary()


def test_hf_chooses_each_token_independently_so_that_none_at_all_is_possible():
    # P(no mask | n = 10, p = .15) = .85 ** 10 = 0.197.
    rows = 4000
    batch = make_batch(rows, 12)
    out = corrupt(objectives.create("mlm", VOCABULARY, 12, compat="hf"), batch)
    chosen = out.selected[:, 1:11].sum(1)
    observed = np.bincount(chosen, minlength=6)
    observed = np.append(observed[:5], observed[5:].sum())
    expected = stats.binom(10, 0.15).pmf(np.arange(5))
    expected = np.append(expected, 1 - expected.sum()) * rows
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    assert abs(observed[0] / rows - 0.197) < 0.02
    assert not out.selected[:, [0, 11]].any()


def test_hf_budget_overflows_less_than_once_in_a_thousand_million_rows():
    from maskformer.objectives.counting import binomial_quantile

    for size, rate in ((128, 0.15), (512, 0.4), (10, 0.9)):
        k = binomial_quantile(size, rate)
        assert stats.binom(size, rate).sf(k) < 1e-9 <= stats.binom(size, rate).sf(k - 1)


def test_geometric_span_lengths_have_spanberts_mean():
    lengths = select_spans.geometric_lengths(0.2, 10)
    assert np.dot(np.arange(1, 11), lengths) == pytest.approx(3.797, abs=5e-4)
    assert sum(lengths) == pytest.approx(1.0)


def reference_spans(words, size, count, lengths, random):
    """SpanBERT's loop: an anchor among free positions, whole words from it, the last span cut at the budget."""
    word_of = {position: index for index, word in enumerate(words) for position in word}
    taken = set()
    while len(taken) < count and len(taken) < len(word_of):
        span = random.choice(np.arange(1, len(lengths) + 1), p=lengths)
        anchor = random.choice([p for p in word_of if p not in taken])
        first = word_of[anchor]
        last = first
        while last + 1 < len(words) and last + 1 - first < span and words[last + 1][0] == words[last][-1] + 1:
            last += 1
        for position in (p for word in words[first : last + 1] for p in word):
            if len(taken) < count:
                taken.add(position)
    return taken


def test_spans_follow_spanberts_loop_in_distribution():
    rows, length = 3000, 14
    batch = {name: np.repeat(value, rows, 0) for name, value in make_batch(1, length, words=0.6, seed=3).items()}
    batch["example_id"] = np.arange(rows, dtype=np.int32)
    out = corrupt(objectives.create("span_mlm", VOCABULARY, length, rate=0.4, longest=4), batch)
    random = np.random.default_rng(0)
    words = reference_words(batch, 0)
    lengths = select_spans.geometric_lengths(0.2, 4)
    expected = np.zeros((rows, length), bool)
    for row in range(rows):
        expected[row, list(reference_spans(words, length, 6, lengths, random))] = True
    assert (out.selected.sum(1) == 6).all()
    # The same distribution over whole masks, compared on all masks that are frequent enough.
    code = 1 << np.arange(length)
    ours, theirs = (np.bincount(m @ code, minlength=2**length) for m in (out.selected, expected))
    common = (ours + theirs) >= 20
    table = np.array([np.append(x[common], x[~common].sum()) for x in (ours, theirs)])
    assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


def test_touching_spans_share_one_replacement_decision():
    batch = make_batch(300, 40)
    out = corrupt(objectives.create("span_mlm", VOCABULARY, 40, rate=0.4, replacement=(0.5, 0.0, 0.5)), batch)
    masked = out.input_tokens == VOCABULARY.mask
    both = out.selected[:, 1:] & out.selected[:, :-1]
    assert (masked[:, 1:] == masked[:, :-1])[both].all()
    assert 0.3 < masked[out.selected].mean() < 0.7


def test_spans_stop_at_markers_and_at_segment_ends():
    batch = make_batch(200, 24)
    batch["segment_ids"][:, 12:] = 2
    batch["tokens"][:, 6] = VOCABULARY.sep
    out = corrupt(objectives.create("span_mlm", VOCABULARY, 24, rate=0.5, longest=10), batch)
    assert not out.selected[:, [0, 6, 23]].any()
    crossing = out.selected[:, 11] & out.selected[:, 12]
    assert crossing.any()
    assert (out.units[:, 11] != out.units[:, 12])[crossing].all()


def test_lexicon_units_are_the_longest_entries_from_the_left():
    random = np.random.default_rng(0)
    entries = {tuple(random.integers(0, 4, n)) for n in (2, 2, 2, 3, 3, 4) for _ in range(2)}
    starts = jax.jit(objectives.Lexicon(entries).starts)
    for _ in range(40):
        tokens = random.integers(0, 4, 16).astype(np.int32)
        member = random.random(16) < 0.9
        unit = np.full(16, -1)
        for n in sorted({len(e) for e in entries}, reverse=True):
            for i in range(16 - n + 1):
                inside = slice(i, i + n)
                if tuple(tokens[inside]) in entries and member[inside].all() and (unit[inside] < 0).all():
                    unit[inside] = i
        expected = [bool(member[i]) and unit[i] in (-1, i) for i in range(16)]
        assert np.asarray(starts(tokens, member)).tolist() == expected


def test_pmi_prefers_what_no_part_explains(tmp_path):
    """`1 2` always come together; `3 4 5` too; `6 7` are frequent but independent."""
    random = np.random.default_rng(0)
    texts = []
    for _ in range(400):
        text = random.integers(6, 12, 6).tolist()
        at = int(random.integers(0, 5))
        texts.append(text[:at] + ([1, 2] if random.random() < 0.5 else [3, 4, 5]) + text[at:])
    found = lexicon.pmi_ngrams(texts, longest=3, count=5)
    assert {(1, 2), (3, 4, 5)} <= set(found[:4])
    assert (6, 7) not in found
    # The measure by hand, over every cut of one entry.
    counts = {ngram: sum(tuple(t[i : i + len(ngram)]) == ngram for t in texts for i in range(len(t)))
              for ngram in [(3,), (4,), (5,), (3, 4), (4, 5), (3, 4, 5)]}
    total = [None, *(sum(max(len(t) - n + 1, 0) for t in texts) for n in (1, 2, 3))]
    log_p = {ngram: np.log(number / total[len(ngram)]) for ngram, number in counts.items()}
    cuts = [[(3,), (4,), (5,)], [(3, 4), (5,)], [(3,), (4, 5)]]
    by_hand = min(log_p[(3, 4, 5)] - sum(log_p[part] for part in cut) for cut in cuts)
    assert by_hand > 0
    path = tmp_path / "ngrams.txt"
    path.write_text("\n".join(" ".join(map(str, ngram)) for ngram in found))
    assert objectives.Lexicon.read(str(path)).longest == max(map(len, found))


def test_pmi_hides_a_collocation_whole_or_not_at_all():
    batch = make_batch(200, 30)
    batch["tokens"][:, 10:13] = [11, 12, 13]
    out = corrupt(objectives.create("pmi_mlm", VOCABULARY, 30, rate=0.3, ngrams=[(11, 12), (11, 12, 13)]), batch)
    together = out.selected[:, 10:13].sum(1)
    assert set(together) == {0, 3}
    assert (out.selected.sum(1) <= 9).all() and (out.selected.sum(1) >= 8).mean() > 0.9


def test_weighted_tokens_are_chosen_in_proportion_to_their_weight_and_at_the_target_rate():
    rows, length = 6000, 10
    tokens = np.array([2, 10, 11, 12, 13, 10, 11, 12, 13, 3], np.int32)
    batch = make_batch(rows, length)
    batch["tokens"][:] = tokens
    table = np.zeros(VOCABULARY.size)
    table[[10, 11, 12, 13]] = [1, 2, 3, 0]
    out = corrupt(objectives.create("conditional_mlm", VOCABULARY, length, table=table, rate=0.3), batch)
    # 3 expected of 10 over weights (1 2 3 0 1 2 3 0): c = 3 / 12.
    probability = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 0]) * 3 / 12
    for position in range(length):
        p = probability[position]
        hits = out.selected[:, position].sum()
        assert stats.binomtest(int(hits), rows, p).pvalue > 1e-4 if p else hits == 0


def test_proportional_probabilities_sum_to_the_target_after_capping():
    random = np.random.default_rng(1)
    for _ in range(20):
        weights = random.exponential(1.0, 20) ** 3 * (random.random(20) < 0.8)
        total = float(random.uniform(0, (weights > 0).sum()))
        p = np.asarray(select_weighted.proportional(jnp.asarray(weights), total))
        assert p.sum() == pytest.approx(total, rel=1e-4)
        free = (p < 1) & (weights > 0)
        assert np.allclose(p[free] / weights[free], (p[free] / weights[free])[0] if free.any() else 1, rtol=1e-4)


def test_tf_idf_weights_count_the_token_in_its_row():
    row = objectives.Row(*(jnp.asarray(x) for x in ([10, 11, 10, 0], [1, 1, 1, 0], [0, 1, 2, 0], [True] * 4)))
    idf = np.zeros(VOCABULARY.size, np.float32)
    idf[[10, 11]] = [1.0, 3.0]
    select = select_weighted.Weighted(0.15, 4, (0,), VOCABULARY.size, "tf_idf", idf)
    assert np.allclose(select.weights(row)[:3], [2 / 3, 1.0, 2 / 3])


def test_probabilities_per_position_are_followed_exactly():
    rows = 3000
    batch = make_batch(rows, 8)
    probabilities = np.array([1.0, 0.0, 0.1, 0.5, 0.9, 1.0, 0.3, 1.0])
    batch["select_weights"] = np.tile(probabilities, (rows, 1)).astype(np.float32)
    objective = objectives.create("conditional_mlm", VOCABULARY, 8, weights="positions", scaled=False)
    hits = corrupt(objective, batch).selected.sum(0)
    assert hits[[0, 1, 7]].tolist() == [0, 0, 0]   # markers, and probability 0
    assert hits[5] == rows
    for position in (2, 3, 4, 6):
        assert stats.binomtest(int(hits[position]), rows, probabilities[position]).pvalue > 1e-4


def test_adaptive_weights_change_the_choice_without_compiling_again():
    batch = make_batch(8, 32)
    objective = objectives.create("conditional_mlm", VOCABULARY, 32)
    compiled = []

    @jax.jit
    def step(key, weights):
        compiled.append(1)
        return objective(key, batch, token_weights=weights).selected

    only = np.zeros(VOCABULARY.size, np.float32)
    only[batch["tokens"][0, 5]] = 1.0
    step(jax.random.key(0), np.ones(VOCABULARY.size, np.float32))
    chosen = np.asarray(step(jax.random.key(0), only))
    assert len(compiled) == 1
    assert (batch["tokens"][chosen] == batch["tokens"][0, 5]).all()


def test_the_running_loss_of_the_tokens_seen_moves_and_of_others_stays():
    table = np.asarray(objectives.update_token_losses(
        jnp.full(5, 2.0), jnp.array([[1, 3], [3, 4]]), jnp.array([[1.0, 4.0], [6.0, 9.0]]),
        jnp.array([[True, True], [True, False]]), decay=0.9,
    ))
    assert np.allclose(table, [2.0, 0.9 * 2 + 0.1 * 1, 2.0, 0.9 * 2 + 0.1 * 5, 2.0])


def test_token_weights_are_refused_where_they_would_be_ignored():
    with pytest.raises(ValueError, match="does not select by token weight"):
        objectives.create("mlm", VOCABULARY, 16)(jax.random.key(0), make_batch(2, 16), token_weights=np.ones(64))


def test_predicting_less_than_is_corrupted_takes_a_subset():
    batch = make_batch(100, 40)
    out = corrupt(objectives.create("mlm", VOCABULARY, 40, rate=0.4, predict_rate=0.1), batch)
    assert (out.selected.sum(1) == 16).all()
    assert (out.loss_weights.sum(1) == 4).all() and out.loss_weights.shape == (100, 4)
    assert np.take_along_axis(out.selected, out.predict_positions, 1).all()


def test_predicting_more_than_is_corrupted_makes_disjoint_copies():
    batch = make_batch(20, 40)
    out = corrupt(objectives.create("mlm", VOCABULARY, 40, rate=0.2, predict_rate=0.4), batch)
    assert out.input_tokens.shape == (40, 40)
    hidden = out.selected.reshape(20, 2, 40)
    assert (hidden.sum(2) == 8).all()
    assert not (hidden[:, 0] & hidden[:, 1]).any()
    assert (out.segment_ids.reshape(20, 2, 40)[:, 1] == batch["segment_ids"]).all()


def test_a_scheduled_rate_follows_the_step_and_compiles_once():
    batch = make_batch(4, 40)
    rate = {"schedule": "linear", "start": 0.3, "end": 0.15, "steps": 100}
    objective = objectives.create("mlm", VOCABULARY, 40, rate=rate)
    compiled = []

    @jax.jit
    def count(key, step):
        compiled.append(1)
        return objective(key, batch, step=step).loss_weights.sum(1)

    assert objective.budget == 12
    counts = [int(count(jax.random.key(0), step)[0]) for step in (0, 50, 100, 10**6)]
    assert counts == [12, 9, 6, 6]
    assert len(compiled) == 1
    with pytest.raises(ValueError, match="step=step"):
        objective(jax.random.key(0), batch)


def test_a_traced_rate_overrides_and_the_budget_is_never_exceeded():
    batch = make_batch(4, 40)
    for kwargs in ({"compat": "roberta"}, {"compat": "hf"}, {"whole_word": True}):
        objective = objectives.create("mlm", VOCABULARY, 40, rate=0.15, **kwargs)
        out = corrupt(objective, batch, rate=jnp.float32(0.9))
        assert (out.selected.sum(1) == (out.loss_weights > 0).sum(1)).all()
        assert out.selected.sum(1).max() <= objective.budget


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("mlm", {"rate": 1.2}, r"rate=1.2: expected a fraction between 0 and 1"),
        ("mlm", {"rate": 15}, r"rate=15: .*did you mean 0.15"),
        ("mlm", {"rate": "high"}, r"rate='high': expected a number"),
        ("mlm", {"replacement": (0.8, 0.1, 0.2)}, r"sums to 1.1"),
        ("mlm", {"replacement": (0.8, 0.2)}, r"expected \(mask, random, keep\)"),
        ("mlm", {"compat": "spanbert"}, r"is an objective of its own: create\('spanbert', ...\)"),
        ("pmi_mlm", {}, r"needs ngrams"),
        ("pmi_mlm", {"ngrams": "nowhere.txt"}, r"lexicon file 'nowhere.txt'"),
        ("conditional_mlm", {"table": "nowhere.npy"}, r"table='nowhere.npy'"),
        ("mlm", {"compat": "brt"}, r"compat='brt': expected one of bert"),
        ("mlm", {"max_predictions": 99}, r"max_predictions=99: expected between 1 and the row length 16"),
        ("mlm", {"rat": 0.1}, r"no parameter 'rat'; did you mean 'rate'"),
        ("mml", {}, r"objective 'mml' is unknown; did you mean 'mlm'"),
        ("span_mlm", {"longest": 20}, r"longest=20: a span would be longer than the row of 16"),
        ("mlm", {"rate": 0.3, "predict_rate": 0.5}, r"must be a multiple of a constant rate \(0.3\)"),
        ("conditional_mlm", {"table": [1.0, 2.0]}, r"table has shape \(2,\): expected one weight per id, \(64,\)"),
        ("conditional_mlm", {"weights": "tags"}, r"weights='tags': expected one of table"),
        ("pmi_mlm", {"ngrams": [(10,)]}, r"expected at least 2 ids"),
        ("pmi_mlm", {"ngrams": [(10, 99)]}, r"id 99 is outside the vocabulary of 64"),
        ("mlm", {"rate": {"schedule": "liner"}}, r"rate.schedule='liner': expected one of linear"),
        ("mlm", {"rate": lambda step: 0.1}, r"optax_schedule\(function, maximum\)"),
        ("mlm", {"static_copies": -1}, r"static_copies=-1"),
    ],
)
def test_bad_input_is_named_with_its_value_and_the_fix(name, params, message):
    with pytest.raises(ValueError, match=message):
        objectives.create(name, VOCABULARY, 16, **params)


def test_a_vocabulary_without_mask_is_refused_unless_the_policy_never_masks():
    bare = objectives.Vocabulary(size=64, pad=0)
    with pytest.raises(ValueError, match=r"needs vocabulary.mask, which is None"):
        objectives.create("mlm", bare, 16)
    objectives.create("mlm", bare, 16, replacement=(0.0, 0.5, 0.5))


def test_vocabulary_errors():
    with pytest.raises(ValueError, match=r"vocabulary.mask=64: expected an id in \[0, 64\)"):
        objectives.Vocabulary(size=64, mask=64)
    with pytest.raises(ValueError, match="sentinels contains 4, which is vocabulary.mask"):
        objectives.Vocabulary(size=64, mask=4, sentinels=(4,))
    with pytest.raises(ValueError, match="vocabulary.mask=4 is also vocabulary.unk"):
        objectives.Vocabulary(size=64, mask=4, unk=4)


def test_batch_errors_name_the_key():
    objective = objectives.create("mlm", VOCABULARY, 16, whole_word=True)
    batch = make_batch(2, 16)
    batch.pop("word_starts")
    with pytest.raises(ValueError, match="the batch has no 'word_starts'"):
        objective(jax.random.key(0), batch)
    with pytest.raises(ValueError, match="built for rows of 16 tokens"):
        objective(jax.random.key(0), make_batch(2, 8))


def test_schedules_refuse_rates_outside_the_unit_interval():
    with pytest.raises(ValueError, match="schedule end=1.5"):
        schedules.linear(0.1, 1.5, 10)
    with pytest.raises(ValueError, match="entry for step 0"):
        schedules.step({5: 0.1})


def test_a_token_is_hidden_in_proportion_to_its_running_loss():
    rows, length = 3000, 12
    batch = make_batch(rows, length)
    batch["tokens"][:, 1:-1] = np.arange(20, 30)
    losses = np.full(VOCABULARY.size, 4.0)
    losses[20:30] = [0.0, 0.01, 0.5, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 5.0]
    objective = objectives.create("conditional_mlm", VOCABULARY, length, weights="loss", rate=0.2, floor=0.25)
    assert objective.token_loss_decay == 0.99
    assert np.allclose(objective.initial_token_losses(), np.log(VOCABULARY.size))
    chosen = np.asarray(objective(jax.random.key(0), batch, token_weights=jnp.asarray(losses)).selected)[:, 1:-1]
    weights = np.maximum(losses[20:30], 0.25)
    chance = 0.2 * length * weights / weights.sum()
    assert chance.max() < 1
    score = (chosen.sum(0) - rows * chance) ** 2 / (rows * chance * (1 - chance))
    assert stats.chi2(10).sf(score.sum()) > 1e-3
    # Without losses, as in evaluation, all alike.
    even = np.asarray(objective(jax.random.key(0), batch).selected)[:, 1:-1].mean(0)
    assert np.abs(even - 0.24).max() < 5 * np.sqrt(0.24 * 0.76 / rows)


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(decay=0.5), "decay=0.5: only weights='loss' keeps a running mean"),
        (dict(weights="loss", table=[1.0]), "table: weights='loss' makes its own"),
        (dict(weights="loss", floor=0.0), "floor=0.0: expected a loss above 0"),
        (dict(weights="loss", decay=1.5), "decay=1.5: expected a fraction"),
    ],
)
def test_a_running_loss_is_refused_where_it_means_nothing(params, message):
    with pytest.raises(ValueError, match=message):
        objectives.create("conditional_mlm", VOCABULARY, 32, **params)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"10 11\n12 x\n", r"lexicon.txt:2: entry \['12', 'x'\]: expected ids, which are whole numbers"),
        (b"10 11\n\n12\n", r"lexicon.txt:3: entry \(12,\): expected at least 2 ids"),
        (b"10 -1\n", r"lexicon.txt:1: entry \(10, -1\): expected ids from 0"),
        (b"10 4294967296\n", r"lexicon.txt:1: entry .* expected ids from 0 to 2\*\*31 - 1"),
        (b"10 " + b"1" * 5000, r"lexicon.txt:1: entry .* expected ids, which are whole numbers"),
        (b"10 11\n\xff\xff\n", r"lexicon.txt:2: not UTF-8"),
        (b"\n", r"it is empty; write the ids of one entry on each line"),
    ],
)
def test_a_damaged_lexicon_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "lexicon.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        lexicon.Lexicon.read(str(path))
    assert str(raised.value).startswith(f"lexicon file '{path}': ") and "\n" not in str(raised.value)


def test_a_lexicon_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "lexicon.txt").write_bytes("10 11\r\n12 13 14\r\n".encode("utf-8-sig"))
    assert lexicon.Lexicon.read(str(tmp_path / "lexicon.txt")).longest == 3


@pytest.mark.parametrize("ngrams", ["1 2", 5, [1, 2], [["a", "b"]], [[1, 2**40]]])
def test_what_is_no_list_of_ngrams_is_a_one_line_error(ngrams):
    with pytest.raises(ValueError, match="expected .*ids"):
        lexicon.Lexicon(ngrams)


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _npz(array):
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a .npy file"),
        (b"text", "expected a .npy file"),
        (_npy(np.ones(64))[:-8], "expected a .npy file"),
        (_npy(np.ones(64)).replace(b"(64,)", b"(6**4)"), "expected a .npy file"),
        (_npy(np.ones(64)).replace(b"(64,), }       ", b"(9999999999,),}"), "expected a .npy file"),
        (_npy(np.array([None] * 64)), "expected a .npy file"),
        (_npz(np.ones(64)), "found an archive of several"),
        (_npz(np.ones(64))[:-30], "expected a .npy file"),
        (_npy(np.array(["a"] * 64)), "expected one number per id"),
        (_npy(np.ones(63)), "has shape"),
        (_npy(-np.ones(64)), "expected finite weights"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, content, message):
    path = tmp_path / "table.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        objectives.create("conditional_mlm", VOCABULARY, 16, table=str(path))
    assert "table.npy" in str(raised.value) and "\n" not in str(raised.value)
