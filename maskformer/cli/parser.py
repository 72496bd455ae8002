"""argparse, with mistakes as exceptions of one line that name what was probably meant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from maskformer.checks import closest, nearest, shown

CONFIG_HELP = "--config=RECIPE.py[:ARG] and --config.KEY=VALUE change any key; `maskformer config` prints them all"
REGISTERS_HELP = "--config=RECIPE.py makes known what the run's recipe registers"


class UsageError(ValueError):
    """The command line makes no sense; the parser that says so knows the flags that there are."""

    def __init__(self, message: str, parser: Parser):
        super().__init__(message)
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """As argparse has it, but a mistake is an exception of one line that names what was probably meant.

    Attributes:
      flags: the long flags that it knows.
      elsewhere: flags of another command, and which does what was probably meant.
      recipes: what `--config=` names on this command line.
    """

    def __init__(self, *arguments: Any, **options: Any):
        self.flags: list[str] = []
        self.elsewhere: dict[str, str] = {}
        self.recipes: list[str] = []
        super().__init__(*arguments, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self.flags += [name for name in action.option_strings if name.startswith("--")]
        return action

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[-1] if action.option_strings else action.dest
            known = ", ".join(map(str, action.choices))
            raise UsageError(f"{name} {shown(value)}: expected one of {known}{nearest(value, action.choices)}", self)


def hint(parser: Parser, argv: Sequence[str]) -> str:
    """The flag that was probably meant by one that the parser does not know."""
    for flag in (argument.partition("=")[0] for argument in argv if argument.startswith("--")):
        if flag in parser.elsewhere:
            return f"; {parser.elsewhere[flag]}"
        close = closest(flag, parser.flags)
        if close is not None and flag not in parser.flags and not flag.startswith("--config"):
            return f"; instead of {flag}, did you mean {close}?"
    return "" if parser.prog == "maskformer" else f"; see {parser.prog} --help"


def no_config(config_flags: Sequence[str]) -> None:
    """Refuse `--config` flags: the command has no use for them."""
    if config_flags:
        raise ValueError(f"argument {shown(config_flags[0])}: this command reads no recipe")
