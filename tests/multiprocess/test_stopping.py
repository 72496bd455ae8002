"""SIGTERM to one of the processes at a chosen moment: all stop at one place, and the run goes on to the same bits."""

import os
import subprocess
import sys

import pytest

from launch.local import environment, free_port
from maskformer.training.checkpoints import checkpoint_steps
from tests.training.tiny import metric_lines, write_corpus

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

# The last process sends the signal to itself: as the step is made, as the second batch of an evaluation is placed
# (after two steps), or as a checkpoint is written.
TRAIN = """
import os, signal, sys, time
from maskformer.training.preemption import PreemptionGuard
with PreemptionGuard(ends_process=True):
    from maskformer.training import Preempted, checkpoints, distributed, program, tasks, train_and_evaluate
    distributed.initialize()
    import jax
    from tests.training.tiny import tiny_config
    corpus, workdir, moment = sys.argv[1:]

    def signalled(function, call, pause=3.0):
        calls = []
        def calling(*arguments, **options):
            calls.append(1)
            if len(calls) == call and jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if len(calls) >= call:
                time.sleep(pause)  # JAX's service takes a second or two to tell the others
            return function(*arguments, **options)
        return calling

    if moment == "compilation":
        program.create_train_step = signalled(program.create_train_step, 1, 0.0)
    elif moment == "evaluation":
        program.sharding.to_global = signalled(program.sharding.to_global, 4)
    elif moment == "save":
        checkpoints.Checkpoints.save = signalled(checkpoints.Checkpoints.save, 1)
    config = tiny_config(
        corpus, train__steps=6, train__log_every=2, evaluation__every=2, evaluation__batch_size=2, checkpoint__every=2,
        mesh__data=-1,
    )
    try:
        train_and_evaluate(config, workdir)
    except Preempted as stop:
        print(stop)
        sys.exit(stop.exit_code)
"""


def train(processes, corpus, workdir, moment):
    """The exit codes of a run's processes."""
    port, children = free_port(), []
    for index in range(processes):
        # Gloo gives up when one process compiles for half a minute longer than another: none gets a cache.
        quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
        env = environment(index, processes, port) | {"PYTHONPATH": os.getcwd()} | quick
        log = workdir.parent / f"{workdir.name}-{index}.log"
        with log.open("a") as out:
            command = [sys.executable, "-c", TRAIN, str(corpus), str(workdir), moment]
            children.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
    try:
        if moment == "compilation":
            return [children[-1].wait(180)]  # the launcher ends those that wait for it
        return [child.wait(180) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sigterm_at_any_moment_is_honoured_and_the_run_ends_with_the_same_bits(processes, corpus, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(processes, corpus, whole, "none") == [0] * processes
    lines = metric_lines(whole)
    # Of each step that is evaluated there are two lines; a stopped evaluation has none.
    for moment, saved, written in (("compilation", [], 0), ("evaluation", [2], 1), ("save", [2, 4], 4)):
        codes = train(processes, corpus, run, moment)
        assert set(codes) == {75}, [log.read_text()[-2000:] for log in tmp_path.glob("run-*.log")]
        assert checkpoint_steps(run / "checkpoints") == saved
        assert written == 0 or metric_lines(run) == lines[:written]
    assert train(processes, corpus, run, "none") == [0] * processes
    assert metric_lines(run) == lines
