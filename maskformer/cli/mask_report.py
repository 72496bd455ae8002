"""Count on real batches, before training, what the objective will hide and predict."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from maskformer.checks import integer
from maskformer.cli.files import check_writable, writing
from maskformer.cli.parser import CONFIG_HELP, Parser


def add_arguments(parser: Parser) -> None:
    parser.epilog = CONFIG_HELP
    parser.add_argument("--batches", type=int, default=8, help="training batches to count over")
    parser.add_argument("--step", type=int, default=0, help="training step, for rates that follow a schedule")
    parser.add_argument("--html", metavar="FILE", help="write the report as an HTML page too")


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    integer("--batches", arguments.batches, 1)
    integer("--step", arguments.step, 0)
    check_writable("--html", arguments.html)
    from maskformer import inspection
    from maskformer.training import runs

    program = runs.prepare(config_flags)
    report = inspection.mask_report(
        program.objective,
        (program.first_batch(program.experiment.train.batch_size, number) for number in range(arguments.batches)),
        key=program.masking_key,
        decode=program.tokenizer.token,
        model=program.model,
        step=arguments.step,
    )
    print(report.to_text(color=sys.stdout.isatty()))
    if arguments.html:
        with writing("--html", arguments.html):
            pathlib.Path(arguments.html).write_text(report.to_html(), encoding="utf-8")
        print(f"page: {arguments.html}")
    return 0
