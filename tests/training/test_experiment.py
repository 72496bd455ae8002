"""Every mistake in a config is one line that names the field, the value and the way out, before any device starts."""

import json
import pathlib

import jax
import numpy as np
import pytest

from maskformer.objectives import Vocabulary
from maskformer.training import default_config, load_config, parse_arg, resolve
from maskformer.training.experiment import plain
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
        ("--config.optimizer.b1=0.99999999", ["optimizer.b1=0.99999999", "at most 0.99999994"]),
        ("--config.optimizer.b2=0.9999999999", ["optimizer.b2=0.9999999999", "at most 0.99999994"]),
        ("--config.optimizer.momentum=0.99999999", ["optimizer.momentum=0.99999999", "at most 0.99999994"]),
        ("--config.optimizer.ema_decay=0.99999999", ["optimizer.ema_decay=0.99999999", "at most 0.99999994"]),
        ("--config.train.accumulation_steps=3", ["accumulation_steps=3", "divisor", "32"]),
        ("--config.mesh.fsdp=0", ["mesh.fsdp=0", "at least 1"]),
        ("--config.mesh.fsdp=-1", ["mesh", "at most one axis of -1"]),
        ("--config.data.segment_by=sentense", ["segment_by", "sentence"]),
        ("--config.evaluation.patience=0", ["evaluation.patience=0", "at least 1"]),
        ("--config.optimizer.ema_decay=2.0", ["optimizer.ema_decay=2.0", "(0, 1)"]),
        ("--config.optimizer.learning_rate=1000000", ["optimizer.learning_rate=1000000", "below 1000"]),
        ("--config.optimizer.epsilon=2147483648", ["optimizer.epsilon=2147483648", "from 1e-30 to 1"]),
        ("--config.optimizer.clip_norm={[]:1}", ["optimizer.clip_norm='{[]:1}'", "expected float"]),
        ("--config.model.attention_implementation=50%", ["attention_implementation='50%'", "blockwise"]),
        ("--config.model.norm_epsilon=1e-50", ["model.norm_epsilon=1e-50", "1e-30"]),
        ("--config.model.param_dtype=float16", ["model.param_dtype='float16'", "use 'bfloat16'"]),
        ("--config.model.compute_dtype=float16", ["model.compute_dtype='float16'", "use 'bfloat16'"]),
        ("--config.model.output_dtype=float16", ["model.output_dtype='float16'", "use 'bfloat16'"]),
        ("--config.model.param_dtype=float64", ["model.param_dtype='float64'", "JAX_ENABLE_X64=1"]),
        ("--config.seed=-1", ["seed=-1", "at least 0"]),
        ("--config.seed=4294967296", ["seed=4294967296", "at most 4294967295"]),
        ("--config.evaluation.seed=1099511627776", ["evaluation.seed=1099511627776", "at most 4294967295"]),
        ("--config.evaluation.split=nope", ["evaluation.split='nope'", "train, validation, test"]),
        ("--config.evaluation.metric=los", ["evaluation.metric='los'", "did you mean 'loss'?"]),
        ("--config.evaluation.metric=token_loss", ["evaluation.metric='token_loss'", "perplexity", "'mlm'"]),
        ("--config.evaluation.objective=causal", ["evaluation.objective='causal'"]),
        ("--config.train=1.0", ["config.train=1.0", "a section"]),
        ("--config.train.init_from= ", ["train.init_from=' '", "workdir"]),
        ("--config.train.init_from=gz://bucket/run", ["train.init_from='gz://bucket/run'", "did you mean 'gs://'"]),
        ("--config.train.resume=gs:///run", ["train.resume='gs:///run'", "expected gs://BUCKET/FOLDER"]),
        ("--config.objective.rate=0", ["objective.rate=0", "above 0", "nothing is hidden or predicted"]),
        ("--confg.train.steps=3", ["confg", "no such flag"]),
    ],
)
def test_a_mistake_is_one_line_that_names_field_value_and_fix(flag, parts):
    message = error_of(flag)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("value", ["x" * 3000, "-" * 1000, "[" * 1000, "9" * 5000, "two\nlines", "[" * 90 + "]" * 90])
def test_a_value_is_shown_on_one_short_line_however_it_looks(value):
    for key in ("optimizer.clip_norm", "model.norm", "model.mask", "objective.compat", "data.tokenizer", "data.pack"):
        message = error_of(f"--config.{key}={value}")
        assert key in message and len(message) < 800 and message.isprintable()


@pytest.mark.parametrize(
    "key, value",
    [("checkpoint", [None]), ("train", 1.0), ("objective", "mlm"), ("model", None), ("data", []), ("mesh", "data")],
)
def test_a_section_that_is_none_is_named(key, value):
    config = {**plain(default_config()), key: value}
    with pytest.raises(ValueError, match=rf"^{key}=.*: expected a section"):
        resolve(config)


