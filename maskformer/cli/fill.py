"""Predict the [MASK] tokens of a text, or of sentences from the test split."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from maskformer.checks import integer, printable, require
from maskformer.cli.files import folder
from maskformer.cli.parser import REGISTERS_HELP, Parser


def add_arguments(parser: Parser) -> None:
    parser.epilog = REGISTERS_HELP
    parser.add_argument("text", nargs="*", help="text with [MASK] in it; default: masked sentences of the test split")
    parser.add_argument("--workdir", required=True, type=folder)
    parser.add_argument("--checkpoint", default="best", choices=("best", "latest"))
    parser.add_argument("--top", type=int, default=5, help="predictions to show for each [MASK]")
    parser.add_argument(
        "--examples", type=int, metavar="N", help="sentences of the test split, where no text is given (5)"
    )


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    integer("--top", arguments.top, 1)
    if arguments.examples is not None:
        integer("--examples", arguments.examples, 1)
        require(not arguments.text, "--examples", arguments.examples, "no text, whose place they take")
    from maskformer import evaluation
    from maskformer.training import runs

    run = runs.load(arguments.workdir, overrides=config_flags, checkpoint=arguments.checkpoint)
    for text in arguments.text or evaluation.example_texts(run, arguments.examples or 5):
        # Neither a text nor a piece of a vocabulary may move the cursor; the lines of a text stay lines.
        print("\n".join(map(printable, text.split("\n"))))
        for number, guesses in enumerate(evaluation.fill_text(run, text, arguments.top), start=1):
            shown = "   ".join(f"{printable(guess.token)} {guess.probability:.1%}" for guess in guesses)
            print(f"  [MASK] {number}: {shown}")
    return 0
