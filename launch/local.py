"""Runs one command as several JAX processes on this machine.

    python -m launch.local --processes 2 -- maskformer train --config=configs/bert.py:tiny --workdir=runs/x

Every line of output carries the number of its process; only gloo's news that all are connected is left out. SIGTERM
and SIGINT are passed on. When a process fails the others are stopped, the last line says which one it was, and the exit
code is that of the first failure (128 + n for a process killed by signal n). Once one has ended well the others have
two minutes. Exit code 75 means "stopped after saving, run me again", which is done unless the launcher itself was told
to stop; so is any other failure with `--max-restarts N`, up to N times. However the launcher ends, even by SIGKILL, its
processes and theirs end with it.

With `--processes 3,2,3` each start takes the next of these counts, and the last one stays: a rehearsal on one machine
of what a run lives through whose machines come and go.

With `--array 0-7` the runs of a sweep follow one another, each with `--sweep-index=<its number>` added to the command,
or its number in the place of `{index}`.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch.job import EX_INTERRUPTED, EX_TEMPFAIL, Job, Parser, Restarts, check, check_count, counts, whole
from launch.watchdog import Watchdog, kill_group

_CRASH_GRACE = 5.0
# What the others have once one has ended well, as under `launch.slurm`: all processes of a run end together, and one
# that is stuck on its last way out would be waited for for ever.
_LAST_GRACE = 120.0


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of a run."""

    command: Sequence[str]
    environment: Mapping[str, str]


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
    of the machine's GPUs, in order, and fails where there are none unless JAX_PLATFORMS says otherwise.

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
        # JAX passes over a missing GPU in silence wherever it may use the CPU, also with "cuda,cpu".
        env.setdefault("JAX_PLATFORMS", "cuda")
        env["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(first + i) for i in range(devices_per_process))
    return env


class _Group:
    """The processes of one attempt, their output and their end."""

    def __init__(self) -> None:
        self.signalled: int | None = None
        # Which process failed first, and how, where one did that nobody had told to stop.
        self.failure: str | None = None
        self.children: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []
        self._orphans_told: set[int] = set()

    def start(self, processes: Sequence[Process], watchdog: Watchdog) -> None:
        for process in processes:
            # A session of its own: a Ctrl-C of the terminal reaches the processes once, through us.
            self.children.append(
                subprocess.Popen(
                    process.command, env=process.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True,
                    preexec_fn=watchdog.register,
                )
            )  # fmt: skip
            if self.signalled is not None:  # it came before this one was there to hear it
                self.signal(self.signalled, self.children[-1:])
        # Threads only now: a fork among threads is not safe.
        width = len(str(len(processes) - 1))
        for index, child in enumerate(self.children):
            reader = threading.Thread(target=_prefix_lines, args=(child, f"[{index:>{width}}] "), daemon=True)
            reader.start()
            self._readers.append(reader)

    def signal(self, number: int, children: Sequence[subprocess.Popen] | None = None) -> None:
        for child in self.children if children is None else children:
            if number == signal.SIGKILL:
                kill_group(child.pid)
            elif child.poll() is None and number == signal.SIGINT:
                # As a terminal does: a shell waits for its command, which must hear of it too.
                kill_group(child.pid, number)
            elif child.poll() is None:
                child.send_signal(number)

    def note(self, number: int, frame: object = None) -> None:
        """Passes a signal on; the second one in a row kills, for the impatient."""
        self.signal(signal.SIGKILL if self.signalled is not None else number)
        self.signalled = number

    def wait(self, lead: float) -> int:
        """Waits for all and returns the code of the first failure, or 0."""
        first, deadline, late = 0, None, False
        while None in [child.poll() for child in self.children]:
            self._tell_orphans()
            failed = next((c.returncode for c in self.children if c.returncode), 0)
            if failed and not first:
                first = failed
                self._note_failure(late)
                # After a 75 or 130 the others are at the same step boundary, saving. After a crash they wait for the
                # dead one in a collective and, since JAX takes SIGTERM as "save soon", only SIGKILL ends that.
                saved = failed in (EX_TEMPFAIL, EX_INTERRUPTED)
                deadline = time.monotonic() + (lead if saved else _CRASH_GRACE)
                if not saved:
                    self.signal(signal.SIGTERM)
            elif deadline is None and not first and 0 in [child.returncode for child in self.children]:
                deadline, late = time.monotonic() + _LAST_GRACE, True
            if deadline is not None and time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                deadline = math.inf
            time.sleep(0.05)
        self._tell_orphans()
        # The output ends with the last process that has it open: a command of a shell that the signal ended may save.
        until = time.monotonic() + (_CRASH_GRACE if self.signalled is None else lead)
        for reader in self._readers:
            reader.join(timeout=max(0.0, until - time.monotonic()))
        codes = [child.returncode for child in self.children]
        if not first and any(codes):
            first = next(code for code in codes if code)
            self._note_failure(late)
        if first == EX_TEMPFAIL and {EX_INTERRUPTED, -signal.SIGINT} & set(codes):
            first = EX_INTERRUPTED  # somebody pressed Ctrl-C: not to be started again
        return 128 - first if first < 0 else first

    def _note_failure(self, late: bool) -> None:
        index, code = next((i, child.returncode) for i, child in enumerate(self.children) if child.returncode)
        if self.signalled is not None or code in (EX_TEMPFAIL, EX_INTERRUPTED, -signal.SIGINT):
            return
        if late and code == -signal.SIGKILL:
            end = f"was killed, since it had not ended {_LAST_GRACE:g} s after another"
        else:
            end = f"was killed by signal {-code}" if code < 0 else "failed"
        self.failure = f"process {index} {end}"

    def _tell_orphans(self) -> None:
        """A shell that a signal ends does not pass it on to the command that it waits for."""
        for child in self.children:
            if self.signalled is not None and child.poll() == -self.signalled and child.pid not in self._orphans_told:
                self._orphans_told.add(child.pid)
                kill_group(child.pid, self.signalled)


_output_lock = threading.Lock()
# Each group of devices makes gloo say so once a process, dozens of times in a run. Only where it is as it should be: of
# a peer that is missing the line has two numbers, and stays.
_ALL_CONNECTED = re.compile(
    r"\[Gloo\] Rank [0-9]+ is connected to ([0-9]+) peer ranks\. Expected number of connected peer ranks is : \1\s*"
)


def _prefix_lines(child: subprocess.Popen, prefix: str) -> None:
    for line in child.stdout or ():
        if _ALL_CONNECTED.fullmatch(line):
            continue
        with _output_lock:
            sys.stdout.write(prefix + line.rstrip("\n") + "\n")
            sys.stdout.flush()


def render(
    job: Job,
    port: int,
    devices_per_process: int = 1,
    platform: str = "cpu",
    index: int | None = None,
) -> list[Process]:
    """What to start for one run: `index` is its number in the sweep, if the job is one."""
    command = job.arguments(index)
    return [
        Process(command, environment(i, job.processes, port, devices_per_process, platform))
        for i in range(job.processes)
    ]


def submit(
    job: Job,
    devices_per_process: int = 1,
    platform: str = "cpu",
    port: int | None = None,
    then: Sequence[int] = (),
) -> int:
    """Runs the job here and returns its exit code; the runs of a sweep one after another. See the module's text.

    Args:
      then: how many processes the second start has, the third, ...; the last of these counts stays.

    Raises:
      ValueError: a count below one, or a port that there is not.
      OSError: the program cannot be started.
    """
    check_count("--devices-per-process", devices_per_process)
    check(platform in ("cpu", "gpu"), "--platform", platform, "cpu or gpu")
    if port is not None:
        check_count("--port", port, 1, 65535)
    jobs = [job, *(dataclasses.replace(job, processes=count) for count in then)]
    first = 0
    with _Signals() as signals:
        for index in job.runs():
            restarts, starts = Restarts(job.restarts), iter(jobs)
            now = next(starts)
            while True:
                begin = time.monotonic()
                # A fresh port for each start: the last one may still be in TIME_WAIT.
                processes = render(now, port or free_port(), devices_per_process, platform, index)
                code, failure = _run_once(processes, job, signals)
                pause = None if signals.heard else restarts.pause(code, time.monotonic() - begin)
                if pause is None:
                    if failure:
                        others = "; the others were stopped" if now.processes > 1 else ""
                        print(f"[launch] {failure} (exit code {code}){others}", flush=True)
                    break
                now = next(starts, now)
                why = f"; {failure}" if failure else ""
                print(f"[launch] {restarts.words(code, pause)}, {now.processes} processes{why}", flush=True)
                if not signals.sleep(pause):
                    code = EX_INTERRUPTED if signals.heard == signal.SIGINT else EX_TEMPFAIL
                    break
            first = first or code
            if signals.heard:
                break
    return first


class _Signals:
    """Hears SIGTERM and SIGINT for as long as the `with` block runs, and passes them to the group that runs."""

    def __init__(self) -> None:
        self.heard: int | None = None
        self.group: _Group | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.heard = number
        if self.group is not None:
            self.group.note(number)

    def sleep(self, seconds: float) -> bool:
        """Waits; False as soon as a signal is heard."""
        deadline = time.monotonic() + seconds
        while self.heard is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.heard is None


def _run_once(processes: Sequence[Process], job: Job, signals: _Signals) -> tuple[int, str | None]:
    """The exit code of one start, and which process failed first, where one did."""
    group = _Group()
    # First, so that no signal can end us between two of the children.
    signals.group = group
    group.signalled = signals.heard
    watchdog = Watchdog()
    try:
        group.start(processes, watchdog)
        return group.wait(job.lead), group.failure
    finally:
        signals.group = None
        group.signal(signal.SIGKILL)
        watchdog.dismiss()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = Parser("launch.local", __doc__)
    add = parser.add_argument
    add("--processes", type=counts, required=True, metavar="N[,N...]",
        help="how many processes to start; those after a comma are for the starts that follow")  # fmt: skip
    add("--devices-per-process", type=whole(), default=1, metavar="K", help="devices of each (default 1)")
    add("--platform", choices=("cpu", "gpu"), default="cpu", help="what the devices are (default cpu)")
    add("--port", type=whole(1, 65535), help="port of the coordinator (default: a free one)")
    parser.job_flags("--grace", restarts=0, seconds=60)
    arguments = parser.parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what cannot be shown must not end the reading
    try:
        first, *then = arguments.processes
        job = parser.job(arguments, first)
        return submit(job, arguments.devices_per_process, arguments.platform, arguments.port, then)
    except ValueError as error:
        parser.error(str(error))
    except FileNotFoundError as error:
        print(f"error: {error.filename!r} was not found: is it installed, and on PATH?", file=sys.stderr)
        return 127
    except OSError as error:
        name = error.filename or arguments.command[0]
        print(f"error: {name!r} cannot be run here: {error.strerror}", file=sys.stderr)
        return 126


if __name__ == "__main__":
    sys.exit(main())
