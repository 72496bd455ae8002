"""List the runs of a recipe's sweep, or run them one after another, each in its own process."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from maskformer.cli.files import folder
from maskformer.cli.parser import CONFIG_HELP, Parser


def add_arguments(parser: Parser) -> None:
    parser.epilog = CONFIG_HELP
    parser.add_argument("--workdir", default="runs/sweep", type=folder)
    parser.add_argument("--sweep", default="sweep", metavar="NAME", help="which sweep of the recipe (sweep_NAME)")
    parser.add_argument("--list", action="store_true", help="list and check the runs only")


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    from maskformer.training import recipes, resolve, sweeps

    values, recipe = recipes.load_config(config_flags)
    runs = recipes.load_sweep(recipe, arguments.sweep)
    for overrides in runs:
        resolve(sweeps.apply(values, overrides))
    for index, overrides in enumerate(runs):
        print(f"{index:03d}  " + "  ".join(f"{key}={value}" for key, value in overrides.items()), flush=True)
        if not arguments.list:
            command = [sys.executable, "-m", "maskformer.cli", "train", *config_flags, f"--workdir={arguments.workdir}"]
            code = subprocess.call([*command, f"--sweep={arguments.sweep}", f"--sweep-index={index}"])
            if code:
                return code
    return 0
