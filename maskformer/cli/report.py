"""Compare runs: a table of their last evaluations and their curves as a PNG."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from maskformer.checks import printable
from maskformer.cli.files import check_writable, folder, writing
from maskformer.cli.parser import Parser, no_config


def add_arguments(parser: Parser) -> None:
    parser.add_argument("workdirs", nargs="+", type=folder)
    parser.add_argument("--output", help="PNG file (default: report.png in the first workdir)")


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    no_config(config_flags)
    check_writable("--output", arguments.output)
    from maskformer import planning, report

    output = arguments.output or str(pathlib.Path(arguments.workdirs[0]) / "report.png")
    print(report.table(arguments.workdirs))
    if (compared := planning.compared(arguments.workdirs)) is not None:
        print(f"\n{compared}")
    with writing("--output", output):
        report.draw_curves(arguments.workdirs, output)
    print(f"curves: {printable(output)}")
    return 0
