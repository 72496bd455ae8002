"""Run a recipe's sweep one run after another, list its runs, or show how each of them is doing."""

from __future__ import annotations

import argparse
import concurrent.futures
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from maskformer.checks import printable, shown
from maskformer.cli import EX_USAGE
from maskformer.cli.files import folder
from maskformer.cli.parser import CONFIG_HELP, Parser
from maskformer.training.preemption import EX_INTERRUPTED, EX_TEMPFAIL

if TYPE_CHECKING:
    from maskformer.training.status import RunStatus

# What is started again by --rerun-failed, and why the others are not.
AGAIN = ("failed", "hung", "lost")
LEFT_ALONE = {
    "waiting": "was never started; the same command without --rerun-failed, or its launcher, starts it",
    "running": "somebody works on it",
    "done": "has all of its steps",
    "preempted": "has saved; the same command without --rerun-failed, or its launcher, goes on with it",
}
LONGEST_WHY = 120
# A bucket is asked about so many runs at a time.
THREADS = 16


def add_arguments(parser: Parser) -> None:
    parser.epilog = CONFIG_HELP
    parser.elsewhere["--sweep-index"] = "`maskformer train --sweep-index=INDEX` runs one entry"
    parser.add_argument("--workdir", default="runs/sweep", type=folder)
    parser.add_argument("--sweep", metavar="NAME", help="which sweep of the recipe (sweep_NAME)")
    parser.add_argument("--list", action="store_true", help="list and check the runs only")
    parser.add_argument(
        "--status", action="store_true", help="show how each run is doing; without --config, those below the workdir"
    )
    parser.add_argument(
        "--rerun-failed", action="store_true", help="run those again that failed, hung or were lost, and no others"
    )


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    asked = [flag for flag in ("list", "status", "rerun_failed") if getattr(arguments, flag)]
    if len(asked) > 1:
        first, second = (f"--{flag.replace('_', '-')}" for flag in asked[:2])
        raise ValueError(f"{second}: not together with {first}")
    from maskformer.training import recipes, resolve, sweeps

    if arguments.status and not config_flags:
        if arguments.sweep is not None:
            raise ValueError(f"--sweep={shown(arguments.sweep)}: is one of a recipe; give its --config too")
        return _show_folders(arguments.workdir)
    values, recipe = recipes.load_config(config_flags)
    sweep = arguments.sweep or "sweep"
    runs = recipes.load_sweep(recipe, sweep)
    if arguments.status:
        return _show({f"{index:03d}": _words(overrides) for index, overrides in enumerate(runs)}, arguments.workdir)
    function = sweep if sweep == "sweep" else f"sweep_{sweep}"
    for index, overrides in enumerate(runs):
        try:
            resolve(sweeps.apply(values, overrides))
        except ValueError as error:
            raise ValueError(f"{function}() entry {index}: {error}") from error
    left = _left_alone(arguments.workdir, len(runs)) if arguments.rerun_failed else {}
    failed = {}
    for index, overrides in enumerate(runs):
        if index in left:
            print(f"{index:03d}  left alone, {left[index]}", flush=True)
            continue
        print(f"{index:03d}  {_words(overrides)}", flush=True)
        if not arguments.list:
            command = [sys.executable, "-m", "maskformer.cli", "train", *config_flags, f"--workdir={arguments.workdir}"]
            code = _train([*command, f"--sweep={sweep}", f"--sweep-index={index}"])
            if code in (EX_TEMPFAIL, EX_INTERRUPTED):
                return code  # told to stop, which is meant for all of them
            if code:
                failed[index] = code
                print(f"{index:03d}  failed with exit code {code}", flush=True)
    if failed:
        print(_summary(failed, len(runs)), flush=True)
    return next(iter(failed.values()), 0)


def _summary(failed: Mapping[int, int], count: int) -> str:
    """Which runs failed, by their exit codes, and what runs each of them again.

    A usage error may come before the run's folder has anything in it: for --rerun-failed it was then never started.

    >>> print(_summary({0: 1, 3: 2}, 4))
    2 of 4 runs failed: 000 (1), 003 (2)
    000: --rerun-failed runs it again
    003: mend its config, then run the same command
    """
    said = ", ".join(f"{index:03d} ({code})" for index, code in failed.items())
    lines = [f"{len(failed)} of {count} runs failed: {said}"]
    mistaken = [index for index, code in failed.items() if code == EX_USAGE]
    again = [index for index in failed if index not in mistaken]
    if again:
        lines.append(f"{_names(again)}: --rerun-failed runs {'it' if len(again) == 1 else 'them'} again")
    if mistaken:
        whose = "its config" if len(mistaken) == 1 else "their configs"
        lines.append(f"{_names(mistaken)}: mend {whose}, then run the same command")
    return "\n".join(lines)


