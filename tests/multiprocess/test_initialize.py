import socket
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


def started(number, processes, port, source=JOIN, **extra):
    """One process; its two streams are one."""
    return subprocess.Popen(
        [sys.executable, "-c", source], env=environment(number, processes, port) | extra, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(processes, timeout=60):
    """Exit codes, and what each said last."""
    said = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=timeout)
            said.append((process.returncode, output.strip().splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return said


# Joining inside of a command, whose errors are a line and an exit code.
COMMAND = """
import sys, types
from maskformer import cli
def run(arguments, config_flags):
    from maskformer.training import distributed
    distributed.initialize()
    return 0
join = types.ModuleType("join", "Join.")
join.add_arguments, join.run = lambda parser: None, run
cli.commands = lambda: {"join": join}
sys.argv = ["maskformer", "join"]
sys.exit(cli.main())
"""


def test_a_missing_process_is_named_by_all_that_came_with_a_code_that_starts_them_again():
    port = free_port()
    processes = [started(i, 3, port, COMMAND, MASKFORMER_JOIN_TIMEOUT="4") for i in (0, 2)]
    host = socket.gethostname()
    line = f"error: 1 of 3 processes have not come within 4 s: 1; there: 0 on {host}, 2 on {host}"
    assert ended(processes) == [(1, line)] * 2


def test_two_processes_of_one_number_are_a_mistake_on_all():
    port = free_port()
    processes = [started(i, 3, port, COMMAND) for i in (0, 1, 1)]
    (first, *others) = ended(processes)
    assert first[0] == 2 and first[1].startswith("error: process 1 came twice, from ") and others == [first] * 2


def test_a_process_that_comes_when_the_run_has_begun_says_so():
    port = free_port()
    running = [started(i, 2, port, JOIN + "print('joined', flush=True)\nimport time; time.sleep(60)") for i in (0, 1)]
    try:
        for process in running:
            assert "joined\n" in iter(process.stdout.readline, "")
        ((code, line),) = ended([started(1, 2, port, COMMAND, MASKFORMER_JOIN_TIMEOUT="2")])
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert code == 1
    assert "the run there has begun without this process 1, which waits within 2 s: it was started twice" in line


# What JAX sees on a TPU VM under GKE, without its chips.
ON_A_POD = """
import jax
from jax._src.clusters import cloud_tpu_cluster
from maskformer.training import distributed
distributed._on_tpu_vm = lambda: True
cloud_tpu_cluster.running_in_cloud_tpu_vm = True
"""


def on_a_pod(number, port, source, **extra):
    ours = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    env = {name: value for name, value in environment(0, 1, port).items() if name not in ours}
    env |= {
        "TPU_WORKER_ID": str(number), "TPU_WORKER_HOSTNAMES": "127.0.0.1,localhost", "JAX_COORDINATOR_PORT": str(port),
        "TPU_SKIP_MDS_QUERY": "1", "MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0", "MASKFORMER_DISTRIBUTED": "on",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", ON_A_POD + source], env=env | extra, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_the_workers_of_a_pod_find_each_other_on_the_port_that_is_given():
    port = free_port()
    source = JOIN + "from jax._src.distributed import global_state as state\n"
    source += "print(jax.process_index(), jax.process_count(), state.coordinator_address)"
    said = ended([on_a_pod(number, port, source) for number in (0, 1)])
    assert said == [(0, f"{number} 2 127.0.0.1:{port}") for number in (0, 1)]


def test_worker_0_of_a_pod_alone_is_told_to_run_on_all():
    ((code, line),) = ended([on_a_pod(0, free_port(), COMMAND, MASKFORMER_JOIN_TIMEOUT="1")])
    assert code == 1
    assert "1 of 2 processes have not come within 1 s: 1; there: 0 on " in line
    assert line.endswith("has to run on every worker (gcloud compute tpus tpu-vm ssh --worker=all), not on one alone")


def test_a_failing_process_fails_the_test_with_its_output(run_processes):
    source = "import os, time\nif os.environ['JAX_PROCESS_ID'] == '1': raise SystemExit('broken')\ntime.sleep(600)"
    with pytest.raises(pytest.fail.Exception, match=r"(?s)exit codes \[None, 1\].*process 1:.*broken"):
        run_processes(source)
