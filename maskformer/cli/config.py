"""Print the config as it would run, checked."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from maskformer.cli.parser import CONFIG_HELP, Parser


def add_arguments(parser: Parser) -> None:
    parser.epilog = CONFIG_HELP


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    from maskformer.training import recipes, resolve
    from maskformer.training.config import plain

    values, _ = recipes.load_config(config_flags)
    resolve(values)
    print(json.dumps(plain(values), indent=2))
    return 0
