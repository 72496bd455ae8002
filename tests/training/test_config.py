"""Every mistake in a config is one line that names the field, the value and the way out, before any device starts."""

import pytest

from maskformer.objectives import Vocabulary
from maskformer.training import default_config, load_config, parse_arg, resolve
from maskformer.training.config import plain
from maskformer.training.recipes import load_sweep
from maskformer.training.sweeps import apply, arms, product, zipit

RECIPE = "configs/bert.py:tiny"
VOCABULARY = Vocabulary(size=100, pad=0, unk=1, cls=2, sep=3, mask=4)


def error_of(*flags):
    with pytest.raises(ValueError) as caught:
        config, _ = load_config([f"--config={RECIPE}", *flags])
        resolve(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_default_is_valid_and_survives_json():
    import json

    config = default_config()
    assert resolve(json.loads(json.dumps(plain(config)))) == resolve(config)


@pytest.mark.parametrize(
    "flag, parts",
    [
        ("--config.optimizer.learning_rat=1", ["learning_rat", "learning_rate"]),
        ("--config.optimiser.learning_rate=1", ["optimiser", "optimizer"]),
        ("--config.optimizer.learning_rate=fast", ["optimizer.learning_rate", "fast"]),
        ("--config.train.steps=1.5", ["train.steps", "1.5"]),
        ("--config.objective.rate=1.3", ["objective", "rate=1.3", "between 0 and 1"]),
        ("--config.objective.name=mlmm", ["objective", "mlm"]),
        ("--config.model.heads=3", ["model.heads=3", "does not divide", "width"]),
        ("--config.model.norm=layernrom", ["model.norm", "layernorm"]),
        ("--config.model.mask=causl", ["model.mask", "causal"]),
        ("--config.optimizer.name=adam", ["optimizer.name='adam'", "adamw"]),
        ("--config.optimizer.schedule=wsdd", ["optimizer.schedule='wsdd'", "wsd"]),
        ("--config.optimizer.b1=1.0", ["optimizer.b1=1.0", "[0, 1)"]),
        ("--config.train.accumulation_steps=3", ["accumulation_steps=3", "divisor", "32"]),
        ("--config.mesh.fsdp=0", ["mesh.fsdp=0", "at least 1"]),
        ("--config.mesh.fsdp=-1", ["mesh", "at most one axis of -1"]),
        ("--config.data.segment_by=sentense", ["segment_by", "sentence"]),
        ("--config.evaluation.patience=0", ["evaluation.patience=0", "at least 1"]),
        ("--config.optimizer.ema_decay=2.0", ["optimizer.ema_decay=2.0", "(0, 1)"]),
        ("--confg.train.steps=3", ["confg", "no such flag"]),
    ],
)
def test_a_mistake_is_one_line_that_names_field_value_and_fix(flag, parts):
    message = error_of(flag)
    for part in parts:
        assert part in message, message


def test_a_missing_recipe_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"configs/bret.py: no such file.*did you mean 'configs/bert.py'"):
        load_config(["--config=configs/bret.py"])


def test_overrides_reach_the_config_with_their_types():
    config, recipe = load_config(
        [
            f"--config={RECIPE},seq=64",
            "--config.optimizer.clip_norm=0.5",
            "--config.objective.replacement=(1.0, 0.0, 0.0)",
            "--config.evaluation.objective.rate=0.3",
            "--config.model.mask=causal & window(16)",
        ]
    )
    experiment = resolve(config)
    assert recipe == f"{RECIPE},seq=64" and experiment.data.length == 64
    assert experiment.optimizer.clip_norm == 0.5
    assert experiment.objective["replacement"] == [1.0, 0.0, 0.0]
    assert experiment.evaluation.objective["rate"] == 0.3
    assert experiment.model["mask"] == "causal & window(16)"


def test_a_rate_may_be_a_schedule_and_a_number_again():
    flag = "--config.objective.rate={'schedule': 'linear', 'start': 0.3, 'end': 0.15, 'steps': 100}"
    config, _ = load_config([f"--config={RECIPE}", flag])
    assert resolve(config).create_objective(VOCABULARY).rate.description == "linear 0.3 -> 0.15 over 100"
    assert resolve(apply(config, {"objective.rate": 0.4})).objective["rate"] == 0.4
    assert "rate.schedule='linaer'" in error_of(flag.replace("linear", "linaer"))
    assert "rate='fast': expected a number" in error_of("--config.objective.rate=fast")


def test_a_mask_may_be_a_pattern_over_the_layers():
    config, _ = load_config([f"--config={RECIPE}", "--config.model.mask=('causal & window(16)', 'causal')"])
    assert resolve(config).create_model_config(VOCABULARY).mask_pattern == ("causal & window(16)", "causal")
    assert "causl" in error_of("--config.model.mask=('causal', 'causl')")


def test_structure_arguments_are_checked_like_flags():
    with pytest.raises(ValueError, match="'tinyy': expected one of .*did you mean 'tiny'"):
        load_config(["--config=configs/bert.py:tinyy"])
    with pytest.raises(ValueError, match="seq='long': expected int"):
        parse_arg("seq=long", seq=128)


def test_every_size_of_the_bert_recipe_resolves():
    from configs.bert import SIZES, get_config

    for size in SIZES:
        resolve(get_config(size))


def test_every_run_of_every_sweep_of_the_bert_recipe_resolves():
    config, _ = load_config([f"--config={RECIPE}"])
    for name in ("sweep", "seeds"):
        runs = load_sweep(RECIPE, name)
        assert len(runs) > 1
        for overrides in runs:
            resolve(apply(config, overrides))
    with pytest.raises(ValueError, match="has no sweep_nothing"):
        load_sweep(RECIPE, "nothing")


def test_sweeps_combine_and_refuse_to_set_a_key_twice():
    assert len(list(product(arms("seed", range(3)), arms("objective.rate", [0.1, 0.2])))) == 6
    with pytest.raises(ValueError, match="'seed' is set twice"):
        list(product(arms("seed", [0]), arms("seed", [1])))
    with pytest.raises(ValueError):
        list(zipit(arms("seed", [0]), arms("train.steps", [1, 2])))


def test_a_sweep_over_an_unknown_key_is_refused():
    config, _ = load_config([f"--config={RECIPE}"])
    with pytest.raises(ValueError, match="optimizer.lr"):
        apply(config, {"optimizer.lr": 1e-3})