@pytest.mark.parametrize("value", [pathlib.Path("runs"), object(), b"adamw", {1, 2}, lambda step: 0.1])
def test_a_value_that_a_run_could_not_write_down_is_named(value):
    config = plain(default_config())
    config["objective"]["rate"] = value
    with pytest.raises(ValueError, match=r"^objective\.rate=.*: expected a number, a string, .*config\.json can hold"):
        resolve(config)


def test_numbers_and_arrays_of_numpy_are_those_of_json():
    config = plain(default_config())
    config["optimizer"]["learning_rate"], config["train"]["steps"] = np.float32(0.5), np.int64(7)
    config["objective"]["replacement"] = np.array([1.0, 0.0, 0.0])
    assert json.loads(json.dumps(plain(config)))["objective"]["replacement"] == [1.0, 0.0, 0.0]
    assert resolve(config).train.steps == 7 and resolve(config).optimizer.learning_rate == 0.5


def test_a_config_that_holds_itself_is_refused():
    config = plain(default_config())
    config["objective"]["rate"] = config
    with pytest.raises(ValueError, match="nested without end"):
        resolve(config)


@pytest.mark.parametrize(
    "recipe, flag, parts",
    [
        ("diffusion", "train.label_smoothing=0.1", ["train.label_smoothing=0.1", "0", "'diffusion'"]),
        ("diffusion", "evaluation.metric=perplexity", ["evaluation.metric='perplexity'", "token_loss", "'diffusion'"]),
        ("electra", "evaluation.metric=loss_random", ["evaluation.metric='loss_random'", "loss_keep"]),
        ("electra", "evaluation.metric=discriminator_los", ["did you mean 'discriminator_loss'"]),
        ("ul2", "data.sentinels=0", ["objective.mode_tokens['R']=", "data.sentinels=0", "raise it"]),
        ("ul2", "data.sentinels=12", ["sentinels", "data.sentinels=12", "raise it"]),
        ("fim", "data.sentinels=0", ["objective.prefix_token=8191", "data.sentinels=0", "raise it"]),
        ("swap", "objective.parts=[{'name': ['mlm']}]", ["objective.parts[0]: name=['mlm']"]),
        ("swap", "objective.parts=['mlm']", ["objective.parts[0]='mlm'", "a mapping such as"]),
        (
            "bert",
            "objective.rate={'schedule': 'step', 'values': {'0': 0.1, '1e5%': 0.1}}",
            ["objective.rate", "schedule at '1e5%'"],
        ),
    ],
)
def test_what_an_objective_refuses_is_known_before_any_device_starts(recipe, flag, parts):
    with pytest.raises(ValueError) as caught:
        resolve(load_config([f"--config=configs/{recipe}.py:tiny", f"--config.{flag}"])[0])
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_a_rate_that_rises_from_zero_trains_and_says_what_to_evaluate_at():
    rising = "--config.objective.rate={'schedule': 'linear', 'start': 0.0, 'end': 0.3, 'steps': '50%'}"
    config, _ = load_config([f"--config={RECIPE}", rising])
    assert resolve(config).create_objective(VOCABULARY).rate.maximum == 0.3
    assert "evaluation.objective.rate" in error_of(rising, "--config.evaluation.objective={}")
    assert "is 0 at every step" in error_of(rising.replace("0.3", "0.0"))


@pytest.mark.parametrize("metric", ["loss", "perplexity", "accuracy_mask", "unigram_loss"])
def test_a_metric_that_the_evaluation_gives_may_say_what_is_best(metric):
    config, _ = load_config([f"--config={RECIPE}", f"--config.evaluation.metric={metric}"])
    assert resolve(config).evaluation.metric == metric


def test_every_accepted_seed_has_masks_of_its_own():
    from maskformer.training.step import masking_key

    seeds = (0, 1, 2**31, 2**32 - 1)
    for seed in seeds:
        resolve({**plain(default_config()), "seed": seed})
    assert len({tuple(jax.random.key_data(masking_key(seed)).tolist()) for seed in seeds}) == len(seeds)


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
    experiment = resolve(config)
    model = experiment.create_model_config(experiment.create_objective(VOCABULARY))
    assert model.mask_pattern == ("causal & window(16)", "causal")
    assert "causl" in error_of("--config.model.mask=('causal', 'causl')")


def test_structure_arguments_are_checked_like_flags():
    with pytest.raises(ValueError, match="'tinyy': expected one of .*did you mean 'tiny'"):
        load_config(["--config=configs/bert.py:tinyy"])
    with pytest.raises(ValueError, match="seq='long': expected int"):
        parse_arg("seq=long", seq=128)


def test_every_size_of_the_bert_recipe_resolves():
    from configs import bert, shapes

    for size in shapes.BERT:
        resolve(bert.get_config(size))


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
