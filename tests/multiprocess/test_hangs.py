"""A process that hangs ends its run: every process says who is not there, and the slow one is named before."""

import json
import re

import pytest

from maskformer.training.events import read_events
from tests.training.tiny import write_corpus

pytestmark = pytest.mark.multiprocess

SOURCE = """
import sys, time
from maskformer.training import distributed; distributed.initialize()
import jax
from maskformer.training import hangs, hosts, phases, program, train_and_evaluate
from tests.training.tiny import tiny_config

hosts.EVERY, hangs.LEADER_WAITS = 0.2, 3.0
to_global, calls = program.sharding.to_global, []


def slow_and_then_stuck(batch, where):
    calls.append(1)
    if jax.process_index() == 1 and len(calls) > 1:
        time.sleep(0.3 if len(calls) < 14 else 600)
    return to_global(batch, where)


program.sharding.to_global = slow_and_then_stuck
config = tiny_config(sys.argv[1], train__steps=20, train__log_every=2, evaluation__every=0, checkpoint__every=0)
config.mesh.data, config.watchdog.step = -1, 4.0
train_and_evaluate(config, sys.argv[2])
"""


def test_one_process_hangs_in_its_data_and_both_end_with_70_and_name_it(run_processes, tmp_path):
    corpus, workdir = write_corpus(tmp_path / "text"), tmp_path / "run"
    leader, _ = run_processes(
        SOURCE, arguments=[str(corpus), str(workdir)], exit_code=70,
        extra_environment={"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )  # fmt: skip
    said = [(workdir / f"hung-{index}.txt").read_text() for index in (0, 1)]
    # The leader had issued step 14 when the other waited for the batch of it: 13 steps are done there.
    assert re.match(
        r"hung: no progress for [0-9]+ s in steps after step [0-9]+, waiting for the devices \(process 0 on \S+\); "
        r"behind: process 1 on \S+ \(steps, 13 steps done, waits for a batch\)\n",
        said[0],
    ), said[0]
    assert "after step 13, waiting for a batch (process 1 on " in said[1]
    assert "all others are ahead of this one" in said[1]
    assert "slow_and_then_stuck" in said[1] and "slow_and_then_stuck" not in said[0]
    assert re.search(r"slowest host: \S+ \(process 1\) takes 0\.\d+ s of a step's .* waiting for data", leader), leader
    last = read_events(workdir)[-1]
    assert (last["event"], last["code"]) == ("end", 70)
    assert json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"] >= 10
