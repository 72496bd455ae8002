"""Stops runs of two processes under `launch.local` at random moments: the part of `soak.py` that needs two of them.

The launcher starts a run again by itself. Each try disturbs it up to three times, and then it has to come to its end:
with the metrics of the undisturbed run, and with goodput that accounts for every moment of it.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping

ROOT = pathlib.Path(__file__).parents[1]
HUNG = 400.0
# Longer than any watchdog of these runs waits.
UNSEEN = 120.0
# A program that is cheap to start and to compile, and hangs that are soon noticed.
RUN = {
    "data.length": 16, "data.vocabulary_size": 256, "model.layers": 1, "model.width": 16, "model.heads": 2,
    "train.steps": 60, "train.batch_size": 4, "train.log_every": 2, "optimizer.warmup_steps": 4,
    "evaluation.every": 20, "evaluation.max_batches": 8, "evaluation.batch_size": 4, "checkpoint.every": 10,
    "writers.tensorboard": False, "mesh.data": -1,
    "watchdog.first_step": 60.0, "watchdog.step": 10.0, "watchdog.evaluation": 20.0, "watchdog.checkpoint": 20.0,
}  # fmt: skip


class Pair:
    """Two processes of one run under the launcher, with what they print."""

    def __init__(self, folder: pathlib.Path, cache: pathlib.Path):
        flags = [f"--config.{key}={value}" for key, value in RUN.items()]
        launcher = ["-m", "launch.local", "--processes=2", "--max-restarts=30", "--grace=30", "--"]
        train = ["-m", "maskformer.cli", "train", f"--config={ROOT}/configs/bert.py:demo", f"--workdir={folder}/run"]
        self.began = time.time()
        self.lines: list[str] = []
        self.start_began = time.monotonic()
        self.starts = 0
        self.in_the_loop = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, *launcher, sys.executable, *train, *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
            env=os.environ | {
                "PYTHONPATH": str(ROOT), "MASKFORMER_CACHE": str(cache), "MASKFORMER_JOIN_TIMEOUT": "30",
                "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            },
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)
            if line.startswith("[launch] "):
                self.starts, self.start_began = self.starts + 1, time.monotonic()
                self.in_the_loop.clear()
            elif re.match(r"\[0\] step \d+/", line):
                self.in_the_loop.set()
        self.in_the_loop.set()  # or never

    @property
    def codes(self) -> list[int]:
        """The exit codes after which the launcher started it again."""
        return [int(found[1]) for line in self.lines if (found := re.match(r"\[launch\] exit code (\d+)", line))]

    def children(self) -> list[int]:
        """The process ids of the two."""
        ask = ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)]
        listed = subprocess.run(ask, capture_output=True, text=True, check=False)
        rows = [line.split(None, 1) for line in listed.stdout.splitlines()]
        return [int(pid) for pid, command in rows if "maskformer.cli train" in command]

    def end(self) -> int | str:
        """The launcher's exit code, or that it hung."""
        try:
            return self.process.wait(HUNG)
        except subprocess.TimeoutExpired:
            return "hung"
        finally:
            self.close()

    def close(self) -> None:
        self.process.kill()  # its watchdog kills the two
        self.process.wait()
        self._reader.join()


@dataclasses.dataclass
class Undisturbed:
    """What the undisturbed run gave, and its seconds to the first line and from there to the end."""

    lines: list[dict[str, float]]
    start: float
    loop: float


def disturb(pair: Pair, number: int, both: bool, whole: Undisturbed, generator: random.Random) -> None:
    """Send the signal to one of the processes, or to both, at a random moment of the start at hand."""
    starts = pair.starts
    # Half of the time while it trains: the way there takes longer.
    if generator.random() < 0.5:
        pair.in_the_loop.wait(HUNG)
        moment = time.monotonic() + generator.uniform(0.0, whole.loop)
    else:
        moment = pair.start_began + generator.uniform(0.0, whole.start)
    while time.monotonic() < moment and pair.process.poll() is None and pair.starts == starts:
        time.sleep(0.005)
    children = pair.children()
    generator.shuffle(children)
    for child in children if both else children[:1]:
        try:
            os.kill(child, number)
        except ProcessLookupError:
            pass
    # What comes next is the next start, or the end.
    sent = time.monotonic()
    while pair.starts == starts and pair.process.poll() is None and time.monotonic() - sent < HUNG:
        if number == signal.SIGSTOP and time.monotonic() - sent > UNSEEN:
            # Stopped on its last way out, where no watchdog looks any more: whoever looks after the machine ends it.
            for child in set(pair.children()) & set(children[:1]):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.05)


