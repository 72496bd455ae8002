"""What every launcher starts: one `Job`. A launcher is one file that renders it for its scheduler and submits it.

Such a file has `render(job, ...)`, which starts nothing and returns what would be submitted, and a `main` that reads
its flags with `Parser` (`docs/launch.md` shows one).

Exit codes are the contract with the command: 75 (`EX_TEMPFAIL`) means "stopped after saving, run me again"; 130 means
that somebody pressed Ctrl-C, and nothing else than 75 is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

EX_USAGE = 2
EX_TEMPFAIL = 75
EX_INTERRUPTED = 130
# What no scheduler takes; Slurm's arrays end here at the latest.
LARGEST_INDEX = 4_000_000

INDEX = "{index}"


def check(fine: object, field: str, value: Any, expected: str) -> None:
    """Raise the one-line ValueError of a field unless `fine`.

    >>> check(False, "--nodes", 0, "at least 1")
    Traceback (most recent call last):
        ...
    ValueError: --nodes 0: expected at least 1
    """
    if not fine:
        text = repr(value)
        shown = text if len(text) <= 120 else f"{text[:70]} ... {text[-40:]}"
        raise ValueError(f"{field} {shown}: expected {expected}")


def check_count(field: str, value: int, least: int = 1, most: int = 1_000_000) -> None:
    """Raise unless `value` is a whole number of `least` to `most`."""
    check(isinstance(value, int) and not isinstance(value, bool), field, value, "a whole number")
    check(value >= least, field, value, f"at least {least}")
    check(value <= most, field, value, f"at most {most}")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Which runs of a sweep, written as Slurm writes arrays: `0-7`, `1,3,5`, `0-6:2`, `0-99%4` (four at a time).

    >>> Sweep.parse("0-6:2,9%2").indices(), Sweep.parse("0-6:2,9%2").at_once
    ([0, 2, 4, 6, 9], 2)
    >>> Sweep.parse("7-0")
    Traceback (most recent call last):
        ...
    ValueError: --array '7-0': expected ranges that count upwards; did you mean 0-7?
    """

    ranges: tuple[range, ...]
    at_once: int | None = None

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """Reads it.

        Raises:
          ValueError: not of this form, counting down, without a step, or beyond what a scheduler takes.
        """
        number = "[0-9]{1,9}"
        one = f"{number}(-{number}(:{number})?)?"
        field = "--array"
        check(re.fullmatch(f"{one}(,{one})*(%{number})?", text), field, text, "for example 0-7, 1,3,5 or 0-99%4")
        runs, _, limit = text.partition("%")
        ranges = []
        for part in runs.split(","):
            bounds, _, step = part.partition(":")
            first, last = (int(bound) for bound in (bounds.split("-") * 2)[:2])
            check(first <= last, field, text, f"ranges that count upwards; did you mean {last}-{first}?")
            check(last <= LARGEST_INDEX, field, text, f"numbers of at most {LARGEST_INDEX}")
            check(not step or int(step) > 0, field, text, "a step of at least 1 after the colon")
            ranges.append(range(first, last + 1, int(step or 1)))
        check(not limit or int(limit) > 0, field, text, "at least one run at a time after %")
        return cls(tuple(ranges), int(limit) if limit else None)

    def indices(self) -> list[int]:
        """The numbers, in order, each once."""
        return sorted({index for indices in self.ranges for index in indices})

    def __str__(self) -> str:
        parts = []
        for indices in self.ranges:
            first, last, step = indices[0], indices[-1], indices.step
            parts.append(f"{first}" if first == last else f"{first}-{last}" + (f":{step}" if step > 1 else ""))
        return ",".join(parts) + (f"%{self.at_once}" if self.at_once else "")


