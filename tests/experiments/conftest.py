"""Cards small enough for a test: by tiny runs, or by none at all."""

import dataclasses
import json
import types

import jax
import pytest

from experiments import running, trained
from maskformer.training import sharding
from maskformer.training.config import plain
from tests.training.tiny import tiny_config, write_corpus


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Makes a card's runs tiny, on a page of text."""
    corpus = write_corpus(tmp_path / "text")
    # One device: what eight do is tested elsewhere, and compiles far longer.
    create_mesh = sharding.create_mesh
    monkeypatch.setattr(sharding, "create_mesh", lambda config: create_mesh(config, jax.devices()[:1]))

    def shrink(card):
        def tiny_card(*arguments):
            config = card.config(*arguments)
            tiny = tiny_config(corpus)
            for key in ("name", "vocabulary_size", "length", "segment_by"):
                config.data[key] = tiny.data[key]
            config.data.max_rows = 8 if config.data.max_rows else None
            config.model.layers, config.model.width, config.model.heads = 2, 16, 2
            config.train.batch_size = config.evaluation.batch_size = 8
            config.evaluation.max_batches = 1
            return config

        return dataclasses.replace(card, config=tiny_card)

    return shrink


@pytest.fixture
def trainings(monkeypatch):
    """Nothing is trained or evaluated; lists the folders of the runs that would have been.

    A run's loss falls with its masking rate, by a little less or more for each seed.
    """
    folders = []

    def train(config, folder):
        folders.append(folder.name)
        (folder / "checkpoints" / str(config.train.steps)).mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(plain(config)))

    def load(folder, checkpoint):
        config = json.loads((folder / "config.json").read_text())
        loss = 3.0 - config["objective"]["rate"] + 0.1 * config["seed"] ** 2 * config["objective"]["rate"]

        def measure(name, split, max_batches, rate):
            assert (name, split, rate, checkpoint) == ("loss", "test", 0.15, "latest")
            return {"loss": loss, "accuracy": 1 / loss, "perplexity": 10.0}

        return types.SimpleNamespace(measure=measure)

    monkeypatch.setattr(running, "train_and_evaluate", train)
    monkeypatch.setattr(trained.runs, "load", load)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    return folders
