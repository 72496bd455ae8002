"""Runs one command as several JAX processes on this machine.

    python -m launch.local --processes 2 -- maskformer train --config=configs/bert.py:tiny --workdir=runs/x

Every line of output carries the number of its process. SIGTERM and SIGINT are passed on. When a process fails the
others are stopped, and the exit code is that of the first failure (128 + n for a process killed by signal n). Exit
code 75 means "stopped after saving, run me again": `--requeue N` does so, up to N times.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

EX_TEMPFAIL = 75
_CRASH_GRACE = 5.0


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(
    index: int,
    processes: int,
    port: int,
    devices_per_process: int = 1,
    platform: str = "cpu",
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment of process `index` of `processes`, which `maskformer.training.distributed` reads.

    On CPU each process simulates `devices_per_process` devices and they talk through gloo; on GPU each takes that many
    of the machine's GPUs, in order.

    >>> environment(1, 2, 8476, base={})["JAX_COORDINATOR_ADDRESS"]
    '127.0.0.1:8476'
    """
    env = dict(os.environ if base is None else base)
    env |= {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
        # `maskformer` is found beside the Python that runs the launcher, activated or not.
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", os.defpath)]),
    }
    if platform == "cpu":
        flags = [f for f in env.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in f]
        flags.append(f"--xla_force_host_platform_device_count={devices_per_process}")
        env |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "XLA_FLAGS": " ".join(flags),
        }
    else:
        first = index * devices_per_process
        env["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(first + i) for i in range(devices_per_process))
    return env


class _Group:
    """The processes of one attempt, their output and their end."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]):
        self.signalled: int | None = None
        self.children: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []
        width = len(str(len(environments) - 1))
        for index, env in enumerate(environments):
            # A session of its own: a Ctrl-C of the terminal reaches the processes once, through us.
            child = subprocess.Popen(
                command, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
            reader = threading.Thread(target=_prefix_lines, args=(child, f"[{index:>{width}}] "), daemon=True)
            reader.start()
            self.children.append(child)
            self._readers.append(reader)

    def signal(self, number: int) -> None:
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def note(self, number: int, frame: object = None) -> None:
        """Passes a signal on; the second one in a row kills, for the impatient."""
        self.signal(signal.SIGKILL if self.signalled is not None else number)
        self.signalled = number

    def wait(self, grace: float) -> int:
        """Waits for all and returns the code of the first failure, or 0."""
        first, deadline = 0, None
        while None in [child.poll() for child in self.children]:
            failed = next((c.returncode for c in self.children if c.returncode), 0)
            if failed and not first:
                first = failed
                # After a 75 the others are at the same step boundary, saving. After a crash they wait for the dead
                # one in a collective and, since JAX takes SIGTERM as "save soon", only SIGKILL ends that.
                deadline = time.monotonic() + (grace if failed == EX_TEMPFAIL else _CRASH_GRACE)
                if failed != EX_TEMPFAIL:
                    self.signal(signal.SIGTERM)
            if deadline is not None and time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                deadline = None
            time.sleep(0.05)
        for reader in self._readers:
            reader.join(timeout=5)
        first = first or next((c.returncode for c in self.children if c.returncode), 0)
        return 128 - first if first < 0 else first


_output_lock = threading.Lock()


def _prefix_lines(child: subprocess.Popen, prefix: str) -> None:
    for line in child.stdout or ():
        with _output_lock:
            sys.stdout.write(prefix + line.rstrip("\n") + "\n")
            sys.stdout.flush()


def run(
    command: Sequence[str],
    processes: int,
    devices_per_process: int = 1,
    platform: str = "cpu",
    port: int | None = None,
    requeue: int = 0,
    grace: float = 60.0,
) -> int:
    """Runs `command` as `processes` processes and returns the exit code of the whole; see the module's text."""
    for attempt in range(requeue + 1):
        chosen = port or free_port()  # a fresh one for each attempt: the last one may still be in TIME_WAIT
        environments = [
            environment(i, processes, chosen, devices_per_process, platform) for i in range(processes)
        ]
        group = _Group(command, environments)
        previous = {number: signal.signal(number, group.note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = group.wait(grace)
        finally:
            group.signal(signal.SIGKILL)
            for number, handler in previous.items():
                signal.signal(number, handler)
        if code != EX_TEMPFAIL or group.signalled is not None or attempt == requeue:
            break
        print(f"[launch] exit code {EX_TEMPFAIL}: starting again ({attempt + 1} of {requeue})", flush=True)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many processes to start")
    parser.add_argument("--devices-per-process", type=int, default=1, metavar="K", help="devices of each (default 1)")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu", help="what the devices are (default cpu)")
    parser.add_argument("--port", type=int, help="port of the coordinator (default: a free one)")
    parser.add_argument(
        "--requeue", "--restart-on-75", type=int, default=0, metavar="N", help="start again after exit code 75, N times"
    )
    parser.add_argument(
        "--grace", type=float, default=60.0, metavar="S", help="seconds for the others to end after the first 75"
    )
    parser.add_argument("command", nargs="+", metavar="-- command", help="what every process runs")
    args = parser.parse_args(argv)
    for name in ("processes", "devices_per_process"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    try:
        return run(
            args.command, args.processes, args.devices_per_process, args.platform, args.port, args.requeue, args.grace
        )
    except FileNotFoundError as error:
        print(f"error: {error.filename!r} was not found: is it installed, and on PATH?", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
