"""Joining the processes of one run: `jax.distributed.initialize` where a cluster is detected or asked for.

The same command runs on every host. What decides, in this order:

1. `MASKFORMER_DISTRIBUTED=off`: never; one process on its own.
2. `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, all three: exactly these (`launch.local` sets
   them).
3. `MASKFORMER_DISTRIBUTED=on`: JAX's own detection, which fails where it finds nothing. Kubernetes needs this, since
   a pod cannot tell a run of many processes from a run of one.
4. Open MPI's `mpirun`, Slurm's `srun`, or a TPU VM: detected.
5. Otherwise nothing happens, as on a laptop.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping

import jax
from jax._src import xla_bridge  # the question "was a device used?" has no public name

from maskformer.checks import require, shown

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class JoinError(RuntimeError):
    """This process could not join the others of its run."""


def initialize(timeout: int = 300) -> bool:
    """Joins this process to its run, if there are others; call it before anything touches a device.

    Args:
      timeout: seconds to wait for the other processes.

    Returns:
      True if this process belongs to a multi-process runtime, False if it runs on its own.

    Raises:
      ValueError: environment variables that contradict each other or cannot be read, with the fix.
      JoinError: devices were used before this call, or the processes did not find each other.

    >>> initialize()  # on a laptop, and in this doctest: nothing to join
    False
    """
    if jax.distributed.is_initialized():
        return True
    arguments = detect(os.environ)
    if arguments is None:
        return False
    if xla_bridge.backends_are_initialized():
        raise JoinError("distributed.initialize() was called after a device was used: call it first")
    if jax.config.jax_cpu_collectives_implementation in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It takes SIGTERM over. Until the first step that belongs to `PreemptionGuard`, which then starts the service.
    jax.config.update("jax_enable_preemption_service", False)
    if arguments.get("process_id", 0) > 0:
        _await_coordinator(arguments["coordinator_address"], timeout)
    try:
        jax.distributed.initialize(initialization_timeout=timeout, **arguments)
    except Exception as error:
        raise JoinError(
            f"joining the other processes failed ({arguments or 'left to the detection of JAX'}): "
            f"{str(error).rstrip('.')}. MASKFORMER_DISTRIBUTED=off runs this process on its own."
        ) from error
    return True


def detect(environ: Mapping[str, str]) -> dict | None:
    """The arguments for `jax.distributed.initialize` in this environment; None to leave it alone.

    An empty dictionary means that JAX finds everything by itself.

    >>> detect({})
    >>> detect({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})["process_id"]
    1
    """
    wish = environ.get("MASKFORMER_DISTRIBUTED", "auto")
    if wish not in ("auto", "on", "off"):
        raise ValueError(f"MASKFORMER_DISTRIBUTED={wish!r}: expected auto, on or off")
    if wish == "off":
        return None
    if "JAX_NUM_PROCESSES" in environ or "JAX_PROCESS_ID" in environ:
        return _explicit(environ)
    if _tasks(environ, "OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri") > 1:
        return {}
    if _tasks(environ, "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID") > 1:
        devices = slurm_local_devices(environ)
        return {} if devices is None else {"local_device_ids": devices}
    # On TPU even a single host may ask JAX: it answers "one process", and nothing is lost.
    if wish == "on" or (_on_tpu_vm() and environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")):
        return {}
    if "JAX_COORDINATOR_ADDRESS" in environ:
        return _explicit(environ)
    return None


def _await_coordinator(address: str, timeout: float) -> None:
    """Waits until process 0 listens. JAX would wait too, but ends the process with a C++ stack trace."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise JoinError(
                    f"JAX_COORDINATOR_ADDRESS={address}: process 0 could not be reached there within {timeout:.0f} s "
                    f"({error}). Is it running, and is the port open?"
                ) from None
        time.sleep(0.2)


def slurm_local_devices(environ: Mapping[str, str]) -> list[int] | None:
    """Which of the visible GPUs belong to this Slurm task; None where the rule of JAX should stand.

    JAX gives task i of a node GPU i and nothing else. That wastes GPUs where a node runs fewer tasks than it has GPUs,
    and names an absent one where Slurm has already bound each task to its own. So: a bound task takes all it sees,
    unbound tasks of a node share evenly. `JAX_LOCAL_DEVICE_IDS` overrides it.

    >>> slurm_local_devices({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4",
    ...     "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_NODEID": "2", "SLURM_LOCALID": "1"})
    [2, 3]
    """
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if "JAX_LOCAL_DEVICE_IDS" in environ or not visible:
        return None
    if "SLURM_GPUS_ON_NODE" in environ and len(visible) < _whole(environ, "SLURM_GPUS_ON_NODE"):
        return list(range(len(visible)))
    tasks = _tasks_on_node(environ)
    if len(visible) % tasks:
        raise ValueError(
            f"{tasks} Slurm tasks cannot share {len(visible)} GPUs of a node evenly: "
            "change --ntasks-per-node, or set JAX_LOCAL_DEVICE_IDS for each task"
        )
    share = len(visible) // tasks
    first = _whole(environ, "SLURM_LOCALID") * share
    return list(range(first, first + share))


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    """Reads `SLURM_STEP_TASKS_PER_NODE`, for example `4(x2),1`: nodes 0 and 1 have four tasks, node 2 has one."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    text, node = environ.get(name, "1"), _whole(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    entry = r"[0-9]{1,6}(\(x[0-9]{1,6}\))?"
    counts: list[int] = []
    if re.fullmatch(f"{entry}(,{entry})*", text):
        for count, repeat in re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?", text):
            counts += [int(count)] * int(repeat or 1)
    require(len(counts) > node, name, text, f"the tasks of at least {node + 1} nodes, such as 4(x{node + 1})")
    return counts[node]


def _tasks(environ: Mapping[str, str], count: str, *present: str) -> int:
    """How many processes a launcher started, 0 unless all of its variables are there."""
    return _whole(environ, count) if all(name in environ for name in (count, *present)) else 0


def _whole(environ: Mapping[str, str], name: str) -> int:
    # int() would also take signs, underscores and the digits of every script, which the C++ of JAX does not.
    require(re.fullmatch(r"[0-9]{1,9}", environ[name]) is not None, name, environ[name], "a whole number")
    return int(environ[name])


def _explicit(environ: Mapping[str, str]) -> dict | None:
    missing = [name for name in _EXPLICIT if name not in environ]
    if missing:
        given = ", ".join(f"{name}={environ[name]}" for name in _EXPLICIT if name in environ)
        raise ValueError(f"{given} set without {' and '.join(missing)}: set all three, or none to run on one process")
    address = environ["JAX_COORDINATOR_ADDRESS"]
    match = re.fullmatch(r"[^\s/]+:([0-9]{1,5})", address)
    if match is None or not 1 <= int(match[1]) <= 65535:
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS={shown(address)}: expected host:port with a port of 1 to 65535, "
            "for example 10.0.0.1:8476"
        )
    count, index = _whole(environ, "JAX_NUM_PROCESSES"), _whole(environ, "JAX_PROCESS_ID")
    if index >= count:
        raise ValueError(f"JAX_PROCESS_ID={index}: expected 0 to {count - 1}, since JAX_NUM_PROCESSES={count}")
    if count == 1:
        return None
    # "deactivate": a launcher inside a Slurm job must not have its devices chosen by the task number of that job.
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _on_tpu_vm() -> bool:
    # JAX looks for the chips on the PCI bus when it is imported and keeps the answer in a private place only.
    try:
        from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    except ImportError:
        return "TPU_WORKER_HOSTNAMES" in os.environ
    return running_in_cloud_tpu_vm
