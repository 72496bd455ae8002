"""Stops real runs at random moments, starts them again until they are done, and compares their metrics bit by bit.

    python tests/soak.py --seconds 120 --kinds kill,sigterm
    python tests/soak.py --tries 100 --kinds pair-any

Each try is one small run of `configs/bert.py:demo` on the embedded corpus, stopped up to three times in one way: killed
at any moment, signalled in the loop or before it, or out of disk. The kinds that begin with `pair` (`soak_pairs.py`)
stop a run of two processes under `launch.local`, which starts it again, by kills, signals and hangs. What
`metrics.jsonl` says in the end, without the timing fields, must equal the undisturbed run's. Exit codes and tracebacks
are checked on the way. Prints a table, and exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests import soak_pairs  # noqa: E402  (the root is found only now)
from tests.training.tiny import metric_lines  # noqa: E402

RUN = {
    "data.length": 32, "data.vocabulary_size": 512, "model.width": 32, "train.steps": 40, "train.batch_size": 8,
    "train.log_every": 2, "optimizer.warmup_steps": 4, "evaluation.every": 20, "evaluation.max_batches": 2,
    "evaluation.batch_size": 8, "checkpoint.every": 5, "mesh.data": 1,
}  # fmt: skip
MOST_STOPS = 3
HUNG = 240.0


class Run:
    """One start of the run in `folder`, with what it prints."""

    def __init__(self, folder: pathlib.Path, cache: pathlib.Path, file_limit: int | None = None):
        flags = [f"--config.{key}={value}" for key, value in RUN.items()]
        command = [sys.executable, "-m", "maskformer.cli", "train", f"--config={ROOT}/configs/bert.py:demo", *flags]
        self.began = time.monotonic()
        self.in_the_loop = threading.Event()
        self.errors = ""
        limit = None if file_limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit,) * 2)
        self.process = subprocess.Popen(
            [*command, f"--workdir={folder}/run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", preexec_fn=limit, cwd=ROOT,
            env=os.environ | {
                "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "MASKFORMER_CACHE": str(cache),
                "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "MASKFORMER_DISTRIBUTED": "off",
            },
        )  # fmt: skip
        self._readers = [threading.Thread(target=self._read_out), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read_out(self) -> None:
        for line in self.process.stdout or ():
            if re.match(r"step \d+/", line):
                self.in_the_loop.set()
        self.in_the_loop.set()  # or never

    def _read_errors(self) -> None:
        self.errors = self.process.stderr.read() if self.process.stderr else ""

    def until_guarded(self) -> None:
        """Waits until the process catches SIGTERM (or long enough, where that cannot be seen)."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status")
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status.read_text())
                if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
                    return
            time.sleep(0.002)

    def end(self) -> int | str:
        """Its exit code, or that it hung."""
        try:
            code: int | str = self.process.wait(HUNG)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = "hung"
        self.process.wait()
        for reader in self._readers:
            reader.join()
        return code


@dataclasses.dataclass
class Undisturbed:
    """What the undisturbed run gave, and how long it took to start and to train."""

    lines: list[dict[str, float]]
    start: float
    loop: float
    size: int  # bytes of its folder


@dataclasses.dataclass
class Kind:
    """A way to stop a run: `stop(run)` does it, and the process may then end with one of `codes`."""

    stop: Callable[[Run, Undisturbed, random.Random], None]
    codes: tuple[int, ...]
    disk: str | None = None


def after(low: float, high: float, generator: random.Random) -> None:
    time.sleep(generator.uniform(low, high))


def kill(run: Run, whole: Undisturbed, generator: random.Random) -> None:
    after(0.0, whole.start + whole.loop, generator)
    run.process.kill()


def in_the_loop(number: int) -> Callable[[Run, Undisturbed, random.Random], None]:
    def stop(run: Run, whole: Undisturbed, generator: random.Random) -> None:
        run.in_the_loop.wait(HUNG)
        after(0.0, whole.loop, generator)
        run.process.send_signal(number)

    return stop


