"""Two processes that train together in a bucket, against a real server: killed in the middle of a save, and resumed."""

import signal
import subprocess
import sys
import time

import pytest

from launch.local import environment, free_port
from maskformer import paths
from maskformer.training.workdir import checkpoint_steps, unfinished_steps
from tests.emulator import contents
from tests.multiprocess.conftest import ROOT
from tests.training.tiny import metric_lines, write_corpus

pytestmark = pytest.mark.multiprocess

SAVE = """
import os, signal, sys
sys.path.insert(0, ".")
from maskformer.training import checkpoints, distributed
distributed.initialize()
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from maskformer import paths
from maskformer.training.checkpoints import Checkpoints, RunRecord
from maskformer.training.sections import CheckpointConfig, EvaluationConfig

run, steps, killed = paths.resolve(sys.argv[1]), sys.argv[2], sys.argv[3]
write = checkpoints.write_checksums
def kill(folder, step):
    if str(step) == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, step)
checkpoints.write_checksums = kill
split = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
values = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
shape = {"weight": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=split)}
made = Checkpoints(run, CheckpointConfig(keep=3), EvaluationConfig())
restored = made.restore_latest(shape)
if restored is not None:
    state, record = restored
    for shard in state["weight"].addressable_shards:
        np.testing.assert_array_equal(shard.data, record.next_example * values[shard.index])
    assert killed == "" and record.next_example == 2
for step in map(int, steps.split(",")):
    scaled = jax.make_array_from_callback(values.shape, split, lambda index: step * values[index])
    made.save(step, {"weight": scaled}, RunRecord(next_example=step), None)
made.close()
"""

TRAIN = """
import os, signal, sys, time
sys.path.insert(0, ".")
from maskformer.training import checkpoints, distributed, train_and_evaluate
distributed.initialize()
from tests.training.tiny import tiny_config
corpus, workdir, killed = sys.argv[1:]
write = checkpoints.write_checksums
def kill(folder, step):
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, step)
if killed == "killed":
    checkpoints.write_checksums = kill
train_and_evaluate(tiny_config(corpus, mesh__data=2, train__steps=10, evaluation__every=0), workdir)
"""


def together(source, *arguments):
    """The exit codes of two processes with a device each; where one dies, the other is killed with it."""
    port = free_port()
    command = [sys.executable, "-c", source, *map(str, arguments)]
    # Each program runs a few times.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    made = [subprocess.Popen(command, env=environment(index, 2, port, 1) | quick, cwd=ROOT) for index in range(2)]
    deadline = time.monotonic() + 300
    while any(process.poll() is None for process in made) and time.monotonic() < deadline:
        if any(process.poll() not in (None, 0) for process in made):
            break
        time.sleep(0.1)
    for process in made:
        process.kill()
        process.wait()
    return [process.returncode for process in made]


def test_what_two_processes_were_saving_when_they_were_killed_gives_way_to_what_they_had_saved(emulator, bucket):
    run = paths.resolve(f"{bucket}/run")
    assert together(SAVE, run, "1,2,3", "3")[0] == -signal.SIGKILL
    # Both processes' arrays are there, and the mark is not.
    held = contents(emulator, bucket[5:])
    assert {f"ocdbt.process_{index}" for index in range(2)} <= {
        part for name in held if name.startswith("run/checkpoints/3/") for part in name.split("/")
    }
    assert checkpoint_steps(run / "checkpoints") == [1, 2] and unfinished_steps(run / "checkpoints") == [3]
    assert together(SAVE, run, "3", "") == [0, 0]
    assert checkpoint_steps(run / "checkpoints") == [1, 2, 3]


@pytest.mark.slow
def test_two_processes_killed_in_the_middle_of_a_save_end_as_they_would_have(emulator, bucket, tmp_path):
    corpus = write_corpus(tmp_path / "text")
    run = paths.resolve(f"{bucket}/run")
    assert together(TRAIN, corpus, tmp_path / "undisturbed", "") == [0, 0]
    assert together(TRAIN, corpus, run, "killed")[0] == -signal.SIGKILL
    assert checkpoint_steps(run / "checkpoints") == [4] and unfinished_steps(run / "checkpoints") == [8]
    assert together(TRAIN, corpus, run, "") == [0, 0]
    assert metric_lines(run) == metric_lines(tmp_path / "undisturbed")
    assert max(checkpoint_steps(run / "checkpoints")) == 10 and not unfinished_steps(run / "checkpoints")