@dataclasses.dataclass(frozen=True)
class Job:
    """One command, run by each process of a run, and what happens when it is stopped.

    Args:
      command: the program and its arguments, each as the program is to receive it. In a sweep `{index}` becomes the
        number of the run; where no argument has it, `--sweep-index=<number>` is added.
      processes: how many processes run it together, over all hosts.
      requeue: how many times it is started again after exit code 75.
      lead: seconds that the processes have to save between SIGTERM and the kill.
      sweep: which runs of a sweep, each of them `processes` large; None for one run.

    Raises:
      ValueError: a field that no scheduler could honour.
    """

    command: Sequence[str]
    processes: int = 1
    requeue: int = 0
    lead: float = 120
    sweep: Sweep | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "command", tuple(self.command))
        if not self.command:
            raise ValueError("the command is empty: write it after `--`")
        check(self.command[0], "command", list(self.command), "the name of a program first")
        for word in self.command:
            check("\0" not in word, "command", word, "no NUL character, which ends an argument")
        check_count("--processes", self.processes)
        check_count("--requeue", self.requeue, 0)
        check(math.isfinite(self.lead) and self.lead >= 0, "--lead", self.lead, "seconds, at least 0")
        used = [word for word in self.command if INDEX in word]
        if used and self.sweep is None:
            raise ValueError(f"{' '.join(used)}: {INDEX} needs --array")

    def runs(self) -> list[int] | list[None]:
        """The number of each run of the sweep; one None where there is no sweep."""
        return [None] if self.sweep is None else self.sweep.indices()

    def pieces(self) -> list[list[str]]:
        """The arguments, each as the pieces between which the number of the run belongs.

        >>> Job(["train", "--seed=1"], sweep=Sweep.parse("0-3")).pieces()
        [['train'], ['--seed=1'], ['--sweep-index=', '']]
        """
        if self.sweep is None:
            return [[word] for word in self.command]
        words = list(self.command)
        if not any(INDEX in word or word.startswith("--sweep-index") for word in words):
            words.append(f"--sweep-index={INDEX}")
        return [word.split(INDEX) for word in words]

    def arguments(self, index: int | None = None) -> list[str]:
        """The command of one run.

        >>> Job(["train", "--seed={index}"], sweep=Sweep.parse("0-3")).arguments(2)
        ['train', '--seed=2']
        """
        return [str(index).join(pieces) for pieces in self.pieces()]


class Parser(argparse.ArgumentParser):
    """Flags of a launcher, then `--`, then the command, of which nothing is read as a flag.

    Errors are one line and exit code 2. `job_flags` adds what a launcher does with any job, in the words of its
    scheduler; one that cannot leaves them out.
    """

    def __init__(self, module: str, description: str | None):
        super().__init__(
            prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument("command", nargs="*", metavar="-- command", help="what every process runs")

    def error(self, message: str) -> NoReturn:
        # "argument --x: 0: expected ..." is argparse's way to say "--x 0: expected ...".
        plain = re.sub("^argument ([^:]+): ", r"\g<1> ", message)
        self.exit(EX_USAGE, f"error: {plain}\n")

    def job_flags(
        self, requeue: Sequence[str] = ("--requeue",), lead: str = "--lead", requeues: int = 0, seconds: float = 120
    ) -> None:
        """Adds flags for `Job.requeue` and `lead` under the names given, and `--array` for its sweep."""
        add = self.add_argument
        add(*requeue, dest="requeue", type=whole(0), default=requeues, metavar="N",
            help=f"start again after exit code 75, at most N times (default {requeues})")  # fmt: skip
        add(lead, dest="lead", type=number, default=seconds, metavar="S",
            help=f"seconds to save between SIGTERM and the kill (default {seconds:g})")  # fmt: skip
        add("--array", dest="sweep", type=_sweep, metavar="RUNS",
            help="runs of a sweep: 0-7, 1,3,5 or 0-99%%4 (at most four at a time)")  # fmt: skip

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The flags, and the command as it was written."""
        words = list(sys.argv[1:] if argv is None else argv)
        end = words.index("--") if "--" in words else len(words)
        arguments = self.parse_args(words[:end])
        arguments.command += words[end + 1 :]
        return arguments


def whole(least: int = 1, most: int = 1_000_000) -> Callable[[str], int]:
    """A type for argparse: a whole number in ASCII digits, which are all that a scheduler reads."""

    def read(text: str) -> int:
        if not re.fullmatch("-?[0-9]{1,9}", text):
            raise argparse.ArgumentTypeError(f"{text!r:.120}: expected a whole number")
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text}: expected " + (f"at least {least}" if int(text) < least else f"at most {most}")
            )
        return int(text)

    return read


def number(text: str) -> float:
    """A type for argparse: a number of seconds, at least 0, in ASCII digits."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", text):
        raise argparse.ArgumentTypeError(f"{text!r:.120}: expected seconds, at least 0")
    return float(text)


def _sweep(text: str) -> Sweep:
    try:
        return Sweep.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--array ")) from None


def deliver(
    render: Callable[[], str], submit: Callable[[str], str], output: str | None = None, send: bool = False
) -> int:
    """Prints what `render` makes, or writes it to `output`, or (`send`) submits it and prints the answer.

    Returns the exit code: 0, or 2 after an error of one line.
    """
    try:
        text = render()
        # Arguments that are not UTF-8 reach the program as the bytes that they are.
        if output:
            pathlib.Path(output).write_bytes(text.encode("utf-8", "surrogateescape"))
        if send:
            print(submit(text))
        elif not output:
            sys.stdout.flush()
            sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
            sys.stdout.buffer.flush()
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EX_USAGE
    return 0
