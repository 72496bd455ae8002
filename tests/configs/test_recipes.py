"""Every recipe in configs/: it resolves at every size, leaks nothing, and trains."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import pytest

from configs import shapes
from maskformer import inspection, models, objectives
from maskformer.training import load_config, objectives_section, recipes, resolve, runs, sweeps, train_and_evaluate
from tests.training.tiny import metric_lines, tiny_config, write_corpus

RECIPES = sorted(path.stem for path in pathlib.Path("configs").glob("*.py") if path.stem not in ("__init__", "shapes"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_resolves_at_every_size(recipe):
    for size in shapes.GPT if recipe == "gpt" else shapes.BERT:
        resolve(load_config([f"--config=configs/{recipe}.py:{size}"])[0])


@pytest.mark.parametrize("recipe, sweep, count", [
    ("bert", "sweep", 9), ("bert", "seeds", 5), ("electra", "sweep", 4), ("electra", "questions", 2),
])  # fmt: skip
def test_the_runs_of_a_sweep_resolve_and_differ(recipe, sweep, count):
    config, module = recipes.load_config([f"--config=configs/{recipe}.py:mini"])
    runs = [sweeps.apply(config, overrides).to_json() for overrides in recipes.load_sweep(module, sweep)]
    assert len(set(runs)) == len(runs) == count
    for run in runs:
        resolve(json.loads(run))


# Radford et al. 2019, table 2, as the released weights count them: 124, 355, 774 and 1558 million.
@pytest.mark.parametrize(
    "size, parameters",
    [("small", 124_439_808), ("medium", 354_823_168), ("large", 774_030_080), ("xl", 1_557_611_200)],
)
def test_gpt_has_the_parameters_of_gpt_2(size, parameters):
    experiment = resolve(load_config([f"--config=configs/gpt.py:{size},seq=1024,vocab=50257"])[0])
    objective = experiment.create_objective(objectives.Vocabulary(size=50257, pad=0))
    assert models.create(experiment.create_model_config(objective)).num_params() == parameters


def test_llama_has_the_parameters_of_llama_2():
    # As the released weights count them, in rows of 4,096 tokens.
    config = load_config(["--config=configs/gpt.py:llama-7b"])[0]
    experiment = resolve(config)
    objective = experiment.create_objective(objectives.Vocabulary(size=config.data.vocabulary_size, pad=0))
    assert models.create(experiment.create_model_config(objective)).num_params() == 6_738_415_616
    assert config.data.length == 4096
    assert load_config(["--config=configs/gpt.py:llama-7b,seq=64"])[0].data.length == 64


def test_no_recipe_starts_a_device_before_it_trains():
    # jax.distributed must be initialised before any device, and comes after the config.
    code = f"""
        from jax._src import xla_bridge
        from maskformer.training import load_config, resolve
        for name in {RECIPES}:
            resolve(load_config([f"--config=configs/{{name}}.py:tiny", "--config.evaluation.metric=loss"])[0])
        resolve(load_config(["--config=configs/bert.py:tiny", "--config.evaluation.metric=perplexity"])[0])
        assert not xla_bridge.backends_are_initialized()
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_prediction_of_a_recipe_sees_its_answer(recipe):
    length = 64 if recipe == "ul2" else 32  # UL2's longest spans are 64 tokens
    program = runs.prepare([f"--config=configs/{recipe}.py:tiny,seq={length},vocab=1024", "--config.model.width=32"])
    report = inspection.check_leaks(program.objective, program.first_batch(2), model=program.model, step=0)
    assert report.ok, str(report)
    assert report.predictions > 0 and report.responsive > 0.5


def test_nothing_leaks_after_a_swap_of_the_objective():
    program = runs.prepare(["--config=configs/swap.py:tiny,seq=32,vocab=1024", "--config.model.width=32"])
    batch = program.first_batch(2)
    for step, source in ((0, 0), (10_000, 1)):
        assert (program.objective(program.masking_key, batch, step=step).source == source).all()
    report = inspection.check_leaks(program.objective, batch, model=program.model, step=0)
    assert report.ok and report.parts == ("mlm", "causal_lm"), str(report)


def test_the_second_network_of_electra_sees_only_what_the_masks_allow():
    program = runs.prepare(["--config=configs/electra.py:tiny,seq=32,vocab=1024", "--config.model.width=32"])
    params = program.model.init(jax.random.key(0))

    def discriminate(tokens, corrupted, mask):
        return program.model.discriminate(params, tokens, positions=corrupted.positions, mask=mask)[..., None]

    report = inspection.check_leaks(program.objective, program.first_batch(1), apply=discriminate, rows=1)
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
        program = runs.prepare([*flags, f"--config.model.mask={mask}"])
        report = inspection.mask_report(program.objective, [program.first_batch(2)], model=program.model)
        shares.append(report.attended_fraction)
    assert shares[1] < 0.6 * shares[0]
