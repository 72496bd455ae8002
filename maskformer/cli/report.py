"""Compare runs: a table of their last evaluations and their curves as a PNG, or where their time went."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from maskformer import paths
from maskformer.checks import printable, shown
from maskformer.cli.files import check_writable, folder, writing
from maskformer.cli.parser import Parser, no_config
from maskformer.paths import AnyPath


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

    workdirs = _runs(arguments.workdirs, report.is_run)
    output = arguments.output or str(paths.given(workdirs[0]) / "report.png")
    print(report.table(workdirs))
    if (compared := planning.compared(workdirs)) is not None:
        print(f"\n{compared}")
    with writing("--output", output):
        report.draw_curves(workdirs, output)
    print(f"curves: {printable(output)}")
    return 0


def _runs(workdirs: Sequence[str], is_run: Callable[[AnyPath], bool]) -> Sequence[str]:
    """Those of the folders that hold a run, with a warning for each other one; all of them where none does.

    Raises:
      ValueError: none does, and one is the folder of a sweep.
    """
    runs = [workdir for workdir in workdirs if is_run(paths.given(workdir))]
    for workdir in workdirs:
        if not runs:
            _refuse_sweep(workdir, is_run)
        elif workdir not in runs:
            print(f"warning: workdir {shown(workdir)}: no run there, or none that has begun; left out", file=sys.stderr)
    return runs or workdirs


def _refuse_sweep(workdir: str, is_run: Callable[[AnyPath], bool]) -> None:
    folder = paths.given(workdir)
    entries = [entry for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []
    if any(is_run(entry) for entry in entries):
        # A shell expands no pattern in a bucket.
        below = f"{workdir}/*" if paths.is_local(workdir) else f"{workdir}/{min(entry.name for entry in entries)} ..."
        raise ValueError(
            f"workdir {shown(workdir)}: the folder of a sweep, expected its runs: `maskformer report {below}`, or "
            f"`maskformer sweep --workdir={workdir} --status`"
        )


def _goodput(arguments: argparse.Namespace) -> int:
    if arguments.output is not None:
        raise ValueError(f"--output={shown(arguments.output)}: --goodput draws no picture; leave it out")
    from maskformer.training import events, goodput, lines

    workdirs = _runs(arguments.workdirs, lambda folder: lines.exists(folder / events.EVENTS))
    if arguments.json:
        runs = {str(workdir): goodput.goodput(workdir).to_json() for workdir in workdirs}
        print(json.dumps(runs, indent=2))
    else:
        print(goodput.table(workdirs))
    return 0
