"""Prove on real rows and random weights that no prediction sees its own answer; exit code 1 where one does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from maskformer.checks import integer
from maskformer.cli.parser import CONFIG_HELP, Parser


def add_arguments(parser: Parser) -> None:
    parser.epilog = CONFIG_HELP
    parser.add_argument("--rows", type=int, default=2, help="rows to look at; each costs a forward pass per token")


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    integer("--rows", arguments.rows, 1)
    from maskformer import inspection
    from maskformer.training import runs

    program = runs.prepare(config_flags)
    batch = program.first_batch(arguments.rows)
    report = inspection.check_leaks(program.objective, batch, model=program.model, rows=arguments.rows, step=0)
    print(report)
    return 0 if report.ok else 1
