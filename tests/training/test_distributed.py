import re

import pytest

from launch.local import free_port
from maskformer.training import distributed
from maskformer.training.distributed import detect, slurm_local_devices

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1"},
        {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")},  # inside sbatch, outside srun
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "x"},
        EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        EXPLICIT | {"MASKFORMER_DISTRIBUTED": "off"},
        SLURM | {"MASKFORMER_DISTRIBUTED": "off"},
    ],
)
def test_a_process_on_its_own_is_left_alone(environ):
    assert detect(environ) is None


def test_explicit_variables_win_over_the_cluster_around_them():
    assert detect(SLURM | EXPLICIT) == {
        "coordinator_address": "10.0.0.1:8476", "num_processes": 4, "process_id": 3,
        "cluster_detection_method": "deactivate",
    }  # fmt: skip


@pytest.mark.parametrize(
    "environ",
    [SLURM, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "x"}, {"MASKFORMER_DISTRIBUTED": "on"}],
)
def test_a_detected_or_wished_for_cluster_is_left_to_jax(environ):
    assert detect(environ) == {}


def test_a_tpu_vm_is_detected_unless_another_platform_is_asked_for(monkeypatch):
    monkeypatch.setattr(distributed, "_on_tpu_vm", lambda: True)
    assert detect({}) == detect({"JAX_PLATFORMS": "tpu,cpu"}) == {}
    assert detect({"JAX_PLATFORMS": "cpu"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": None}, "set without JAX_PROCESS_ID: set all three"),
        ({"JAX_PROCESS_ID": None, "JAX_NUM_PROCESSES": None}, "without JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "expected host:port"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: expected 0 to 3"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two': expected a whole number"),
        ({"JAX_NUM_PROCESSES": "\u0664"}, "JAX_NUM_PROCESSES='\u0664': expected a whole number"),
        ({"JAX_NUM_PROCESSES": "1_0"}, "JAX_NUM_PROCESSES='1_0': expected a whole number"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1': expected a whole number"),
        ({"JAX_PROCESS_ID": "9" * 5000}, r"JAX_PROCESS_ID='9+ \.\.\. 9+': expected a whole number"),
        ({"JAX_COORDINATOR_ADDRESS": "host:0"}, "a port of 1 to 65535"),
        ({"JAX_COORDINATOR_ADDRESS": "host:65536"}, "a port of 1 to 65535"),
        ({"JAX_COORDINATOR_ADDRESS": "host:\u0668\u0660"}, "expected host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "http://host:80"}, "expected host:port"),
        ({"JAX_COORDINATOR_PORT": "0"}, "JAX_COORDINATOR_PORT='0': expected a port of 1 to 65535"),
        ({"JAX_COORDINATOR_PORT": "all"}, "JAX_COORDINATOR_PORT='all': expected a port"),
        ({"MASKFORMER_DISTRIBUTED": "yes"}, "MASKFORMER_DISTRIBUTED='yes': expected auto, on or off"),
    ],
)
def test_contradicting_variables_are_named_with_the_fix(change, message):
    environ = {key: value for key, value in (EXPLICIT | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        detect(environ)


def test_the_port_of_the_coordinator_may_stand_alone_and_an_address_with_a_port_keeps_its_own():
    apart = EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1", "JAX_COORDINATOR_PORT": "8482"}
    assert detect(apart)["coordinator_address"] == "10.0.0.1:8482"
    assert detect(EXPLICIT | {"JAX_COORDINATOR_PORT": "8482"})["coordinator_address"] == "10.0.0.1:8476"


TWO_SLICES = {
    "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1",
}  # fmt: skip
EVERY_WORKER = ". On a TPU pod the same command has to run on every worker"


@pytest.mark.parametrize("environ", [{}, TWO_SLICES, TWO_SLICES | EXPLICIT])
def test_variables_of_slices_that_agree_are_left_alone(environ):
    distributed.check_slices(environ)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MEGASCALE_NUM_SLICES": "1"}, "MEGASCALE_SLICE_ID='1': expected 0 to 0, since MEGASCALE_NUM_SLICES=1; unset"),
        ({"MEGASCALE_NUM_SLICES": "0"}, "MEGASCALE_NUM_SLICES='0': expected at least 1"),
        ({"MEGASCALE_NUM_SLICES": "two"}, "MEGASCALE_NUM_SLICES='two': expected a whole number"),
        ({"TPU_WORKER_ID": "2"}, "TPU_WORKER_ID='2': expected 0 to 1, since TPU_WORKER_HOSTNAMES names 2; unset"),
        (EXPLICIT | {"MEGASCALE_NUM_SLICES": "4"}, "2 hosts of TPU_WORKER_HOSTNAMES each, which make JAX_NUM"),
        (EXPLICIT | {"MEGASCALE_NUM_SLICES": "3", "TPU_WORKER_HOSTNAMES": ""}, "the same number of hosts each"),
    ],
)
def test_a_variable_of_slices_that_an_earlier_run_left_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        detect(TWO_SLICES | change)


@pytest.mark.parametrize(
    ("environ", "absent", "hint"),
    [
        ({}, [1], ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, [1, 3], f", expected on b, d{EVERY_WORKER}"),
        (TWO_SLICES, [2, 3], ". Nobody of slice 1 has come: is MEGASCALE_NUM_SLICES=2 left of an earlier run?"),
        (TWO_SLICES, [3], EVERY_WORKER),
    ],
)
def test_what_may_be_behind_missing_processes_is_said(environ, absent, hint):
    said = distributed.missing_hint(environ, 4, absent)
    assert said.startswith(hint) and (hint or not said)


@pytest.mark.parametrize(
    ("visible", "on_node", "tasks", "node", "local", "expected"),
    [
        ("0,1", 2, "2", 0, 1, [1]),  # one each
        ("0,1,2,3", 4, "1(x2)", 1, 0, [0, 1, 2, 3]),  # one task owns its node
        ("0,1,2,3", 4, "1,2", 1, 1, [2, 3]),  # uneven nodes
        ("0", 2, "2", 0, 1, [0]),  # bound by Slurm: the only one it sees is number 0
        ("", 0, "2", 0, 1, None),  # no GPU
    ],
)
def test_slurm_tasks_share_the_gpus_of_their_node(visible, on_node, tasks, node, local, expected):
    environ = SLURM | {
        "CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": str(on_node), "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local),
    }  # fmt: skip
    assert slurm_local_devices(environ) == expected
    assert detect(environ) == ({} if expected is None else {"local_device_ids": expected})
    assert slurm_local_devices(environ | {"JAX_LOCAL_DEVICE_IDS": "0"}) is None


def test_gpus_that_do_not_divide_are_refused():
    environ = SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2", "SLURM_GPUS_ON_NODE": "3"}
    with pytest.raises(ValueError, match="2 Slurm tasks cannot share 3 GPUs of a node evenly"):
        slurm_local_devices(environ)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_NTASKS", "x", "SLURM_NTASKS='x': expected a whole number"),
        ("SLURM_LOCALID", "", "SLURM_LOCALID='': expected a whole number"),
        ("SLURM_GPUS_ON_NODE", "two", "SLURM_GPUS_ON_NODE='two': expected a whole number"),
        ("SLURM_STEP_TASKS_PER_NODE", "2", "SLURM_STEP_TASKS_PER_NODE='2': expected the tasks of at least 2 nodes"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x", "expected the tasks of at least 2 nodes"),
    ],
)
def test_a_garbled_variable_of_slurm_is_named(name, value, message):
    environ = SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2", name: value}
    with pytest.raises(ValueError, match=re.escape(message)):
        detect(environ)


def test_an_absent_coordinator_is_named_instead_of_a_stack_trace(monkeypatch):
    # Other tests of this session have used devices, which would be the first thing wrong.
    monkeypatch.setattr(distributed.xla_bridge, "backends_are_initialized", lambda: False)
    for name, value in {**EXPLICIT, "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"process 0 could not be reached there within 1 s .*is the port open"):
        distributed.initialize(timeout=1)


def test_a_cluster_that_is_asked_for_and_absent_is_an_error(monkeypatch):
    # Other tests of this session have used devices, which would be the first thing wrong.
    monkeypatch.setattr(distributed.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setenv("MASKFORMER_DISTRIBUTED", "on")
    with pytest.raises(RuntimeError, match="MASKFORMER_DISTRIBUTED=off runs this process on its own"):
        distributed.initialize()