def one_of(*kinds: str) -> Callable[[Pair, Undisturbed, random.Random], None]:
    def disturb_one(pair: Pair, whole: Undisturbed, generator: random.Random) -> None:
        name = generator.choice(kinds)
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hang": signal.SIGSTOP}[name]
        disturb(pair, number, name == "kill" and generator.random() < 0.5, whole, generator)

    return disturb_one


# What may end a start: beside its own code that of the other process, which JAX ends (134) when it loses the first, or
# which says itself that the other did not come (1).
LOST = (1, 134)
KINDS: Mapping[str, tuple[Callable[[Pair, Undisturbed, random.Random], None], tuple[int, ...]]] = {
    "pair-kill": (one_of("kill"), (137, *LOST)),
    "pair-sigterm": (one_of("term"), (75, *LOST)),
    "pair-hang": (one_of("hang"), (70, 137, *LOST)),
    "pair-any": (one_of("kill", "term", "hang"), (137, 75, 70, *LOST)),
}


def undisturbed(folder: pathlib.Path, cache: pathlib.Path, read: Callable[[pathlib.Path], list]) -> Undisturbed:
    """The run to compare with, on a warm cache."""
    for name in ("first", "whole"):
        (folder / name).mkdir(parents=True)
        pair = Pair(folder / name, cache)
        pair.in_the_loop.wait(HUNG)
        looping = time.monotonic()
        code = pair.end()
        if code:
            raise SystemExit(f"the undisturbed run of two processes ended with {code}:\n{''.join(pair.lines[-40:])}")
        if lines := read(folder / name / "run"):
            whole = Undisturbed(lines, looping - pair.start_began, time.monotonic() - looping)
    return whole


def attempt(
    name: str, folder: pathlib.Path, cache: pathlib.Path, whole: Undisturbed, generator: random.Random, most: int,
    read: Callable[[pathlib.Path], list],
) -> tuple[bool, collections.Counter[int | str], list[str]]:
    """One try: whether it ends equal, the codes on the way, and what was wrong."""
    stop, expected = KINDS[name]
    folder.mkdir(parents=True)
    pair, wrong = Pair(folder, cache), []
    try:
        for _ in range(generator.randint(1, most)):
            stop(pair, whole, generator)
    finally:
        code = pair.end()
    if code:
        wrong.append(f"{folder.name}: the launcher ended with {code}: {''.join(pair.lines[-3:])[:400]}")
    unexpected = sorted(set(pair.codes) - set(expected))
    if unexpected:
        wrong.append(f"{folder.name}: exit codes {unexpected}, expected some of {expected}")
    try:
        equal = read(folder / "run") == whole.lines
    except (OSError, ValueError) as error:
        return False, collections.Counter(pair.codes), [*wrong, f"{folder.name}: {error}"]
    if not equal:
        wrong.append(f"{folder.name}: other metrics")
    wrong += [f"{folder.name}: {what}" for what in unaccounted(folder / "run", pair.began, time.time())]
    return equal, collections.Counter(pair.codes), wrong


def unaccounted(workdir: pathlib.Path, began: float, ended: float) -> list[str]:
    """What is wrong with the goodput of a run that was watched from `began` to `ended`."""
    from maskformer.training.events import read_events
    from maskformer.training.goodput import goodput

    times = [event["time"] for event in read_events(workdir)]
    measured = goodput(workdir)
    total = sum(measured.buckets.values()) / 1e6
    wrong = []
    if min(measured.buckets.values()) < 0:
        wrong.append(f"goodput: less than nothing in {measured.buckets}")
    if abs(total - (max(times) - min(times))) > 0.5 or total > ended - began + 0.5:
        between = max(times) - min(times)
        wrong.append(f"goodput: {total:.1f} s in its buckets, {between:.1f} s of events, {ended - began:.1f} s in all")
    return wrong
