"""Tiny runs with random weights: a masked, a diffusion and a causal language model of the same text."""

import jax
import pytest

from maskformer import data, models
from maskformer.training import objectives_section, resolve, runs, sharding
from tests.training.tiny import tiny_config, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("evaluated") / "text")


@pytest.fixture(scope="session")
def load(corpus):
    """The run of an objective on so many devices; nothing is trained, so that only evaluation takes time."""

    def on(name, devices=1, **overrides):
        config = tiny_config(corpus, mesh__data=devices)
        config.objective = objectives_section(name)
        for key, value in overrides.items():
            section, _, field = key.partition("__")
            config[section][field] = value
        experiment = resolve(config)
        tokenizer = data.load_tokenizer(experiment.data)
        model = models.create(experiment.create_model_config(tokenizer.vocabulary))
        size = devices * experiment.mesh.context
        mesh = sharding.create_mesh(experiment.mesh, jax.devices()[:size])
        rules, _ = sharding.create_rules(mesh, model.config)
        params_at = sharding.param_shardings(mesh, model.logical_axes(), rules)
        # Larger than a fresh model's, so that what it says depends on what it reads.
        params = jax.tree.map(lambda leaf: 2.0 * leaf, model.init(jax.random.key(0)))
        return runs.Run(experiment, tokenizer, model, mesh, rules, jax.device_put(params, params_at), params_at, 0)

    return on
