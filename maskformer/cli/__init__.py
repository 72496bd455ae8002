"""The command line: `maskformer train | evaluate | fill | check | mask-report | mask | config | plan | sweep | ...`.

Each command is one module of this package, and a new one needs nothing else. `card.py` is the command `maskformer card`
(`mask_report.py` is `mask-report`); the first line of its docstring is its summary in `maskformer --help`; and it has

    def add_arguments(parser: Parser) -> None
        Its flags. `parser.epilog` may be set, and `parser.recipes` are the recipes that `--config=` names, for a
        command whose flags depend on what a recipe registers. Called only when this command is the one that is run.
        The names `command`, `owns_process`, `parser`, `run` and `verbose` are taken.

    def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int
        Does it and returns the exit code. `config_flags` are the `--config...` flags as they were written; a command
        that reads no recipe refuses them (`cli.parser.no_config`). `arguments.owns_process` says that the process is
        this command and nothing else, which may then answer its signals.

A mistake of the user is a `ValueError` of one line: it ends the command with exit code 2. Modules of commands import
nothing that imports JAX before `run` (or before `add_arguments`, where flags come from a table): `maskformer --help`
imports all of them.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from maskformer.checks import origin, printable
from maskformer.cli.parser import Parser, UsageError, hint
from maskformer.textfiles import DiskFullError, UnreachableError
from maskformer.training.preemption import EX_INTERRUPTED, EX_TEMPFAIL, end_failed

__all__ = ["EX_USAGE", "commands", "create_parser", "main"]

# The exit codes a launcher sees. A usage error is 2, as in argparse; 75 (EX_TEMPFAIL) asks to be run again.
EX_USAGE = 2

# In the order in which they are used; the others follow by name.
ORDER = ("train", "evaluate", "fill", "check", "mask-report", "mask", "config", "plan", "sweep", "report")


def commands() -> dict[str, ModuleType]:
    """The modules of this package that are commands, by the command's name."""
    modules = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
        if not module.name.startswith("_")
    ]
    found = {
        module.__name__.rpartition(".")[2].replace("_", "-"): module for module in modules if hasattr(module, "run")
    }
    return {name: found[name] for name in sorted(found, key=lambda name: (*_place(name), name))}


def _place(name: str) -> tuple[int]:
    return (ORDER.index(name) if name in ORDER else len(ORDER),)


def create_parser(argv: Sequence[str]) -> Parser:
    """The parser of all commands, with the flags of the one that `argv` runs.

    Raises:
      ValueError: that command's flags depend on a recipe that cannot be read.
    """
    parser = Parser(prog="maskformer", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--verbose", action="store_true", help="show the libraries' own log lines too")
    subparsers = parser.add_subparsers(dest="command", required=True)
    # Before the command stand only flags without a value.
    asked = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, module in commands().items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = subparsers.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=module.run, parser=command)
        if name == asked:
            command.recipes = [a.partition("=")[2] for a in argv if a.startswith("--config=")]
            module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a usage error is one line on stderr and exit code 2."""
    owns_process = argv is None
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments, rest = create_parser(argv).parse_known_args(argv)
        for flag in rest:
            if not flag.startswith(("--config=", "--config.")):
                raise UsageError(f"argument {flag!r}: no such flag here", arguments.parser)
    except UsageError as error:
        return _refuse(f"{error}{hint(error.parser, argv)}")
    except ValueError as error:
        if "--verbose" in argv:
            raise
        return _refuse(error)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    if not arguments.verbose:
        logging.getLogger("absl").setLevel(logging.ERROR)
    arguments.owns_process = owns_process
    code = 1
    try:
        code = arguments.run(arguments, rest)
        if owns_process:
            sys.stdout.flush()
    except Exception as error:
        if owns_process and isinstance(error, BrokenPipeError) and _unread():
            # As `| head` leaves it: no mistake, and Python is not to complain at its end either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 128 + signal.SIGPIPE
        elif isinstance(error, _mistakes()) and not arguments.verbose:
            # Code of a recipe may fail by a ValueError too, and is then to be named.
            # What may go well at the next start is no mistake of the command.
            code = _refuse(f"{origin(error)}{error}", 1 if isinstance(error, _failures()) else EX_USAGE)
        elif owns_process:
            traceback.print_exception(error)
        else:
            raise
    if owns_process and code not in (0, EX_TEMPFAIL, EX_INTERRUPTED):
        end_failed(code)
    return code


def _unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _mistakes() -> tuple[type[Exception], ...]:
    """What is no fault of the program; looked up when something was raised, since JAX comes with it."""
    from maskformer.training.checkpoints import CheckpointError
    from maskformer.training.distributed import JoinError
    from maskformer.training.workdir import RunError

    return ValueError, CheckpointError, JoinError, RunError


def _failures() -> tuple[type[Exception], ...]:
    """Of `_mistakes`, what comes from outside and not from the command."""
    from maskformer.training.distributed import JoinError
    from maskformer.training.workdir import RunError

    return DiskFullError, UnreachableError, JoinError, RunError


def _refuse(error: object, code: int = EX_USAGE) -> int:
    print(f"error: {printable(str(error))}", file=sys.stderr)
    return code
