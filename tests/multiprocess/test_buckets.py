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

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

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
train_and_evaluate(tiny_config(corpus, mesh__fsdp=2, train__steps=10, evaluation__every=0), workdir)
"""


def train(corpus, workdir, killed=""):
    """The exit codes of two processes with a device each; where one dies, the other is killed with it."""
    port = free_port()
    command = [sys.executable, "-c", TRAIN, str(corpus), str(workdir), killed]
    made = [subprocess.Popen(command, env=environment(index, 2, port, 1), cwd=ROOT) for index in range(2)]
    deadline = time.monotonic() + 300
    while any(process.poll() is None for process in made) and time.monotonic() < deadline:
        if any(process.poll() not in (None, 0) for process in made):
            break
        time.sleep(0.1)
    for process in made:
        process.kill()
        process.wait()
    return [process.returncode for process in made]


def test_two_processes_killed_in_the_middle_of_a_save_end_as_they_would_have(emulator, bucket, tmp_path):
    corpus = write_corpus(tmp_path / "text")
    run = paths.resolve(f"{bucket}/run")
    assert train(corpus, tmp_path / "undisturbed") == [0, 0]
    assert train(corpus, run, "killed")[0] == -signal.SIGKILL
    # Both processes' arrays are there, and the mark is not.
    held = contents(emulator, bucket[5:])
    assert {f"ocdbt.process_{index}" for index in range(2)} <= {
        part for name in held if name.startswith("run/checkpoints/8/") for part in name.split("/")
    }
    assert checkpoint_steps(run / "checkpoints") == [4] and unfinished_steps(run / "checkpoints") == [8]
    assert train(corpus, run) == [0, 0]
    assert metric_lines(run) == metric_lines(tmp_path / "undisturbed")
    assert max(checkpoint_steps(run / "checkpoints")) == 10 and not unfinished_steps(run / "checkpoints")
