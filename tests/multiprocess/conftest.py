"""Runs a script as several real JAX processes that talk through `jax.distributed` and gloo, on CPU."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence

import pytest

from launch.local import environment, free_port

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def run_processes(tmp_path: pathlib.Path) -> Callable[..., list[str]]:
    """`run_processes(source, ...)` runs Python source in every process and returns what each printed.

    The source starts with `from maskformer.training import distributed; distributed.initialize()`. A process that
    fails, or is not done in `timeout` seconds, fails the test with the last output of all of them.
    """

    def run(
        source: str,
        processes: int = 2,
        devices_per_process: int = 1,
        arguments: Sequence[str] = (),
        extra_environment: Mapping[str, str] | None = None,
        timeout: float = 180.0,
        exit_code: int = 0,
    ) -> list[str]:
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(source))
        port = free_port()
        logs = [tmp_path / f"process-{index}" for index in range(processes)]
        children = []
        for index, log in enumerate(logs):
            env = environment(index, processes, port, devices_per_process) | dict(extra_environment or {})
            # stdout is the answer; stderr carries the chatter of XLA.
            with open(f"{log}.out", "w") as out, open(f"{log}.err", "w") as err:
                command = [sys.executable, str(script), *arguments]
                children.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=err))
        deadline = time.monotonic() + timeout
        try:
            while None in (codes := [child.poll() for child in children]):
                # One that failed leaves the others waiting for it: there is nothing to wait for.
                if set(codes) - {None, exit_code} or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            for child in children:
                child.kill()
                child.wait()
        if codes != [exit_code] * processes:
            tails = [f"-- process {i}:\n{_tail(f'{log}.out')}\n{_tail(f'{log}.err')}" for i, log in enumerate(logs)]
            pytest.fail(f"exit codes {codes} (None: still running after {timeout:.0f} s)\n" + "\n".join(tails))
        return [_without_gloo(pathlib.Path(f"{log}.out").read_text()) for log in logs]

    return run


def _without_gloo(text: str) -> str:
    """Gloo greets its peers on stdout, from C++."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo]"))


def _tail(path: str) -> str:
    return pathlib.Path(path).read_text(errors="replace")[-3000:]
