"""A real Slurm cluster of one node on this machine, in a folder of its own, for as long as the tests need it."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import pytest

from launch.local import free_port

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in DAEMONS if shutil.which(name, path=path) is None]
    if missing:
        return f"Slurm is not installed here (no {missing[0]}): apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "starting slurmd needs root"
    return None


class Cluster:
    """Two CPUs, one node, no accounting; `environment` points Slurm's commands at it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        host = socket.gethostname().split(".")[0]
        for name in ("state", "spool", "logs"):
            (folder / name).mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(256))
        key.chmod(0o400)
        (folder / "slurm.conf").write_text(
            "\n".join([
                "ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", "SlurmUser=root", "SlurmdUser=root",
                f"SlurmctldPort={free_port()}", f"SlurmdPort={free_port()}",
                "AuthType=auth/munge", f"AuthInfo=socket={folder}/munge.socket,cred_expire=5", "CredType=cred/munge",
                "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SwitchType=switch/none",
                "MpiDefault=none", "ReturnToService=2", "SchedulerParameters=sched_interval=1,batch_sched_delay=0",
                "SchedulerType=sched/builtin", "SelectType=select/cons_tres", "SelectTypeParameters=CR_CPU",
                "KillWait=5", "MessageTimeout=30", "MaxTasksPerNode=16",
                f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool",
                f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/slurmd.pid",
                f"SlurmctldLogFile={folder}/logs/slurmctld.log", f"SlurmdLogFile={folder}/logs/slurmd.log",
                f"NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN",
                f"PartitionName=main Nodes={host} Default=YES MaxTime=60 OverSubscribe=FORCE:4 State=UP", "",
            ])
        )  # fmt: skip
        self.environment = {
            **os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        }  # fmt: skip
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        folder = self.folder
        self._start(
            "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/munge.pid", f"--log-file={folder}/logs/munged.log",
            f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        self.until(lambda: (folder / "munge.socket").exists(), "munged did not start")
        self._start("slurmctld", "-D", "-i")
        self._start("slurmd", "-D")
        idle = ("sinfo", "-h", "-o", "%t")
        self.until(lambda: self.call(*idle, check=False).startswith("idle"), "the node is not idle")
        return self

    def __exit__(self, *error: object) -> None:
        self.call("scancel", "--user=root", check=False)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *command: str, check: bool = True, cwd: pathlib.Path | None = None) -> str:
        """Runs a command of Slurm and returns what it printed."""
        done = subprocess.run(command, env=self.environment, text=True, capture_output=True, timeout=120, cwd=cwd)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: code {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def wait(self, job: str, timeout: float = 120) -> None:
        """Waits until no task of the job is pending or running."""
        self.until(lambda: not self.call("squeue", "-h", "-j", job, check=False), f"job {job} did not end", timeout)

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`, such as `JobState` or `Restarts`."""
        text = self.call("scontrol", "show", "job", job)
        return next(word.split("=", 1)[1] for word in text.split() if word.startswith(name + "="))

    def _start(self, *command: str) -> None:
        with open(self.folder / "logs" / f"{command[0]}.out", "w") as out:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=out, stderr=out))

    def until(self, ready: Callable[[], bool], message: str, timeout: float = 30) -> None:
        """Waits for a condition; a TimeoutError carries the logs of the daemons."""
        deadline = time.monotonic() + timeout
        while not ready():
            if time.monotonic() > deadline:
                logs = "\n".join(f"== {p.name}\n{p.read_text()[-2000:]}" for p in (self.folder / "logs").iterdir())
                raise TimeoutError(f"{message} within {timeout:.0f} s\n{logs}")
            time.sleep(0.3)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """A running cluster; tests that ask for it are skipped where none can be started."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    # Not pytest's own folder: the path of a Unix socket may have 107 characters only.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(pathlib.Path(folder)) as cluster:
        yield cluster
