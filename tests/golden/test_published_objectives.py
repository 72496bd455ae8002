"""Numbers that papers and reference implementations print, in one place."""

import math
from fractions import Fraction

import numpy as np
import pytest

from maskformer import objectives
from maskformer.objectives.counting import Count, binomial_quantile
from maskformer.objectives.denoising import poisson_lengths
from maskformer.objectives.select_spans import geometric_lengths, inverse_lengths
from maskformer.objectives.span_corruption import UL2_DENOISERS, noise_counts, span_corruption_lengths

VOCABULARY = objectives.Vocabulary(
    size=1000, pad=0, unk=1, cls=2, sep=3, mask=4, bos=5, eos=6, sentinels=tuple(range(999, 699, -1)), special=(7, 8, 9)
)


@pytest.mark.parametrize(("inputs", "expected"), [(512, (568, 114)), (1024, (1137, 229))])
def test_t5_random_spans_helper(inputs, expected):
    assert span_corruption_lengths(inputs, 0.15, 3.0) == expected


@pytest.mark.parametrize(
    ("size", "rate", "mean", "expected"),
    [
        (568, 0.15, 3.0, (85, 28)), (1137, 0.15, 3.0, (171, 57)), (20, 0.15, 3.0, (3, 1)), (2, 0.15, 3.0, (1, 1)),
        (1, 0.15, 3.0, (0, 0)), (0, 0.15, 3.0, (0, 0)), (512, 0.0, 3.0, (0, 0)), (512, 0.5, 64.0, (256, 4)),
        (512, 0.15, 64.0, (77, 1)), (10, 1.0, 3.0, (9, 1)),
    ],
)
def test_t5_noise_tokens_and_spans(size, rate, mean, expected):
    assert noise_counts(size, rate, mean) == expected


def test_spanbert_span_lengths():
    lengths = geometric_lengths(0.2, 10)
    assert np.dot(lengths, range(1, 11)) == pytest.approx(3.797, abs=5e-4)
    assert lengths[0] == pytest.approx(0.2 / (1 - 0.8**10))


def test_albert_ngram_lengths():
    assert inverse_lengths(3) == pytest.approx([6 / 11, 3 / 11, 2 / 11])


def test_bart_poisson_is_cut_where_fairseq_cuts_it():
    # fairseq stops after the first probability below 1e-7: k = 17 for a mean of 3.
    assert len(poisson_lengths(3.0)) == 18
    assert poisson_lengths(3.0)[0] == pytest.approx(math.exp(-3), rel=1e-6)


def test_hf_leaves_one_row_of_ten_tokens_in_five_without_a_mask():
    assert 0.85**10 == pytest.approx(0.197, abs=5e-4)
    assert objectives.create("hf", VOCABULARY, 10).budget == binomial_quantile(10, 0.15) == 10


@pytest.mark.parametrize("rate", [0.15, 0.2, 0.4])
def test_bert_counts_round_half_to_even_as_python_does(rate):
    whole, _ = Count("round", rate, 512, minimum=1).table()
    assert whole.tolist() == [round(rate * n) for n in range(513)]
    # 4.5, 7.5, 10.5 and 13.5 go to 4, 8, 10 and 14.
    assert rate != 0.15 or whole[[30, 50, 70, 90]].tolist() == [4, 8, 10, 14]


def test_bert_defaults_are_those_of_the_released_pretraining_data():
    # create_pretraining_data.py: 128 tokens, max_predictions_per_seq 20, masked_lm_prob 0.15.
    assert objectives.create("bert", VOCABULARY, 128, max_predictions=20).budget == 19
    assert objectives.create("bert", VOCABULARY, 512, max_predictions=77).budget == 77


def test_roberta_counts_are_the_floor_or_one_more():
    whole, fraction = Count("stochastic", 0.15, 512).table()
    for size in (1, 20, 30, 512):
        exact = Fraction(15, 100) * size
        assert whole[size] == math.floor(exact)
        assert fraction[size] == pytest.approx(float(exact - math.floor(exact)), abs=1e-6)


def test_spanbert_budget_is_the_ceiling():
    assert objectives.create("spanbert", VOCABULARY, 512).budget == math.ceil(0.15 * 512) == 77


def test_ul2_has_the_seven_denoisers_of_its_table():
    assert [(mean, rate) for mode, mean, rate in UL2_DENOISERS if mode == "R"] == [(3, 0.15), (8, 0.15)]
    assert [(mean, rate) for mode, mean, rate in UL2_DENOISERS if mode == "S"] == [(None, 0.25)]
    assert [(mean, rate) for mode, mean, rate in UL2_DENOISERS if mode == "X"] == [
        (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)
    ]


def test_electra_masks_85_percent_and_weighs_the_discriminator_by_50():
    electra = objectives.create("electra", VOCABULARY, 128)
    assert electra.replace.policy == (0.85, 0.0, 0.15) and electra.discriminator_weight == 50.0


@pytest.mark.parametrize(
    ("name", "time", "probability", "weight"),
    [("llada", 0.5, 0.5005, 1 / 0.5005), ("mdlm", 0.5, 0.999 * 0.5005, 1 / 0.5005), ("llada", 0.0, 1e-3, 1000.0)],
)
def test_diffusion_masking_probability_and_loss_weight(name, time, probability, weight):
    p, w = objectives.create(name, VOCABULARY, 16).probability_and_weight(time)
    assert (float(p), float(w)) == pytest.approx((probability, weight))


def test_every_convention_names_its_source():
    assert {"bert", "roberta", "hf", "spanbert", "t5", "bart", "electra", "mdlm", "llada"} <= set(objectives.COMPAT)
    assert all(convention.source for convention in objectives.COMPAT.values())
