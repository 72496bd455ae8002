"""A program needs no device until it is placed, and is lowered from shapes alone to the step that the loop runs."""

import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np

from maskformer.training import Program, sharding
from maskformer.training.step import masking_key
from tests.training.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
WITHOUT_DEVICE = """
import sys
from maskformer.training import Program
from tests.training.tiny import tiny_config
program = Program.of(tiny_config(sys.argv[1]))
program.prepare_data()
print(len(program.dataset("train")) > 0, program.task.flops_per_token > 0)
print(program.unigram.shape == (program.vocabulary.size,))
print(program.state_shapes.params["embeddings"]["tokens"]["embedding"].shape[1])
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""


def test_all_of_a_program_but_its_place_is_made_without_a_device(corpus):
    environment = {**os.environ, "JAX_PLATFORMS": "nonesuch", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEVICE, str(corpus)], env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["True True", "True", "32", "False"], done.stderr[-2000:]


def test_the_step_lowered_from_shapes_is_the_one_that_runs(corpus, devices):
    devices(8)
    placed = Program.of(tiny_config(corpus, mesh__data=2, mesh__fsdp=4)).on()
    compiled = placed.lower_train().compile()
    assert compiled.memory_analysis().argument_size_in_bytes > 0
    state, batch = placed.init(), next(iter(placed.train_batches(0)))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), placed.state
    )
    # Called as it was compiled: other shapes, types or places would be refused.
    after = compiled(state, batch)
    assert int(after.step) == 1


def test_every_part_is_made_once(corpus):
    program = Program.of(tiny_config(corpus))
    assert program.task is program.task and program.objective is program.task.objective
    assert program.model is program.task.model and program.dataset("train") is program.dataset("train")
    assert (masking_key(0) == program.masking_key).all()


def test_an_evaluation_is_made_and_compiled_once_for_each_change_of_the_objective(corpus, devices):
    placed = Program.of(tiny_config(corpus)).on()
    assert placed.evaluation({"rate": 0.3}) is placed.evaluation({"rate": 0.3})
    assert placed.evaluation() is placed.evaluation({}) and placed.evaluation() is not placed.evaluation({"rate": 0.3})


def test_a_process_needs_the_rows_of_its_own_devices_wherever_they_stand(monkeypatch):
    """Four shards of rows over two processes whose devices alternate along the wiring, two devices a shard."""
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: None)
    devices = np.array([types.SimpleNamespace(process_index=p) for p in (0, 0, 1, 1, 0, 0, 0, 1)], object)
    mesh = types.SimpleNamespace(
        shape={"data": 2, "fsdp": 2, "expert": 1},
        devices=devices.reshape(2, 2, 1, 2),
        axis_names=("data", "fsdp", "expert", "tensor"),
    )
    assert sharding.place_batch(mesh, 8, process=0).rows.tolist() == [0, 1, 4, 5, 6, 7]
    assert sharding.place_batch(mesh, 8, process=1).rows.tolist() == [2, 3, 6, 7]
