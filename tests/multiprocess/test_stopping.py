"""SIGTERM to one of the processes at a chosen moment: all stop at one place, and the run goes on to the same bits."""

import os
import subprocess
import sys

import pytest

from launch.local import environment, free_port
from maskformer.training.checkpoints import checkpoint_steps
from tests.training.tiny import metric_lines, write_corpus

pytestmark = pytest.mark.multiprocess

# The last process sends the signal to itself: while the step is traced, as a batch of the first evaluation is placed,
# or as the first checkpoint is written.
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
        corpus, train__steps=4, train__log_every=2, evaluation__every=2, evaluation__batch_size=2, checkpoint__every=2,
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
        # Less optimisation: gloo gives up when one process compiles for half a minute longer than the other.
        env = environment(index, processes, port) | {"PYTHONPATH": os.getcwd(), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
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


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(request, corpus, tmp_path_factory):
    """The number of processes, and what an undisturbed run of so many writes."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(request.param, corpus, workdir, "none") == [0] * request.param
    return request.param, metric_lines(workdir)


@pytest.mark.parametrize(("moment", "saved"), [("compilation", []), ("evaluation", [2]), ("save", [2])])
def test_a_sigterm_is_honoured_and_the_run_goes_on_to_the_same_bits(undisturbed, moment, saved, corpus, tmp_path):
    processes, lines = undisturbed
    workdir = tmp_path / "run"
    codes = train(processes, corpus, workdir, moment)
    assert set(codes) == {75}, [log.read_text()[-2000:] for log in tmp_path.glob("*.log")]
    assert checkpoint_steps(workdir / "checkpoints") == saved
    if saved:
        assert metric_lines(workdir) == lines[: 2 if moment == "save" else 1]
    assert train(processes, corpus, workdir, "none") == [0] * processes
    assert metric_lines(workdir) == lines
