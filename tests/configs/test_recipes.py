"""Every recipe in configs/: it resolves at every size, leaks nothing, and trains."""

import pathlib

import jax
import pytest

from configs.bert import SIZES
from maskformer import inspection
from maskformer.training import load_config, objectives_section, resolve, runs, train_and_evaluate
from tests.training.tiny import metric_lines, tiny_config, write_corpus

RECIPES = sorted(path.stem for path in pathlib.Path("configs").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_resolves_at_every_size(recipe):
    for size in SIZES:
        resolve(load_config([f"--config=configs/{recipe}.py:{size}"])[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_prediction_of_a_recipe_sees_its_answer(recipe):
    length = 64 if recipe == "ul2" else 32  # UL2's longest spans are 64 tokens
    setup = runs.prepare([f"--config=configs/{recipe}.py:tiny,seq={length},vocab=1024", "--config.model.width=32"])
    report = inspection.check_leaks(setup.objective, setup.first_batch(2), model=setup.model, step=0)
    assert report.ok, str(report)
    assert report.predictions > 0 and report.responsive > 0.5


def test_nothing_leaks_after_a_swap_of_the_objective():
    setup = runs.prepare(["--config=configs/swap.py:tiny,seq=32,vocab=1024", "--config.model.width=32"])
    batch = setup.first_batch(2)
    for step, source in ((0, 0), (10_000, 1)):
        assert (setup.objective(setup.objective_key, batch, step=step).source == source).all()
    report = inspection.check_leaks(setup.objective, batch, model=setup.model, step=0)
    assert report.ok and report.parts == ("mlm", "causal_lm"), str(report)


def test_the_second_network_of_electra_sees_only_what_the_masks_allow():
    setup = runs.prepare(["--config=configs/electra.py:tiny,seq=32,vocab=1024", "--config.model.width=32"])
    params = setup.model.init(jax.random.key(0))

    def discriminate(tokens, corrupted, mask):
        return setup.model.discriminate(params, tokens, positions=corrupted.positions, mask=mask)[..., None]

    report = inspection.check_leaks(setup.objective, setup.first_batch(1), apply=discriminate, rows=1)
    assert report.ok and report.responsive > 0.5, str(report)


@pytest.mark.parametrize("name", ["causal_lm", "diffusion", "span_mlm"])
def test_every_kind_of_objective_trains_through_the_same_loop(name, tmp_path):
    config = tiny_config(write_corpus(tmp_path / "text"), train__steps=6, evaluation__every=3, mesh__data=-1)
    config.objective = objectives_section(name)
    train_and_evaluate(config, tmp_path / "run")
    # Under fixed masks: diffusion weighs a training row by one over its rate, so its training loss jumps about.
    losses = [line["validation/loss"] for line in metric_lines(tmp_path / "run") if "validation/loss" in line]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", ["bart", "t5", "electra", "masked_source"])
def test_an_objective_that_needs_another_model_says_so_before_it_trains(name, tmp_path):
    config = tiny_config(tmp_path)
    config.data.sentinels = 8
    config.objective = objectives_section(name)
    with pytest.raises(ValueError, match="objective"):
        resolve(config)


def test_the_mask_report_counts_the_models_own_mask_too():
    flags = ["--config=configs/bert.py:tiny,seq=32,vocab=1024", "--config.model.width=32"]
    shares = []
    for mask in ("everything", "causal"):
        setup = runs.prepare([*flags, f"--config.model.mask={mask}"])
        report = inspection.mask_report(setup.objective, [setup.first_batch(2)], model=setup.model)
        shares.append(report.attended_fraction)
    assert shares[1] < 0.6 * shares[0]
