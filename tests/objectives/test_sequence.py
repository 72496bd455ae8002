"""Causal, prefix and fill-in-the-middle objectives on packed rows, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from maskformer import objectives
from maskformer.attention import intervals
from tests.attention.test_intervals import rows_of
from tests.objectives.examples import make_batch, make_vocabulary
from tests.objectives.test_mlm import corrupt

VOCABULARY = make_vocabulary()
FIM = {"prefix_token": 7, "suffix_token": 8, "middle_token": 9}


def two_documents(rows, length, first, size):
    """Rows of two documents: `first` tokens, then the rest of `size` tokens, then padding. No markers."""
    batch = make_batch(rows, length, lengths=np.full(rows, size), markers=False)
    batch["segment_ids"][:, first:size] = 2
    batch["positions"][:, first:size] -= first
    return batch


def test_causal_targets_are_the_next_token_of_the_same_segment():
    batch = two_documents(3, 10, 4, 8)
    out = corrupt(objectives.create("causal_lm", VOCABULARY, 10), batch)
    assert out.loss_weights.tolist() == [[1, 1, 1, 0, 1, 1, 1, 0, 0, 0]] * 3
    used = out.loss_weights > 0
    assert (out.target_tokens[used] == np.roll(batch["tokens"], -1, 1)[used]).all()
    assert (out.input_tokens == batch["tokens"]).all()


def test_shifted_causal_input_starts_every_segment_with_bos_and_predicts_every_token():
    batch = two_documents(2, 10, 4, 8)
    out = corrupt(objectives.create("causal_lm", VOCABULARY, 10, shift="right"), batch)
    assert out.input_tokens[:, [0, 4]].tolist() == [[VOCABULARY.bos] * 2] * 2
    assert (out.input_tokens[:, [1, 2, 3, 5, 6, 7]] == batch["tokens"][:, [0, 1, 2, 4, 5, 6]]).all()
    assert (out.target_tokens[:, :8] == batch["tokens"][:, :8]).all()
    assert (out.loss_weights.sum(1) == 8).all()


def test_causal_mask_is_key_not_after_query_within_the_segment():
    objective = objectives.create("causal_lm", VOCABULARY, 6)
    batch = two_documents(1, 6, 3, 6)
    mask = np.asarray(objective.attend(objective(jax.random.key(0), batch)).dense(6, 6))[0]
    assert mask.tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1],
    ]


def test_prefix_length_is_uniform_from_one_to_all_but_one_in_each_segment():
    rows = 3000
    batch = two_documents(rows, 12, 4, 10)
    out = corrupt(objectives.create("prefix_lm", VOCABULARY, 12), batch)
    for part, size in ((slice(0, 4), 4), (slice(4, 10), 6)):
        prefix = out.bidirectional[:, part].sum(1)
        assert (np.sort(out.bidirectional[:, part], axis=1)[:, ::-1] == out.bidirectional[:, part]).all()
        assert stats.chisquare(np.bincount(prefix, minlength=size)[1:size]).pvalue > 1e-3
        # The last token of the prefix is the first to predict, the last but one of the segment the last.
        assert (out.loss_weights[:, part].sum(1) == size - prefix).all()
    same = batch["segment_ids"][:, :-1] == batch["segment_ids"][:, 1:]
    both = out.bidirectional[:, :-1] & out.bidirectional[:, 1:] & same
    assert (out.loss_weights[:, :-1][both] == 0).all()


def test_prefix_mask_is_causal_or_both_in_the_prefix():
    objective = objectives.create("prefix_lm", VOCABULARY, 9)
    batch = two_documents(4, 9, 4, 8)
    out = objective(jax.random.key(1), batch)
    mask = np.asarray(objective.attend(out).dense(9, 9))
    prefix, segment = np.asarray(out.bidirectional), batch["segment_ids"]
    for b in range(4):
        for q in range(8):
            for k in range(9):
                same = segment[b, q] == segment[b, k]
                assert mask[b, q, k] == (same and (k <= q or (prefix[b, q] and prefix[b, k])))


def test_prefix_bounds_are_fractions_of_the_segment():
    batch = make_batch(50, 20, markers=False)
    out = corrupt(objectives.create("prefix_lm", VOCABULARY, 20, shortest=0.5, longest=0.5), batch)
    assert (out.bidirectional.sum(1) == 10).all()
    with pytest.raises(ValueError, match="shortest=0.7 is above longest=0.5"):
        objectives.create("prefix_lm", VOCABULARY, 20, shortest=0.7, longest=0.5)


def undo_fim(document):
    """(kind, original tokens, (prefix, middle, suffix) sizes) of one rearranged document without its end markers.

    PSM with an empty prefix reads like SPM with one, and is taken for it.
    """
    if 7 not in document:
        return "plain", document, None
    at = {marker: document.index(marker) for marker in (7, 8, 9)}
    if at[8] == at[7] + 1:
        suffix = document[at[8] + 1 : at[9]]
        rest = document[at[9] + 1 :]
        return "spm", rest + suffix, (None, None, len(suffix))
    prefix, suffix = document[at[7] + 1 : at[8]], document[at[8] + 1 : at[9]]
    middle = document[at[9] + 1 :]
    return "psm", prefix + middle + suffix, (len(prefix), len(middle), len(suffix))


def test_fim_rearranges_each_document_and_loses_no_token():
    rows, length = 1500, 24
    batch = make_batch(rows, length, lengths=np.full(rows, 16))
    batch["segment_ids"][:, 8:16] = 2
    batch["tokens"][:, 7] = VOCABULARY.sep
    out = corrupt(objectives.create("fim", VOCABULARY, length, **FIM), batch)
    kinds = {"plain": 0, "psm": 0, "spm": 0}
    cuts = np.zeros((7, 7), int)
    for row in range(rows):
        for segment, original in ((1, batch["tokens"][row, 1:7]), (2, batch["tokens"][row, 8:15])):
            document = out.input_tokens[row][out.segment_ids[row] == segment].tolist()
            assert document[-1] == VOCABULARY.sep
            text = document[1:-1] if segment == 1 else document[:-1]
            kind, restored, sizes = undo_fim(text)
            assert restored == original.tolist()
            kinds[kind] += 1
            if kind == "psm" and segment == 1:
                cuts[sizes[0], sizes[0] + sizes[1]] += 1
    # The documents have 6 and 7 tokens: two draws from 0..6 hold a 0 in 13 of 49 cases, from 0..7 in 15 of 64.
    psm = rows / 4 * ((1 - 13 / 49) + (1 - 15 / 64))
    assert stats.chisquare(list(kinds.values()), [rows, psm, rows - psm]).pvalue > 1e-3
    # Two sorted draws from 1..6: unequal pairs are twice as likely as equal ones.
    weight = (np.triu(np.full((7, 7), 2.0), 1) + np.eye(7))[1:, 1:]
    upper = np.triu_indices(6)
    seen = cuts[1:, 1:]
    assert cuts[0].sum() == 0 and np.tril(cuts, -1).sum() == 0
    assert stats.chisquare(seen[upper], weight[upper] / 36 * seen.sum()).pvalue > 1e-3


def test_fim_predicts_every_part_and_restarts_positions():
    batch = make_batch(8, 24, lengths=np.full(8, 16))
    out = corrupt(objectives.create("fim", VOCABULARY, 24, rate=1.0, **FIM), batch)
    size = (out.segment_ids > 0).sum(1)
    assert (size == 19).all()
    assert (out.loss_weights.sum(1) == 18).all()
    assert (out.positions[:, :19] == np.arange(19)).all()


def test_fim_cuts_what_no_longer_fits():
    batch = make_batch(8, 16)
    out = corrupt(objectives.create("fim", VOCABULARY, 16, rate=1.0, **FIM), batch)
    assert (out.segment_ids > 0).all() and out.input_tokens.shape == (8, 16)


def test_fim_asks_for_three_different_special_markers():
    with pytest.raises(ValueError, match="must differ"):
        objectives.create("fim", VOCABULARY, 16, prefix_token=7, suffix_token=7, middle_token=9)
    with pytest.raises(ValueError, match="prefix_token=20: not a special id"):
        objectives.create("fim", VOCABULARY, 16, prefix_token=20, suffix_token=8, middle_token=9)
    with pytest.raises(ValueError, match="needs prefix_token, suffix_token and middle_token"):
        objectives.create("fim", VOCABULARY, 16, prefix_token=7)
    with pytest.raises(ValueError, match="put them first in vocabulary.special"):
        objectives.create("fim", objectives.Vocabulary(size=9, special=(7, 8)), 16)
    default = objectives.create("fim", VOCABULARY, 16)
    assert (default.prefix_id, default.suffix_id, default.middle_id) == (7, 8, 9)


def test_shift_right_needs_a_start_token():
    with pytest.raises(ValueError, match="shift='right' starts every segment with vocabulary.bos"):
        objectives.create("causal_lm", objectives.Vocabulary(size=10, pad=0), 8, shift="right")


# --- masked diffusion -------------------------------------------------------------------------------------------------


def test_llada_loss_weight_is_one_over_the_masking_probability_and_unbiased():
    rows = 4000
    batch = make_batch(rows, 16, markers=False)
    out = corrupt(objectives.create("llada", VOCABULARY, 16), batch)
    assert (out.input_tokens[out.selected] == VOCABULARY.mask).all()
    assert (out.loss_weights > 0).sum() == out.selected.sum()
    assert (out.denominators == 16).all()
    # The share of masked tokens is uniform over rates: its mean is 1/2, and each count 0..16 about as likely.
    assert stats.chisquare(np.bincount(out.selected.sum(1), minlength=17)).pvalue > 1e-4
    # E[sum of weights] = number of tokens, whatever t: the estimator weighs every token once.
    share = out.loss_weights.sum(1) / 16
    assert abs(share.mean() - 1.0) < 4 * share.std() / rows**0.5
    weight = out.loss_weights.max(1)
    assert weight.max() <= 1000.0 and weight[weight > 0].min() >= 1.0


def test_mdlm_follows_the_log_linear_schedule():
    objective = objectives.create("mdlm", VOCABULARY, 16)
    uniform = jnp.linspace(0.0, 0.999, 50)
    p, w = (np.asarray(x) for x in objective.probability_and_weight(uniform))
    t = (1 - 1e-3) * np.asarray(uniform, np.float64) + 1e-3
    sigma = -np.log1p(-(1 - 1e-3) * t)
    dsigma = (1 - 1e-3) / (1 - (1 - 1e-3) * t)
    assert np.allclose(p, 1 - np.exp(-sigma), rtol=1e-4)
    assert np.allclose(w, dsigma / np.expm1(sigma), rtol=1e-4)


@pytest.mark.parametrize("sampling", ["batch", "epochs"])
def test_low_discrepancy_times_fill_every_stratum(sampling):
    objective = objectives.create("diffusion", VOCABULARY, 16, sampling=sampling)
    count = 32
    keys = jax.random.split(jax.random.key(0), count)
    if sampling == "batch":
        epoch, example = jnp.zeros(count, jnp.int32), jnp.arange(count)
    else:
        epoch, example = jnp.arange(count), jnp.zeros(count, jnp.int32)
    times = np.sort(np.asarray(objective.times(jax.random.key(1), keys, epoch, example)))
    # Star discrepancy of random points is about 1 / sqrt(n); here it is of order 1 / n.
    assert np.abs(times - (np.arange(count) + 0.5) / count).max() < 2.0 / count


def test_diffusion_loss_is_over_all_tokens_and_rules_out_the_mask_token():
    objective = objectives.create("diffusion", VOCABULARY, 8)
    batch = make_batch(2, 8, lengths=[8, 5], markers=False)
    out = objective(jax.random.key(0), batch)
    logits = jnp.zeros((2, 8, VOCABULARY.size)).at[..., VOCABULARY.mask].set(50.0)
    (loss, weight), gradient = jax.jit(jax.value_and_grad(lambda x: objective.loss(x, out), has_aux=True))(logits)
    assert float(weight) == 13.0
    assert float(loss) == pytest.approx(float(out.loss_weights.sum()) * np.log(VOCABULARY.size - 1), rel=1e-5)
    assert np.isfinite(gradient).all() and (gradient[..., VOCABULARY.mask] == 0).all()
    with pytest.raises(ValueError, match="label_smoothing=0.1"):
        objective.loss(logits, out, 0.1)


def test_diffusion_at_a_fixed_rate_and_on_an_empty_row():
    objective = objectives.create("diffusion", VOCABULARY, 64)
    batch = make_batch(40, 64, lengths=[64] * 39 + [0], markers=False)
    out = corrupt(objective, batch, rate=jnp.float32(0.25))
    assert abs(out.selected[:39].mean() - 0.25) < 0.05
    assert set(np.unique(out.loss_weights)) == {0.0, 4.0}
    assert not out.selected[39].any() and out.denominators[39] == 0


def test_diffusion_bounds_are_checked():
    with pytest.raises(ValueError, match="epsilon=0: expected above 0"):
        objectives.create("diffusion", VOCABULARY, 8, epsilon=0.0)
    with pytest.raises(ValueError, match="sampling='sobol'"):
        objectives.create("diffusion", VOCABULARY, 8, sampling="sobol")


@pytest.mark.parametrize("name", ["mlm", "causal_lm", "prefix_lm", "ul2", "diffusion"])
def test_every_query_sees_one_run_of_keys_so_that_a_gpu_kernel_takes_any_batch(name):
    objective = objectives.create(name, make_vocabulary(size=128, sentinels=40), 64)
    found = []

    def trace(batch):
        found.append(rows_of(objective.attend(objective(jax.random.key(0), batch)), 64, 64, 0))

    jax.eval_shape(trace, two_documents(2, 64, 20, 60))
    assert isinstance(found[0], intervals.Rows), found
