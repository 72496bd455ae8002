"""A run loses a machine, goes on without it, and gets it back: each example once, and the same losses."""

import collections
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.training.tiny import metric_lines, write_corpus

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

# Each process writes which examples it takes for which step, and when. Two of them end themselves, once each.
TRAIN = """
import json, os, pathlib, signal, sys, time
from maskformer.training import distributed, train_and_evaluate
from maskformer.data import PackedDataset
distributed.initialize()
import jax
from tests.training.tiny import tiny_config
corpus, workdir = sys.argv[1:]
start = os.environ.get("JAX_COORDINATOR_ADDRESS", ":0").rpartition(":")[2]  # a port of its own for each start
batches = PackedDataset.train_batches
def recorded(self, size, *arguments, start_example, **options):
    step = start_example // size
    for batch in batches(self, size, *arguments, start_example=start_example, **options):
        step += 1
        killed = pathlib.Path(f"{workdir}-killed-at-{step}")
        if (jax.process_count(), jax.process_index(), step) in ((3, 1, 5), (2, 0, 8)) and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"{workdir}-examples-{start}-{jax.process_index()}", "a") as file:
            taken = [time.time(), step, batch["epoch"].tolist(), batch["example_id"].tolist()]
            file.write(json.dumps(taken) + "\\n")
        yield batch
PackedDataset.train_batches = recorded
train_and_evaluate(tiny_config(
    corpus, mesh__data=-1, train__batch_size=12, train__rows_per_device=2, evaluation__batch_size=6, train__steps=10,
    train__log_every=1, checkpoint__every=2, evaluation__every=5, model__hidden_dropout=0.0,
    model__attention_dropout=0.0,
), workdir)
"""


def train(processes, corpus, workdir):
    """The run under the launcher, with so many processes at each start, and what was printed."""
    command = [sys.executable, "-c", TRAIN, str(corpus), str(workdir)]
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", f"--processes={processes}", "--max-restarts=2", "--", *command],
        # Gloo gives up when one process compiles for half a minute longer than another, as where only one has a cache.
        env=os.environ | {
            "PYTHONPATH": os.getcwd(), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_ENABLE_COMPILATION_CACHE": "0",
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def examples(workdir):
    """Step -> how often each example (epoch, id) was taken for it, by the last start that came so far."""
    starts = collections.defaultdict(list)
    for path in workdir.parent.glob(f"{workdir.name}-examples-*"):
        starts[path.name.split("-")[2]] += [json.loads(line) for line in path.read_text().splitlines()]
    kept = {}
    for lines in sorted(starts.values(), key=min):
        taken = collections.defaultdict(collections.Counter)
        for _, step, epochs, ids in lines:
            taken[step].update(zip(epochs, ids, strict=True))
        # What a run does after its checkpoint takes the place of what was done before.
        kept = {step: found for step, found in kept.items() if step < min(taken)} | taken
    return len(starts), kept


def test_three_processes_then_two_then_three_see_each_example_once_and_lose_what_one_process_does(tmp_path):
    corpus, whole, run = write_corpus(tmp_path / "text"), tmp_path / "whole", tmp_path / "run"
    train("1", corpus, whole)
    said = train("3,2,3", corpus, run)
    assert "exit code 137 (failure 1 of at most 2)" in said and "exit code 137 (failure 2 of at most 2)" in said

    (starts, taken), (_, expected) = examples(run), examples(whole)
    assert starts == 3 and sorted(taken) == list(range(1, 11)) and taken == expected
    everything = sum(taken.values(), collections.Counter())
    assert sum(everything.values()) == 120 and set(everything.values()) == {1}
    lines, expected = metric_lines(run), metric_lines(whole)
    assert [sorted(line) for line in lines] == [sorted(line) for line in expected]
    for line, other in zip(lines, expected, strict=True):
        np.testing.assert_allclose(list(line.values()), [other[name] for name in line], rtol=2e-4, atol=2e-5)
