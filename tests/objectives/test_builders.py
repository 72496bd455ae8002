"""Every parameter of every objective: a wrong value is one line that names it, whatever its type."""

import random

import pytest

from maskformer import objectives
from maskformer.objectives.builders import parameters
from tests.configs.mutations import VALUES
from tests.objectives.examples import make_vocabulary

VOCABULARY = make_vocabulary(size=200, sentinels=40)
OF_OBJECTIVES = (
    [("R", 3.0, 0.15)], [["S", None, 0.2]], [["R", 3]], [[["R"], 3, 0.1]],
    {"R": 7, "S": 8, "X": 9}, {"R": None, "S": 1.5}, [[10, 11]], [[10, "a"]], [10**30], ["a"], [1, 1, 1],
    (0.5, 0.5, 0.0), (0, 0, 1), (1, 0, 0), [float("nan")] * 3,
    "uniform", "inverse", "batch", "epochs", "positions", "loss", "tf_idf", "drop", "iid", "deshuffle", "roberta", "hf",
    "prefix", "right", "mdlm", "masked", [True] * 3, [0.0] * 200,
)  # fmt: skip


def test_a_wrong_parameter_of_an_objective_is_one_line_that_names_it():
    generator = random.Random(0)
    made = 0
    for _ in range(2000):
        name = generator.choice([*objectives.BUILDERS, *objectives.COMPAT])
        known = list(parameters(objectives.COMPAT[name].objective if name in objectives.COMPAT else name))
        chosen = generator.sample(known, min(len(known), generator.choice((1, 1, 2))))
        params = {key: generator.choice(VALUES + OF_OBJECTIVES) for key in chosen}
        told = f"{name} with {str(params)[:300]}"
        try:
            objective = objectives.create(name, VOCABULARY, 64, **params)
        except ValueError as error:
            line = str(error)
            assert line.isprintable() and len(line) < 800, f"{told}: {line!r}"
            named = any(key in line for key in (*chosen, "full_stops", "mixture", "middle_token", "ngrams", "lexicon"))
            assert named, f"{told}: {line!r}"
        except Exception as error:
            raise AssertionError(f"{told}: {type(error).__name__}") from error
        else:
            made += 1
            assert objective.budget > 0, told
    assert 20 < made < 1900


HIDING = "bert roberta hf span_mlm ngram_mlm conditional_mlm pmi_mlm electra t5 masked_source".split()


@pytest.mark.parametrize("name", HIDING)
def test_a_constant_rate_of_zero_is_refused_by_name(name):
    params = {"ngrams": [(10, 11)]} if name == "pmi_mlm" else {}
    for rate in (0, 0.0, {"schedule": "linear", "start": 0.0, "end": 0.0, "steps": 10}):
        if name in ("electra", "t5") and isinstance(rate, dict):
            continue
        with pytest.raises(ValueError, match=r"^rate.*nothing is hidden or predicted"):
            objectives.create(name, VOCABULARY, 64, rate=rate, **params)


def test_a_rate_that_hides_nothing_of_so_short_a_row_is_refused():
    with pytest.raises(ValueError, match=r"rate=1e-12: expected a higher one: .* no token of a row of 64"):
        objectives.create("hf", VOCABULARY, 64, rate=1e-12)


def test_a_schedule_may_start_at_zero():
    rising = {"schedule": "linear", "start": 0.0, "end": 0.3, "steps": 10}
    assert objectives.create("hf", VOCABULARY, 64, rate=rising).rate.start == 0.0


def test_zero_may_be_the_rate_of_what_predicts_the_whole_row_anyway():
    stops = {"rate": 0.0, "permute_sentences": 1.0, "full_stops": (10,)}
    assert objectives.create("denoising", VOCABULARY, 64, **stops).budget == 64
    assert objectives.create("fim", VOCABULARY, 64, rate=0.0).budget == 64
