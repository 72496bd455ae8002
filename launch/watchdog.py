"""Ends what a launcher has started when the launcher itself is gone, however that came about.

It reads process groups from its standard input, one a line. The input ends when the launcher does, even by SIGKILL;
then the groups are killed. A launcher that ends in good order kills this program first.

A pipe needs nothing but POSIX, unlike Linux's PR_SET_PDEATHSIG, which also forgets the children of a shell.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys


class Watchdog:
    """The program, started; call `register` in each child between fork and exec."""

    def __init__(self) -> None:
        reader, self._writer = os.pipe()
        # A session of its own: what ends the launcher's terminal or group must not end it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__], stdin=reader, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(reader)

    def register(self) -> None:
        """Says that this process leads a group. Said before exec, so that there is no moment without a watch."""
        os.write(self._writer, f"{os.getpid()}\n".encode())

    def dismiss(self) -> None:
        self._process.kill()
        os.close(self._writer)
        self._process.wait()


def kill_group(group: int, number: int = signal.SIGKILL) -> None:
    """Signals a process group, or what is left of it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS answers the latter where only a zombie is left
        pass


if __name__ == "__main__":
    for line in sys.stdin.buffer.read().split():
        kill_group(int(line))
