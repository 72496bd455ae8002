"""Whole runs in processes of their own: two that train together, one that is killed without warning."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from maskformer.training import EX_TEMPFAIL
from tests.training.tiny import metric_lines, write_corpus

pytestmark = pytest.mark.multiprocess

TRAIN = """
import sys
sys.path.insert(0, ".")
from maskformer.training import Preempted, distributed, train_and_evaluate
distributed.initialize()
from tests.training.tiny import tiny_config
corpus, workdir = sys.argv[1:3]
overrides = dict(argument.split("=") for argument in sys.argv[3:])
try:
    train_and_evaluate(tiny_config(corpus, **{key: int(value) for key, value in overrides.items()}), workdir)
except Preempted as stop:
    print(stop)
    sys.exit(75)
"""
ALONE = {"MASKFORMER_DISTRIBUTED": "off", "XLA_FLAGS": ""}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """The same run in one undisturbed process with one device."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    assert start(corpus, workdir).wait(180) == 0
    return metric_lines(workdir)


def start(corpus, workdir, **options):
    command = [sys.executable, "-c", TRAIN, str(corpus), str(workdir)]
    return subprocess.Popen(command, env={**os.environ, **ALONE}, stdout=subprocess.DEVNULL, **options)


def losses(lines):
    return np.array([line["train/loss"] for line in lines if "train/loss" in line])


def test_two_processes_train_as_one_and_their_checkpoint_continues_in_one(run_processes, reference, corpus, tmp_path):
    workdir = tmp_path / "run"
    run_processes(
        TRAIN,
        devices_per_process=2,
        arguments=[str(corpus), str(workdir), "mesh__data=2", "mesh__fsdp=2", "train__steps=12"],
    )
    lines = metric_lines(workdir)
    np.testing.assert_allclose(losses(lines), losses(reference), rtol=2e-4)
    evaluated = [line["validation/loss"] for line in lines if "validation/loss" in line]
    expected = [line["validation/loss"] for line in reference if "validation/loss" in line]
    np.testing.assert_allclose(evaluated, expected, rtol=2e-4)
    # What two processes saved, one reads: complete, so it only evaluates.
    assert start(corpus, workdir).wait(180) == 0
    assert metric_lines(workdir) == lines


@pytest.mark.parametrize("seconds_after_first_checkpoint", [0.0, 0.3])
def test_a_run_killed_with_sigkill_and_started_again_ends_with_the_same_bits(
    reference, corpus, tmp_path, seconds_after_first_checkpoint
):
    workdir = tmp_path / "run"
    process = start(corpus, workdir)
    # Where exactly the kill falls is left to chance: between checkpoints, in the middle of one, or after the end.
    deadline = time.monotonic() + 180
    while not list((workdir / "checkpoints").glob("4*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    time.sleep(seconds_after_first_checkpoint)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    assert start(corpus, workdir).wait(180) == 0
    assert metric_lines(workdir) == reference


def test_sigterm_exits_with_tempfail_and_the_same_command_completes_the_run(reference, corpus, tmp_path):
    workdir = tmp_path / "run"
    process = start(corpus, workdir)
    deadline = time.monotonic() + 180
    while not list((workdir / "checkpoints").glob("4*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) in (EX_TEMPFAIL, 0)  # 0 where the last step was faster than the signal
    assert start(corpus, workdir).wait(180) == 0
    assert metric_lines(workdir) == reference
