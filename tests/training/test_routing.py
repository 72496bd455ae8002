"""Runs with experts: the same numbers on any mesh and in any number of parts, told in every line, learning."""

import jax
import numpy as np
import pytest

from maskformer.training import Program, resolve, sharding, tasks, train_and_evaluate
from maskformer.training.sections import MeshConfig
from tests.training.test_slices import two_slices
from tests.training.tiny import metric_lines, tiny_config

EXPERTS = dict(
    model__experts=4, model__moe_period=2, model__mlp_width=32, model__balance_loss=0.1, model__hidden_dropout=0.0,
    model__attention_dropout=0.0, optimizer__learning_rate=3e-3,
)
MESH = dict(mesh__data=2, mesh__expert=2, mesh__tensor=2)


@pytest.fixture(scope="module")
def reference(corpus, first_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference")
    with first_device():
        train_and_evaluate(tiny_config(corpus, **EXPERTS), workdir)
    return metric_lines(workdir)


def close(lines, expected, rel=1e-3):
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected):
        for name in line:
            assert line[name] == pytest.approx(other[name], rel=rel, abs=1e-4), (line["step"], name)


def test_every_line_tells_of_the_routers_and_the_model_learns(reference):
    train = [line for line in reference if "train/loss" in line]
    assert train[-1]["train/loss"] < train[0]["train/loss"] - 0.3
    for line in train:
        assert 1 <= line["train/expert_load"] <= 2 and 0.99 < line["train/balance_loss"] <= 2
        # One layer with experts: the factors are those of the config.
        joint = line["train/loss"] + 0.1 * line["train/balance_loss"] + 0.001 * line["train/router_z_loss"]
        assert line["train/joint_loss"] == pytest.approx(joint, rel=0.02)
        assert "train/dropped" not in line
    evaluated = [line for line in reference if "validation/loss" in line]
    assert {"validation/balance_loss", "validation/expert_load", "validation/router_z_loss"} <= evaluated[-1].keys()


def test_eight_devices_in_two_parts_and_then_one_device_give_the_numbers_of_one(reference, corpus, devices, tmp_path):
    devices(8)
    # Steps that both runs evaluate at.
    train_and_evaluate(tiny_config(corpus, **EXPERTS, **MESH, train__accumulation_steps=2, train__steps=6), tmp_path)
    devices(1)
    train_and_evaluate(tiny_config(corpus, **EXPERTS), tmp_path)
    close(metric_lines(tmp_path), reference)


def placed(corpus, mesh, **changes):
    changes = {
        **EXPERTS, "optimizer__name": "sgd", "optimizer__momentum": 0.0, "optimizer__clip_norm": None,
        "optimizer__weight_decay": 0.0, "model__balance_loss": 1.0, "evaluation__every": 0, **changes,
    }
    return Program.of(tiny_config(corpus, **changes)).on(mesh)


def test_one_step_is_the_same_in_parts_and_over_slices(corpus, quick_compilation):
    """A batch of uneven parts: the balance of each of them alone is another than that of the whole."""
    alone = sharding.create_mesh(MeshConfig(data=1), jax.devices()[:1])
    places = {
        "whole": placed(corpus, alone, model__expert_capacity=0.8),
        "parts": placed(corpus, alone, model__expert_capacity=0.8, train__accumulation_steps=4),
        "slices": placed(corpus, two_slices(), model__expert_capacity=0.8),
    }
    after = {}
    for name, program in places.items():
        state = program.init()
        before = jax.device_get(state.params)
        state = program.train_step(state, next(iter(program.train_batches(0))))
        change = jax.tree.map(np.subtract, jax.device_get(state.params), before)
        after[name] = change, state.window.means()
    change, metrics = after.pop("whole")
    assert metrics["balance_loss"] > 1 and metrics["dropped"] > 0
    for name, (other, told) in after.items():
        for metric, value in metrics.items():
            # Between slices gradients are bfloat16.
            rel = 2**-7 if name == "slices" and metric == "grad_norm" else 1e-5
            assert told[metric] == pytest.approx(value, rel=rel), (name, metric)
        for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(change), strict=True):
            atol = (2**-7 if name == "slices" else 1e-5) * np.abs(theirs).max() + 1e-8
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def test_an_evaluation_tells_of_the_whole_split_whatever_the_batches(corpus, quick_compilation):
    alone = sharding.create_mesh(MeshConfig(data=1), jax.devices()[:1])
    every = [
        placed(corpus, alone, model__expert_capacity=0.8, evaluation__every=6, evaluation__batch_size=rows)
        for rows in (8, 2)
    ]
    params = every[0].init().params
    whole, parts = (program.evaluate(params) for program in every)
    assert {"balance_loss", "expert_load", "router_z_loss", "dropped"} <= whole.keys()
    assert parts == pytest.approx(whole, rel=1e-5)
    said = every[0].program.task.describe({"loss": 2.0, "accuracy": 0.5, "expert_load": 1.3, "dropped": 0.0213})
    assert said == "loss 2.0000 acc 50.00% load 1.30 dropped 2.1%"


def test_a_task_without_terms_for_routers_is_refused(corpus, monkeypatch):
    class Silent(tasks.Task):
        pass

    monkeypatch.setitem(tasks.BUILDERS, "silent", lambda objective, config: Silent(objective, None))
    config = tiny_config(corpus, **EXPERTS)
    with config.unlocked():
        config.task = {"name": "silent"}
    with pytest.raises(ValueError, match="model.experts=4: task 'silent' has no terms for their routers"):
        resolve(config)


def test_a_recipe_takes_experts_as_an_option():
    from configs import gpt

    experiment = resolve(gpt.get_config("demo,experts=8"))
    assert experiment.model["experts"] == 8 and not resolve(gpt.get_config("demo")).model["experts"]


def test_a_pipeline_carries_what_routers_say(corpus, quick_compilation):
    """Microbatches in stages: statistics are those of the batch, and so are balance and gradients."""
    shape = dict(model__layers=4, model__expert_capacity=0.8)
    after = []
    for sizes in (dict(data=1), dict(stage=2, data=1, expert=2)):
        mesh = sharding.create_mesh(MeshConfig(**sizes), jax.devices()[: 2 * len(sizes) - 2 or 1])
        program = placed(corpus, mesh, **shape)
        state = program.init()
        before = jax.device_get(state.params)
        state = program.train_step(state, next(iter(program.train_batches(0))))
        after.append((jax.tree.map(np.subtract, jax.device_get(state.params), before), state.window.means()))
    (change, metrics), (other, told) = after
    assert metrics["balance_loss"] > 1 and told == pytest.approx(metrics, rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(change), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max() + 1e-7)
