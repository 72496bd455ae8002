"""Say what a config needs on TPUs or GPUs that are not here, and whether it fits; exit code 1 where it does not."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from maskformer.checks import integer, number
from maskformer.cli.files import folder, writing
from maskformer.cli.parser import CONFIG_HELP, Parser


def add_arguments(parser: Parser) -> None:
    parser.epilog = CONFIG_HELP
    parser.add_argument("--topology", required=True, help="CHIP:SHAPE, such as v5p:4x4x8, or h100:8x4 for 4 hosts of 8")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices of that shape, joined by the network")
    parser.add_argument("--search", action="store_true", help="rank all layouts; the config's mesh is not looked at")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None,
        help="ask the TPU's compiler, which takes minutes (default: where maskformer[tpu] is installed)",
    )  # fmt: skip
    parser.add_argument("--best", type=int, help="with --search: how many layouts are compiled, 1 to 3 (default 1)")
    parser.add_argument("--price", type=float, help="US dollars for one chip and hour (default: an estimate)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON; docs/plan.md has its keys")
    parser.add_argument("--workdir", type=folder, help="folder of the run, in which plan.json is stored for report")


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    if arguments.best is not None:
        integer("--best", arguments.best, 1, 3)
        if not arguments.search or arguments.compile is False:
            raise ValueError(
                f"--best={arguments.best}: says how many of --search are compiled; give both, or leave it out"
            )
    if arguments.price is not None:
        number("--price", arguments.price, "dollars from 0 to below 10000", 0.0, 1e4)
    # Of this machine nothing is asked but its processor: an accelerator that is here may be at work.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from maskformer import planning
    from maskformer.training import recipes

    topology = planning.parse_topology(arguments.topology, arguments.slices)
    config, _ = recipes.load_config(config_flags)
    made = planning.plan(
        config,
        topology,
        search=arguments.search,
        compile=arguments.compile,
        best=arguments.best or 1,
        price=arguments.price,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    plain = planning.plain(made)
    print(json.dumps(plain, indent=2) if arguments.json else planning.render(made))
    if arguments.workdir is not None:
        with writing("--workdir", arguments.workdir):
            planning.write_plan(arguments.workdir, plain)
    return 0 if made.fits else 1
