import subprocess
import sys
import time

import pytest

from launch.local import environment, free_port

pytestmark = pytest.mark.multiprocess

JOIN = "from maskformer.training import distributed; assert distributed.initialize()\n"
GUARDED_JOIN = """
import os, signal, sys, time
from maskformer.training.preemption import PreemptionGuard
with PreemptionGuard(ends_process=True) as guard:
    import jax
    from maskformer.training import distributed
    assert distributed.initialize()
"""


def test_two_processes_form_one_mesh_and_sum_across_it(run_processes):
    source = JOIN + """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("data",))
sharding = NamedSharding(mesh, P("data"))
values = jax.make_array_from_process_local_data(sharding, np.array([1.0, 2.0]) * 10 ** jax.process_index())
total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(values)
print(jax.process_index(), jax.process_count(), jax.device_count(), float(total))
assert distributed.initialize()  # a second call changes nothing
"""
    out = run_processes(source, devices_per_process=2)
    assert [line.split() for line in out] == [["0", "2", "4", "33.0"], ["1", "2", "4", "33.0"]]


def test_a_device_used_too_early_is_named(run_processes):
    source = """
import jax
jax.devices()
from maskformer.training import distributed
try:
    distributed.initialize()
except RuntimeError as error:
    print(error)
"""
    assert run_processes(source) == ["distributed.initialize() was called after a device was used: call it first\n"] * 2


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_to_one_process_stops_both_at_the_same_step_with_the_same_exit_code(run_processes, number, code):
    source = GUARDED_JOIN + f"""
    for step in range(1, 600):
        if step == 5 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.{number})
        time.sleep(0.05)
        if guard.requested(step):
            print(step, flush=True)
            sys.exit(guard.exit_code)
"""
    first, second = run_processes(source, exit_code=code)
    assert first == second != ""


def test_a_signal_between_joining_and_the_first_step_ends_the_process_at_once(run_processes):
    source = GUARDED_JOIN + """
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)  # compiling
"""
    run_processes(source, exit_code=75)


def test_a_sigterm_while_waiting_for_the_others_ends_the_process_at_once():
    # One of two processes each: the coordinator waits in C++, the other one in a loop of ours.
    source = GUARDED_JOIN.replace("    assert", "    print('joining', flush=True); assert")
    alone = [
        subprocess.Popen([sys.executable, "-c", source], env=environment(i, 2, free_port()), stdout=subprocess.PIPE)
        for i in range(2)
    ]
    try:
        for process in alone:
            assert process.stdout.readline() == b"joining\n"
        time.sleep(1)
        for process in alone:
            process.terminate()
        assert [process.wait(10) for process in alone] == [75, 75]
    finally:
        for process in alone:
            process.kill()
            process.wait()


def test_a_failing_process_fails_the_test_with_its_output(run_processes):
    source = "import os, time\nif os.environ['JAX_PROCESS_ID'] == '1': raise SystemExit('broken')\ntime.sleep(600)"
    with pytest.raises(pytest.fail.Exception, match=r"(?s)exit codes \[None, 1\].*process 1:.*broken"):
        run_processes(source)
