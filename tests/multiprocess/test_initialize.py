import pytest

pytestmark = pytest.mark.multiprocess

JOIN = "from maskformer.training import distributed; assert distributed.initialize()\n"


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


def test_a_sigterm_to_one_process_stops_both_at_the_same_step(run_processes):
    source = JOIN + """
import os, signal, sys, time
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("start")
for step in range(600):
    if step == 5 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    if multihost_utils.reached_preemption_sync_point(step):
        print(step, flush=True)
        sys.exit(75)
"""
    first, second = run_processes(source, exit_code=75)
    assert first == second != ""


def test_a_failing_process_fails_the_test_with_its_output(run_processes):
    source = "import os, time\nif os.environ['JAX_PROCESS_ID'] == '1': raise SystemExit('broken')\ntime.sleep(600)"
    with pytest.raises(pytest.fail.Exception, match=r"(?s)exit codes \[None, 1\].*process 1:.*broken"):
        run_processes(source)
