"""A run small enough for a test: two layers of width 32 on a page of made-up English."""

from __future__ import annotations

import pathlib

import numpy as np

from maskformer.training import default_config
from maskformer.training.sweeps import apply
from maskformer.training.writers import TIMING_FIELDS, read_metrics

SUBJECTS = "the lady|her sister|a clergyman|the colonel|my aunt|his friend|the captain|an old servant".split("|")
VERBS = "admired|visited|remembered|avoided|wrote to|spoke of|laughed at|waited for".split("|")
OBJECTS = "the garden|a letter|the ball|every neighbour|the parsonage|a fortune|the carriage|no one".split("|")


def write_corpus(folder: pathlib.Path, documents: int = 24) -> pathlib.Path:
    """Text files of simple sentences, the same each time."""
    generator = np.random.default_rng(0)
    for split, count in (("train", documents), ("validation", 4), ("test", 4)):
        (folder / split).mkdir(parents=True)
        for document in range(count):
            sentences = [
                f"{generator.choice(SUBJECTS)} {generator.choice(VERBS)} {generator.choice(OBJECTS)}."
                for _ in range(generator.integers(6, 14))
            ]
            (folder / split / f"{document:02d}.txt").write_text(" ".join(sentences))
    return folder


def tiny_config(corpus: pathlib.Path, **overrides):
    """A config of 12 steps; `overrides` are dotted keys with `__` for the dots."""
    config = default_config()
    config.data.name = str(corpus)
    config.data.length = 32
    config.data.vocabulary_size = 200
    config.data.segment_by = "sentence"
    config.model.layers, config.model.width, config.model.heads = 2, 32, 2
    config.objective.rate = 0.2
    config.train.steps, config.train.batch_size, config.train.log_every = 12, 8, 3
    config.evaluation.every, config.evaluation.batch_size = 6, 8
    # A schedule that does not look at the run's length, so that shorter runs are the beginning of longer ones.
    config.optimizer.schedule = "constant"
    config.checkpoint.every = 4
    config.mesh.data = 1
    config.writers.progress = config.writers.tensorboard = False
    return apply(config, {key.replace("__", "."): value for key, value in overrides.items()})


def metric_lines(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the machine's speed."""
    return [
        {name: value for name, value in line.items() if name.removeprefix("train/") not in TIMING_FIELDS}
        for line in read_metrics(workdir / "metrics.jsonl")
    ]
