"""Tiny runs with random weights: a masked, a diffusion and a causal language model of the same text."""

import jax
import pytest

from maskformer.training import Program, objectives_section, resolve, runs, sharding
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
        size = devices * experiment.mesh.context
        placed = Program(experiment).on(sharding.create_mesh(experiment.mesh, jax.devices()[:size]))
        # Larger than a fresh model's, so that what it says depends on what it reads.
        params = jax.tree.map(lambda leaf: 2.0 * leaf, placed.program.model.init(jax.random.key(0)))
        return runs.Run(placed, jax.device_put(params, placed.params_at), 0)

    return on