def at_the_start(number: int) -> Callable[[Run, Undisturbed, random.Random], None]:
    def stop(run: Run, whole: Undisturbed, generator: random.Random) -> None:
        run.until_guarded()
        after(0.0, whole.start, generator)
        run.process.send_signal(number)

    return stop


def twice(run: Run, whole: Undisturbed, generator: random.Random) -> None:
    in_the_loop(signal.SIGINT)(run, whole, generator)
    after(0.0, 0.5, generator)
    run.process.send_signal(signal.SIGINT)


def leave_alone(run: Run, whole: Undisturbed, generator: random.Random) -> None:
    pass  # the disk stops it


KINDS = {
    "kill": Kind(kill, (-signal.SIGKILL, 0)),
    "sigterm": Kind(in_the_loop(signal.SIGTERM), (75, 0)),
    "sigint": Kind(in_the_loop(signal.SIGINT), (130, 0)),
    "sigint-twice": Kind(twice, (130, 0)),
    "start-sigterm": Kind(at_the_start(signal.SIGTERM), (75, 0)),
    "start-sigint": Kind(at_the_start(signal.SIGINT), (130, 0)),
    "disk": Kind(leave_alone, (1, 0), disk="full"),
    "file-size": Kind(leave_alone, (1, 0), disk="limit"),
}


