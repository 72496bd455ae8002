"""Joining the processes of one run: `jax.distributed.initialize` where a cluster is detected or asked for.

The same command runs on every host. What decides, in this order:

1. `MASKFORMER_DISTRIBUTED=off`: never; one process on its own.
2. `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, all three: exactly these (`launch.local` sets
   them).
3. `MASKFORMER_DISTRIBUTED=on`: JAX's own detection, which fails where it finds nothing. Kubernetes needs this, since
   a pod cannot tell a run of many processes from a run of one.
4. Open MPI's `mpirun`, Slurm's `srun`, or a TPU VM: detected.
5. Otherwise nothing happens, as on a laptop.

Before JAX joins them, process 0 calls the roll (`roll.py`). `JAX_COORDINATOR_PORT` is the port for both where JAX
detects the cluster (it has changed its default from 8476 to 8482, and firewalls stayed as they were), and where
`JAX_COORDINATOR_ADDRESS` names none; `MASKFORMER_JOIN_TIMEOUT` the seconds that a process waits for the others.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax._src import xla_bridge  # the question "was a device used?" has no public name
from jax._src.clusters import ClusterEnv  # nor has "who is this process?", before it joins

from maskformer.checks import require, shown
from maskformer.training import roll
from maskformer.training.roll import JoinError

# For processes that have all answered the roll.
_CONNECT_SECONDS = 60
# What JAX says of a host whose name the DNS does not know yet: on TPU, on Kubernetes.
_NO_NAME_YET = ("Failed to recognize coordinator address", "Retry failed with all attempts")

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(timeout: float | None = None) -> bool:
    """Joins this process to its run, if there are others; call it before anything touches a device.

    First process 0 calls the roll (`roll.py`): who is missing is said within a minute, and who came twice at once.

    Args:
      timeout: seconds to wait for the other processes; None for `MASKFORMER_JOIN_TIMEOUT`, or 300.

    Returns:
      True if this process belongs to a multi-process runtime, False if it runs on its own.

    Raises:
      ValueError: environment variables that contradict each other or cannot be read, or two processes with one number,
        with the fix.
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
    if timeout is None:
        timeout = _whole(os.environ, "MASKFORMER_JOIN_TIMEOUT") if "MASKFORMER_JOIN_TIMEOUT" in os.environ else 300
    if jax.config.jax_cpu_collectives_implementation in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It takes SIGTERM over. Until the first step that belongs to `PreemptionGuard`, which then starts the service.
    jax.config.update("jax_enable_preemption_service", False)
    if "process_id" not in arguments:
        arguments = _found(arguments, timeout)
    if arguments["num_processes"] > 1:
        _call_roll(arguments, timeout)
    try:
        # All are there.
        jax.distributed.initialize(initialization_timeout=_CONNECT_SECONDS, **arguments)
    except Exception as error:
        raise _failed(arguments, error) from error
    return True


def _found(arguments: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """The arguments, with what JAX finds in the cluster around this process."""
    devices = arguments.get("local_device_ids")
    if devices is None and (chosen := os.environ.get("JAX_LOCAL_DEVICE_IDS")):
        devices = [int(number) for number in chosen.split(",")]
    deadline, noted = time.monotonic() + timeout, time.monotonic() + roll.FIRST_NOTE
    while True:
        try:
            address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
                os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, devices, None, 1
            )
            break
        except Exception as error:
            # Its pod gets a name when it comes.
            if not str(error).startswith(_NO_NAME_YET) or time.monotonic() > deadline:
                raise _failed(arguments, error) from error
            if time.monotonic() > noted:
                noted = time.monotonic() + roll.NOTES
                _say(f"waiting: the host of process 0 has no address yet ({error}){_tpu_hint(os.environ)}")
    if address is None or count is None or index is None:
        raise _failed(arguments, ValueError("no cluster was detected"))
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "local_device_ids": devices,
        "cluster_detection_method": "deactivate",
    }


def _call_roll(arguments: Mapping[str, Any], timeout: float) -> None:
    address, count, index = (arguments[name] for name in ("coordinator_address", "num_processes", "process_id"))
    agreed = {
        "the number of processes": count,
        "MEGASCALE_NUM_SLICES": os.environ.get("MEGASCALE_NUM_SLICES"),
        "the version of JAX": jax.__version__,
    }
    me = roll.Caller(index, agreed)
    if index == 0:
        bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "[::]:" + address.rpartition(":")[2])
        roll.call(address, bind, me, count, timeout, _say, lambda absent: missing_hint(os.environ, count, absent))
        return
    roll.answer(address, me, timeout, _say, _tpu_hint(os.environ))
    _await_service(address)


