"""Evaluate runs on a split: one run as JSON, several runs or rates as a table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from maskformer import paths
from maskformer.checks import choose, nearest, require
from maskformer.cli.files import check_writable, folder, writing
from maskformer.cli.parser import REGISTERS_HELP, Parser

if TYPE_CHECKING:
    from maskformer.evaluation import Column
    from maskformer.evaluation.measures import Option


def add_arguments(parser: Parser) -> None:
    if parser.recipes:
        from maskformer.training import recipes

        # Before the flags are read: a recipe may register measures of its own.
        for recipe in parser.recipes:
            recipes.register(recipe)
    from maskformer.evaluation import MEASURES

    parser.epilog = f"--config.evaluation.KEY=VALUE changes how it is evaluated; {REGISTERS_HELP}"
    parser.add_argument(
        "--workdir", required=True, nargs="+", type=folder, help="folder of a run; several make a table"
    )
    parser.add_argument("--split", default="test", help="train, validation or test (the default)")
    parser.add_argument("--checkpoint", default="best", choices=("best", "latest"))
    said = "; ".join(f"{name}: {_in_passing(measure.summary)}" for name, measure in MEASURES.items())
    known = f"{{{','.join(MEASURES)}}}"
    parser.add_argument("--metric", nargs="+", default=["loss"], metavar=known, help=said)
    parser.add_argument("--json", metavar="FILE", help="write the results to a file too")
    for argument, options in _options().items():
        _add_option(parser, argument, options)


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    check_writable("--json", arguments.json)
    columns = _columns(arguments)
    from maskformer.data.data_config import SPLITS
    from maskformer.training import comparison, distributed

    choose("--split", arguments.split, SPLITS)
    distributed.initialize()
    compared = comparison.compare(
        arguments.workdir, columns, arguments.split, overrides=config_flags, checkpoint=arguments.checkpoint
    )
    import jax

    if jax.process_index() != 0:
        # All have measured together, and one says it.
        return 0
    results = compared.to_dict()
    if len(arguments.workdir) > 1 or any(column.spread for column in columns.values()):
        print(compared.table())
    else:
        (run,) = results["runs"]
        cells = run.pop("results")
        # One measure's results stand beside the run; several keep their names, which they share in part.
        results = {**run, "split": arguments.split, **(cells if len(cells) > 1 else next(iter(cells.values())))}
        print(json.dumps(results, indent=2))
        if run["rows"] < run["split_rows"]:
            print(
                f"{run['rows']:,} of {run['split_rows']:,} rows: evaluation.max_batches (None for all)", file=sys.stderr
            )
        for column, cell in compared.cells[run["workdir"]].items():
            said = cell if isinstance(cell, str) else columns[column].measure.say(cell)
            print(comparison.named(column, said), file=sys.stderr)
    if arguments.json:
        with writing("--json", arguments.json):
            paths.given(arguments.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _in_passing(summary: str) -> str:
    return summary[:1].lower() + summary[1:].rstrip(".")


def _options() -> dict[str, dict[str, Option]]:
    """The options that are flags, by the flag's name and then by the measures that have them."""
    from maskformer.evaluation import MEASURES

    found: dict[str, dict[str, Option]] = {}
    for name, measure in MEASURES.items():
        for option in measure.options.values():
            if option.help is not None:
                found.setdefault(option.argument, {})[name] = option
    return found


def _flag(argument: str) -> str:
    return f"--{argument.replace('_', '-')}"


def _add_option(parser: Parser, argument: str, options: dict[str, Option]) -> None:
    """The flag of an option, which stands for None unless it is given."""
    flag = _flag(argument)
    if flag in parser.flags or argument in ("command", "owns_process", "parser", "run", "verbose"):
        raise ValueError(f"measure {next(iter(options))!r}: {flag} is a flag of evaluate itself; rename the option")
    option = next(iter(options.values()))
    assert option.help is not None
    said = dict.fromkeys(
        o.help.text + ("" if o.default is None or o.kind is bool else f" (default {o.default})")
        for o in options.values()
        if o.help
    )
    settings: dict[str, Any] = {"help": f"{', '.join(options)}: {'; '.join(said)}", "default": None}
    if option.kind is bool:
        # What is off by default needs no way to be turned off.
        off = all(o.default is False for o in options.values())
        settings["action"] = "store_true" if off else argparse.BooleanOptionalAction
    else:
        settings |= {"type": option.kind, "choices": option.choices or None, "metavar": option.help.metavar}
        if option.help.each:
            settings["nargs"] = "+"
    parser.add_argument(flag, **settings)


def _columns(arguments: argparse.Namespace) -> dict[str, Column]:
    """What to do with each run, by name; every flag is used or refused."""
    from maskformer.evaluation import MEASURES

    for name in arguments.metric:
        registered = "" if arguments.parser.recipes else "; one that a recipe registers needs --config=RECIPE.py"
        expected = f"one of {', '.join(MEASURES)}{nearest(name, MEASURES)}{registered}"
        require(name in MEASURES, "--metric", name, expected)
    given: dict[str, dict[str, Any]] = {name: {} for name in arguments.metric}
    for argument, options in _options().items():
        value = getattr(arguments, argument)
        if value is None:
            continue
        if not options.keys() & given.keys():
            owners, asked = " or ".join(options), ", ".join(given)
            raise ValueError(f"{_flag(argument)}: belongs to --metric={owners}, and only {asked} is asked for")
        for name in options.keys() & given.keys():
            given[name][argument] = value
    columns: dict[str, Column] = {}
    for name in (name for name in MEASURES if name in given):
        columns |= MEASURES[name].columns(**given[name])
    return columns