def _names(indices: Sequence[int]) -> str:
    return ", ".join(f"{index:03d}" for index in indices)


def _shortened(text: str) -> str:
    """One line of at most `LONGEST_WHY` characters: both ends of a longer one, in whole words."""
    text = printable(text)
    if len(text) <= LONGEST_WHY:
        return text
    half = (LONGEST_WHY - 5) // 2
    # With the character at the cut: a word that ends there is whole.
    head, tail = text[: half + 1].rpartition(" ")[0], text[-half - 1 :].partition(" ")[2]
    return f"{head or text[:half]} ... {tail or text[-half:]}"


def _words(overrides: Mapping[str, Any]) -> str:
    return "  ".join(f"{key}={value}" for key, value in overrides.items())


def _statuses(workdir: str, names: Sequence[str]) -> list[RunStatus]:
    from maskformer import paths
    from maskformer.training.status import run_status

    root = paths.resolve(workdir)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda name: run_status(root / name), names))


def _left_alone(workdir: str, count: int) -> dict[int, str]:
    """Why a run is not run again, by its number; those that are not here are."""
    statuses = _statuses(workdir, [f"{index:03d}" for index in range(count)])
    return {
        index: f"{status.state}: {LEFT_ALONE[status.state]}"
        for index, status in enumerate(statuses)
        if status.state not in AGAIN
    }


def _show_folders(workdir: str) -> int:
    """The runs that there are below a workdir, and what they differ in."""
    from maskformer import paths, report
    from maskformer.training.workdir import read_config

    root = paths.resolve(workdir)
    names = sorted(entry.name for entry in root.iterdir() if entry.name.isdecimal()) if root.is_dir() else []
    if not names:
        raise ValueError(f"--workdir={workdir}: no runs of a sweep there; expected folders 000, 001, ... or --config")

    def config(name: str) -> dict[str, Any]:
        try:
            return report.flatten(read_config(root / name))
        except ValueError:
            return {}  # not begun, or damaged: its status says so

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        configs = dict(zip(names, pool.map(config, names)))
    known = [one for one in configs.values() if one]
    keys = dict.fromkeys(key for one in known for key in one)
    differing = [key for key in keys if len({repr(one.get(key)) for one in known}) > 1]
    words = {name: _words({key: one[key] for key in differing if key in one}) for name, one in configs.items()}
    return _show(words, workdir)


def _show(runs: Mapping[str, str], workdir: str) -> int:
    from maskformer.training.tables import markdown_table

    statuses = dict(zip(runs, _statuses(workdir, list(runs))))
    rows = []
    for name, status in statuses.items():
        step = "" if status.state == "waiting" else f"{status.step}/{'?' if status.steps is None else status.steps}"
        metric = "" if status.metric is None else f"{status.metric[0]}={status.metric[1]:.4g}"
        rows.append([name, runs[name], status.state, step, metric, _shortened(status.why)])
    print(markdown_table(["run", "overrides", "state", "step", "last metric", "why"], rows))
    counts = Counter(status.state for status in statuses.values())
    print(", ".join(f"{count} {state}" for state, count in counts.most_common()))
    again = [str(int(name)) for name, status in statuses.items() if status.state in AGAIN]
    if again:
        print(f"to run again: --rerun-failed here, or --array={','.join(again)} with a launcher")
    return 0


def _train(command: Sequence[str]) -> int:
    """Run one training to its end, also when this process is told to stop, and return the code to end with, or 0.

    SIGTERM and SIGINT both reach the training as SIGTERM, after which it saves: a Ctrl-C of a terminal has reached it
    already, and a second SIGINT means not to save.
    """
    heard: list[int] = []
    training: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if training is not None:
            training.terminate()

    # Only the main thread may set a handler.
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        training = subprocess.Popen(command)
        if heard:  # before there was one
            training.terminate()
        code = training.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    stopped = (0, EX_TEMPFAIL, EX_INTERRUPTED, -signal.SIGTERM, -signal.SIGINT)
    if heard and code in stopped:
        return EX_INTERRUPTED if signal.SIGINT in heard else EX_TEMPFAIL
    return 128 - code if code < 0 else code