def missing_hint(environ: Mapping[str, str], count: int, absent: Sequence[int]) -> str:
    """What may be behind the processes that have not come, from what the variables of a TPU say.

    >>> missing_hint({"MEGASCALE_NUM_SLICES": "2"}, 4, [2, 3])
    '. Nobody of slice 1 has come: is MEGASCALE_NUM_SLICES=2 left of an earlier run?'
    """
    slices = environ.get("MEGASCALE_NUM_SLICES", "1")
    if re.fullmatch("[0-9]{1,6}", slices) and int(slices) > 1 and count % int(slices) == 0:
        each = count // int(slices)
        empty = [part for part in range(int(slices)) if set(range(part * each, (part + 1) * each)) <= set(absent)]
        if empty:
            which = f"slice{'s' if len(empty) > 1 else ''} {roll.ranges(empty)}"
            return f". Nobody of {which} has come: is MEGASCALE_NUM_SLICES={slices} left of an earlier run?"
    hosts = (environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    expected = f", expected on {', '.join(hosts[i] for i in absent[:4])}" if len(hosts) == count else ""
    return expected + _tpu_hint(environ)


def _tpu_hint(environ: Mapping[str, str]) -> str:
    if not (_on_tpu_vm() or "TPU_WORKER_HOSTNAMES" in environ or "TPU_PROCESS_ADDRESSES" in environ):
        return ""
    return (
        ". On a TPU pod the same command has to run on every worker (gcloud compute tpus tpu-vm ssh --worker=all), "
        "not on one alone"
    )


def _failed(arguments: Mapping[str, Any], error: Exception) -> JoinError:
    return JoinError(
        f"joining the other processes failed ({dict(arguments) or 'left to the detection of JAX'}): "
        f"{' '.join(str(error).split()).rstrip('.')}. MASKFORMER_DISTRIBUTED=off runs this process on its own."
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
    if "JAX_COORDINATOR_PORT" in environ:
        port = environ["JAX_COORDINATOR_PORT"]
        require(_is_port(port), "JAX_COORDINATOR_PORT", port, "a port of 1 to 65535, open between the hosts")
    check_slices(environ)
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


def _await_service(address: str) -> None:
    """Waits until JAX listens on process 0, a moment after the roll: a refused connection makes it pause for longer."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _CONNECT_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        time.sleep(0.02)


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
    if "JAX_COORDINATOR_PORT" in environ and re.fullmatch(r"[^\s/:]+", address):
        address = f"{address}:{environ['JAX_COORDINATOR_PORT']}"
    match = re.fullmatch(r"[^\s/]+:([0-9]{1,5})", address)
    if match is None or not _is_port(match[1]):
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS={shown(address)}: expected host:port with a port of 1 to 65535, "
            "for example 10.0.0.1:8476, or a host beside JAX_COORDINATOR_PORT"
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


def _is_port(text: str) -> bool:
    return re.fullmatch("[0-9]{1,5}", text) is not None and 1 <= int(text) <= 65535


def check_slices(environ: Mapping[str, str]) -> None:
    """Refuse variables of TPU slices that contradict each other, as those do that an earlier run left.

    A run of the wrong number of slices would wait for the missing ones for ever.

    Raises:
      ValueError: names the variables.

    >>> check_slices({"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "2"})
    Traceback (most recent call last):
        ...
    ValueError: MEGASCALE_SLICE_ID='2': expected 0 to 1, since MEGASCALE_NUM_SLICES=2; unset what an earlier run left
    """
    stale = "unset what an earlier run left"
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    hosts = len(workers.split(",")) if workers else None
    if hosts is not None and environ.get("TPU_WORKER_ID"):
        require(
            _whole(environ, "TPU_WORKER_ID") < hosts, "TPU_WORKER_ID", environ["TPU_WORKER_ID"],
            f"0 to {hosts - 1}, since TPU_WORKER_HOSTNAMES names {hosts}; {stale}",
        )
    if not environ.get("MEGASCALE_NUM_SLICES"):
        return
    slices = _whole(environ, "MEGASCALE_NUM_SLICES")
    require(slices > 0, "MEGASCALE_NUM_SLICES", environ["MEGASCALE_NUM_SLICES"], "at least 1")
    if environ.get("MEGASCALE_SLICE_ID"):
        require(
            _whole(environ, "MEGASCALE_SLICE_ID") < slices, "MEGASCALE_SLICE_ID", environ["MEGASCALE_SLICE_ID"],
            f"0 to {slices - 1}, since MEGASCALE_NUM_SLICES={slices}; {stale}",
        )
    if "JAX_NUM_PROCESSES" in environ:
        count = _whole(environ, "JAX_NUM_PROCESSES")
        fits = count % slices == 0 if hosts is None else count == slices * hosts
        each = "the same number of hosts each" if hosts is None else f"the {hosts} hosts of TPU_WORKER_HOSTNAMES each"
        require(
            fits, "MEGASCALE_NUM_SLICES", environ["MEGASCALE_NUM_SLICES"],
            f"slices of {each}, which make JAX_NUM_PROCESSES={count}; {stale}",
        )


def _on_tpu_vm() -> bool:
    # JAX looks for the chips on the PCI bus when it is imported and keeps the answer in a private place only.
    try:
        from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    except ImportError:
        return "TPU_WORKER_HOSTNAMES" in os.environ
    return running_in_cloud_tpu_vm
