"""Compare runs: a table of their last evaluations and their curves as a PNG, or where their time went."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence

from maskformer.checks import printable, shown
from maskformer.cli.files import check_writable, folder, writing
from maskformer.cli.parser import Parser, no_config


def add_arguments(parser: Parser) -> None:
    parser.add_argument("workdirs", nargs="+", type=folder)
    parser.add_argument("--output", help="PNG file (default: report.png in the first workdir)")
    parser.add_argument(
        "--goodput", action="store_true", help="say where the wall time went over all starts of each run, instead"
    )
    parser.add_argument("--json", action="store_true", help="with --goodput: as JSON, with every start of a run")


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    no_config(config_flags)
    if arguments.goodput:
        return _goodput(arguments)
    if arguments.json:
        raise ValueError("--json: expected with --goodput only; the curves of a run are in its metrics.jsonl")
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


def _goodput(arguments: argparse.Namespace) -> int:
    if arguments.output is not None:
        raise ValueError(f"--output={shown(arguments.output)}: --goodput draws no picture; leave it out")
    from maskformer.training import goodput

    if arguments.json:
        runs = {str(workdir): goodput.goodput(workdir).to_json() for workdir in arguments.workdirs}
        print(json.dumps(runs, indent=2))
    else:
        print(goodput.table(arguments.workdirs))
    return 0