@dataclasses.dataclass
class Row:
    """What became of the tries of one kind."""

    tries: int = 0
    equal: int = 0
    stops: int = 0
    tracebacks: int = 0
    most_lines: int = 0
    codes: collections.Counter[int | str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def small_disk(folder: pathlib.Path) -> Iterator[Callable[[int], bool]]:
    """A function that leaves so many bytes free on a disk at `folder`, made at the first call; False if it cannot."""
    mounted = False

    def resize(free: int) -> bool:
        nonlocal mounted
        used = shutil.disk_usage(folder).used if mounted else 0
        options = f"{'remount,' if mounted else ''}size={used + free}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "soak", str(folder)], capture_output=True)
        mounted = mounted or done.returncode == 0
        return done.returncode == 0

    try:
        yield resize
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


def attempt(
    name: str, row: Row, folder: pathlib.Path, shared_cache: pathlib.Path, whole: Undisturbed, generator: random.Random
) -> None:
    """One run, stopped and started again until it is done, and its comparison."""
    kind = KINDS[name]
    folder.mkdir()
    # With a cache of its own it trains its tokenizer at the start.
    cache = folder / "cache" if generator.random() < 0.5 else shared_cache
    row.tries += 1
    with small_disk(folder) as resize, contextlib.ExitStack() as started:
        for _ in range(generator.randint(1, MOST_STOPS)):
            limit = None
            if kind.disk == "limit":
                limit = generator.randint(1024, whole.size)
            elif kind.disk == "full" and not resize(generator.randint(whole.size // 8, whole.size * 2)):
                row.wrong.append("no tmpfs could be mounted here: run as root, or leave out disk")
                return
            run = Run(folder, cache, limit)
            started.callback(run.process.kill)
            kind.stop(run, whole, generator)
            code = run.end()
            row.stops += 1
            note(row, run, code, kind.codes)
        if kind.disk == "full":
            resize(1 << 30)
        run = Run(folder, cache)
        started.callback(run.process.kill)
        note(row, run, run.end(), (0,), counted=False)
        try:
            equal = metric_lines(folder / "run") == whole.lines
        except (OSError, ValueError) as error:
            row.wrong.append(f"{folder.name}: {error}")
        else:
            row.equal += equal
            if not equal:
                row.wrong.append(f"{folder.name}: other metrics")


def note(row: Row, run: Run, code: int | str, expected: tuple[int, ...], counted: bool = True) -> None:
    # A process that SIGINT ends on its last way out, after the run; a shell and the launchers say 130 of it too.
    if code == -signal.SIGINT:
        code = 128 + signal.SIGINT
    if counted:
        row.codes[code] += 1
        row.most_lines = max(row.most_lines, run.errors.count("\n"))
    row.tracebacks += "Traceback" in run.errors
    if code not in expected:
        last = (run.errors.strip().splitlines() or [""])[-1]
        row.wrong.append(f"exit code {code}, expected one of {', '.join(map(str, expected))}: {last[:200]}")


def undisturbed(folder: pathlib.Path, cache: pathlib.Path) -> Undisturbed:
    folder.mkdir()
    run = Run(folder, cache)
    run.in_the_loop.wait(HUNG)
    looping = time.monotonic()
    code = run.end()
    if code:
        raise SystemExit(f"the undisturbed run ended with {code}:\n{run.errors}")
    size = sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file())
    return Undisturbed(metric_lines(folder / "run"), looping - run.began, time.monotonic() - looping, size)


def more(number: int, tries: int | None, deadline: float) -> bool:
    return number < tries if tries is not None else time.monotonic() < deadline


def attempt_pair(
    name: str, row: Row, folder: pathlib.Path, cache: pathlib.Path, whole: soak_pairs.Undisturbed,
    generator: random.Random,
) -> None:
    """The same for a run of two processes."""
    equal, codes, wrong = soak_pairs.attempt(name, folder, cache, whole, generator, MOST_STOPS, metric_lines)
    row.tries += 1
    row.equal += equal
    row.stops += sum(codes.values())
    row.codes += codes
    row.wrong += wrong


def table(rows: dict[str, Row]) -> str:
    lines = [("kind", "tries", "equal", "stops", "exit codes", "most lines", "tracebacks")]
    for name, row in rows.items():
        codes = " ".join(f"{code}x{count}" for code, count in sorted(row.codes.items(), key=str))
        numbers = (row.tries, row.equal, row.stops, codes, row.most_lines, row.tracebacks)
        lines.append((name, *map(str, numbers)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*KINDS, *soak_pairs.KINDS]
    add = parser.add_argument
    add("--seconds", type=float, default=600.0, help="begin no further try after so long (default 600)")
    add("--tries", type=int, default=None, help="make so many instead, however long they take")
    add("--kinds", default=",".join(every), help=f"of {', '.join(every)} (default all), taken in turn")
    add("--seed", type=int, default=None, help="of the random moments (default another each time)")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    unknown = [name for name in kinds if name not in every]
    if unknown:
        parser.error(f"--kinds {unknown[0]!r}: expected some of {', '.join(every)}")
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    generator = random.Random(seed)
    rows = {name: Row() for name in kinds}
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        folder = pathlib.Path(place)
        cache = folder / "cache"
        whole = undisturbed(folder / "undisturbed", cache) if set(kinds) & set(KINDS) else None
        pair = None
        if set(kinds) & set(soak_pairs.KINDS):
            pair = soak_pairs.undisturbed(folder / "pairs", cache, metric_lines)
        for what, run in (("undisturbed", whole), ("two processes", pair)):
            if run is not None:
                print(f"{what}: {run.start:.1f} s to the first line, {run.loop:.1f} s of training; seed {seed}")
        began = time.monotonic()
        longest = sum(run.start + run.loop for run in (whole, pair) if run is not None)
        number = 0
        while more(number, arguments.tries, began + arguments.seconds - longest):
            name = kinds[number % len(kinds)]
            row, place_of_try, this_began = rows[name], folder / f"{number:03d}", time.monotonic()
            known = len(row.wrong)
            if name in KINDS:
                attempt(name, row, place_of_try, cache, whole, generator)
            else:
                attempt_pair(name, row, place_of_try, cache, pair, generator)
            print(f"{name}: {row.equal} of {row.tries} equal", *row.wrong[known:], sep="\n  ", flush=True)
            shutil.rmtree(place_of_try, ignore_errors=True)
            longest, number = max(longest, time.monotonic() - this_began), number + 1
        spent = time.monotonic() - began
    print(f"{number} tries in {spent:.0f} s, {spent / max(number, 1):.0f} s each")
    print(table(rows))
    wrong = [f"{name}: {what}" for name, row in rows.items() for what in row.wrong]
    wrong += [f"{name}: no try" for name, row in rows.items() if not row.tries]
    wrong += [f"{name}: {row.tracebacks} tracebacks" for name, row in rows.items() if row.tracebacks]
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
