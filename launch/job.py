"""What every launcher starts: one `Job`. A launcher is one file that renders it for its scheduler and submits it.

Such a file has `render(job, ...)`, which starts nothing and returns what would be submitted, and a `main` that reads
its flags with `Parser` (`docs/launch.md` shows one).

Exit codes are the contract with the command, and `Restarts` is what every launcher makes of them: 75 (`EX_TEMPFAIL`)
means "stopped after saving, run me again" and costs nothing; 0, 2 (usage) and 130 (somebody pressed Ctrl-C) are never
started again; all others, such as 1, 70 (hung) and 137 (killed), are counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import pathlib
import posixpath
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

EX_USAGE = 2
EX_TEMPFAIL = 75
EX_INTERRUPTED = 130
# A command that is stopped again and again within this time makes no progress: after so many in a row it has failed.
QUICK = 60.0
QUICK_IN_A_ROW = 10
LONGEST_PAUSE = 60.0
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
      restarts: how many times it is started again after a failure; `Restarts` says what counts as one.
      lead: seconds that the processes have to save between SIGTERM and the kill.
      sweep: which runs of a sweep, each of them `processes` large; None for one run.

    Raises:
      ValueError: a field that no scheduler could honour.
    """

    command: Sequence[str]
    processes: int = 1
    restarts: int = 0
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
        check_count("--max-restarts", self.restarts, 0)
        check(math.isfinite(self.lead) and self.lead >= 0, "--lead", self.lead, "seconds, at least 0")
        used = [word for word in self.command if INDEX in word]
        if used and self.sweep is None:
            raise ValueError(f"{' '.join(used)}: {INDEX} needs --array")

    def local_workdir(self, mounts: Sequence[str] = ()) -> str | None:
        """The `--workdir` of the command, where it is a folder of the machine that lies below none of `mounts`.

        >>> Job(["train", "--workdir=runs/x"]).local_workdir(), Job(["train", "--workdir", "gs://b/x"]).local_workdir()
        ('runs/x', None)
        >>> Job(["train", "--workdir=/mnt/runs/x"]).local_workdir(["/mnt/runs"])
        """
        flag = "--workdir"
        given = [word.removeprefix(f"{flag}=") for word in self.command if word.startswith(f"{flag}=")]
        given += [after for word, after in zip(self.command, self.command[1:]) if word == flag]
        for workdir in given:
            path = pathlib.PurePosixPath(posixpath.normpath(workdir))
            if workdir and "://" not in workdir and not any(path.is_relative_to(mount) for mount in mounts):
                return workdir
        return None

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


class Restarts:
    """What becomes of a run after each of its ends, by exit code.

    One that stopped after saving (75) is started again for nothing. One that is done (0), was called wrongly (2) or was
    interrupted (130) is not. Every other end is a failure, of which there may be `most`. Between two starts there is a
    pause of a second, doubled for each run in a row that ended within a minute, up to a minute. The tenth 75 in a row
    that came within a minute is the last: such a command is stopped by something that starting it again does not mend.

    >>> restarts = Restarts(most=1)
    >>> [restarts.pause(code, seconds=3600.0) for code in (75, 75, 137, 75, 0)]
    [1.0, 1.0, 1.0, 1.0, None]
    >>> restarts.pause(1, seconds=3600.0)  # the one failure was the 137
    """

    def __init__(self, most: int):
        self.most = most
        self.failures = 0
        self._quick = 0
        self._stops = 0

    def pause(self, code: int, seconds: float) -> float | None:
        """Seconds to wait before the next start after one that took `seconds`; None where there is none."""
        if code in (0, EX_USAGE, EX_INTERRUPTED):
            return None
        quick = seconds < QUICK
        self._quick = self._quick + 1 if quick else 0
        self._stops = self._stops + 1 if quick and code == EX_TEMPFAIL else 0
        if code != EX_TEMPFAIL:
            self.failures += 1
        if self.failures > self.most or self._stops == QUICK_IN_A_ROW:
            return None
        return min(2.0 ** max(self._quick - 1, 0), LONGEST_PAUSE)

    def words(self, code: int, pause: float) -> str:
        """What to say about the start that `pause` allowed."""
        free = code == EX_TEMPFAIL
        count = "after saving" if free else f"failure {self.failures} of at most {self.most}"
        return f"exit code {code} ({count}): starting again in {pause:g} s"


