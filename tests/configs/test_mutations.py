"""What is written by hand is either refused in one line that names the field, or it builds."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

from maskformer import models
from maskformer.training import load_config, resolve
from maskformer.training.experiment import ExperimentConfig, plain, vocabulary_to_be
from maskformer.training.optimizer import create_optimizer, create_schedule
from tests.configs.mutations import Mutation, flags, mutations

LONGEST_LINE = 800
seen: set[str] = set()


def refusal(mutation: Mutation) -> str | None:
    """The text of the refusal; None where it was accepted, and then it builds."""
    try:
        config = mutation.config or load_config([*flags(mutation.recipe), mutation.flag])[0]
        experiment = resolve(config)
    except ValueError as error:
        return str(error)
    json.dumps(plain(config))
    jax.random.key(experiment.seed), jax.random.key(experiment.evaluation.seed)
    build_network(experiment)
    build_optimizer(experiment)
    return None


def is_new(*decides) -> bool:
    """Whether nothing was built from the same before: most accepted mistakes change little."""
    text = json.dumps(plain(decides), default=vars)
    new = text not in seen
    seen.add(text)
    return new


def build_network(experiment: ExperimentConfig) -> None:
    """Objectives, model, parameters and a forward pass, on shapes alone."""
    vocabulary, length = vocabulary_to_be(experiment.data), experiment.data.length
    changes, steps = experiment.evaluation.objective, experiment.train.steps
    if not is_new(vars(vocabulary), length, experiment.objective, changes, steps, experiment.model):
        return
    model = models.create(experiment.create_model_config(experiment.create_objective(vocabulary)))
    key = jax.random.key(0)
    params = jax.eval_shape(model.init, key)
    rows, one = jax.ShapeDtypeStruct((2, length), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    batch = {"tokens": rows, "segment_ids": rows, "positions": rows, "example_id": one, "epoch": one}
    batch["word_starts"] = jax.ShapeDtypeStruct(rows.shape, bool)
    batch["select_weights"] = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
    for changed in (True, False) if changes else (False,):
        objective = experiment.create_objective(vocabulary, **(changes if changed else {}))
        assert objective.budget > 0

        def predict(params, batch, step, objective=objective):
            corrupted = objective(key, batch, step=step)
            return model.apply(
                params,
                corrupted.input_tokens,
                positions=corrupted.positions,
                mask=objective.attend(corrupted),
                predict_positions=corrupted.predict_positions,
                segment_ids=corrupted.segment_ids,
            )

        jax.eval_shape(predict, params, batch, jax.ShapeDtypeStruct((), jnp.int32))


@functools.cache
def a_model() -> models.Model:
    return models.create(models.EncoderConfig(vocab_size=50, layers=2, width=16, heads=2))


def build_optimizer(experiment: ExperimentConfig) -> None:
    """Schedule, optimizer and an update, on shapes alone."""
    if not is_new(dataclasses.asdict(experiment.optimizer), experiment.train.steps):
        return
    schedule = create_schedule(experiment.optimizer, experiment.train.steps)
    shapes = a_model().param_shapes()
    optimizer = create_optimizer(experiment.optimizer, schedule, a_model().logical_axes())
    jax.eval_shape(optimizer.update, shapes, jax.eval_shape(optimizer.init, shapes), shapes)
    assert jnp.isfinite(schedule(experiment.train.steps - 1))


def check(seed: int, count: int) -> None:
    refused = 0
    for number, mutation in enumerate(mutations(seed, count)):
        told = f"mutation {number} of seed {seed}: {mutation.recipe} with {mutation.key}={str(mutation.value)[:200]!r}"
        try:
            line = refusal(mutation)
        except Exception as error:
            raise AssertionError(f"{told}: {type(error).__name__}") from error
        if line is None:
            continue
        refused += 1
        assert line.isprintable() and len(line) < LONGEST_LINE, f"{told}: {line!r}"
        named = [part for part in mutation.key.split(".") if not part.isdecimal()]
        assert any(name in line for name in named[-2:]), f"{told}: {line!r}"
    assert 0.5 * count < refused < count


def test_a_mistake_is_refused_in_one_line_that_names_it_or_builds():
    check(0, 300)


@pytest.mark.slow
def test_five_thousand_mistakes_are_refused_in_one_line_or_build():
    check(1, 5000)