class Parser(argparse.ArgumentParser):
    """Flags of a launcher, then `--`, then the command, of which nothing is read as a flag.

    Errors are one line and exit code 2. `job_flags` adds what a launcher does with any job, in the words of its
    scheduler; one that cannot leaves them out.
    """

    def __init__(self, module: str, description: str | None):
        super().__init__(
            prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self._flags: list[str] = []
        self.add_argument("command", nargs="*", metavar="-- command", help="what every process runs")

    def error(self, message: str) -> NoReturn:
        # "argument --x: 0: expected ..." is argparse's way to say "--x 0: expected ...".
        plain = re.sub("^argument ([^:]+): ", r"\g<1> ", message)
        unknown = [word for word in self._flags if word.startswith("--") and not self._known(word)]
        if unknown and re.search("arguments .*required", message):
            plain = self._unrecognized(unknown)  # a flag that is misspelt is why one is missing
        self.exit(EX_USAGE, f"error: {plain}\n")

    def _known(self, word: str) -> bool:
        name = word.partition("=")[0]
        return any(flag.startswith(name) for flag in self._option_string_actions)

    def _unrecognized(self, words: Sequence[str], command: bool = False) -> str:
        """What to say about unknown flags; `command`: whether they follow words of the command."""
        text = f"unrecognized arguments: {' '.join(words)}"
        if command or any(word.startswith(("--config", "--workdir")) for word in words):
            return f"{text}; write `--` before the command"
        flags = {flag.strip("-"): flag for flag in self._option_string_actions}
        name = next((word for word in words if word.startswith("-")), "").partition("=")[0].strip("-")
        near = difflib.get_close_matches(name[:100], flags, 1)
        return f"{text}; did you mean {flags[near[0]]}?" if near else text

    def job_flags(self, lead: str = "--lead", restarts: int = 10, seconds: float = 120) -> None:
        """Adds flags for `Job.restarts`, `Job.lead` (under the name given) and `Job.sweep`; `job` reads them."""
        add = self.add_argument
        add("--max-restarts", dest="restarts", type=whole(0), default=restarts, metavar="N",
            help=f"start again after at most N failures, exit code 75 not counted (default {restarts})")  # fmt: skip
        add(lead, dest="lead", type=number, default=seconds, metavar="S",
            help=f"seconds to save between SIGTERM and the kill (default {seconds:g})")  # fmt: skip
        add("--array", dest="sweep", type=_sweep, metavar="RUNS",
            help="runs of a sweep: 0-7, 1,3,5 or 0-99%%4 (at most four at a time)")  # fmt: skip
        add("--max-parallel", dest="at_once", type=whole(), metavar="N",
            help="at most N runs of the sweep at a time; the same as %%N in --array")  # fmt: skip

    @staticmethod
    def job(arguments: argparse.Namespace, processes: int) -> Job:
        """The job of what `parse` returned.

        Raises:
          ValueError: a field that no launcher could honour, or flags that contradict each other.
        """
        sweep, at_once = arguments.sweep, arguments.at_once
        if at_once is not None:
            check(sweep is not None, "--max-parallel", at_once, "a sweep: give its runs with --array")
            check(sweep.at_once in (None, at_once), "--max-parallel", at_once, f"that of --array {sweep}, or none")
            sweep = dataclasses.replace(sweep, at_once=at_once)
        return Job(arguments.command, processes, arguments.restarts, arguments.lead, sweep)

    @staticmethod
    def warn_of_local_workdir(job: Job, mounts: Sequence[str] = (), way: str = "") -> None:
        """One line where the run is likely to be lost with its machine; `way` is another way out than a bucket."""
        if (workdir := job.local_workdir(mounts)) is not None:
            words = "lies on each machine's own disk, which no other sees and which goes with it"
            print(f"warning: --workdir={workdir} {words}: give gs://BUCKET/...{way}", file=sys.stderr)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The flags, and the command as it was written."""
        words = list(sys.argv[1:] if argv is None else argv)
        end = words.index("--") if "--" in words else len(words)
        self._flags = words[:end]
        arguments, unknown = self.parse_known_args(self._flags)
        if unknown:
            self.error(self._unrecognized(unknown, bool(arguments.command) and "--" not in words))
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


def counts(text: str) -> list[int]:
    """A type for argparse: whole numbers of at least 1, separated by commas."""
    return [whole()(word) for word in text.split(",")]


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
            try:
                pathlib.Path(output).write_bytes(text.encode("utf-8", "surrogateescape"))
            except OSError as error:
                raise ValueError(f"--output {output}: {error.strerror}") from None
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
