"""Draw a mask as text, and as a PNG if asked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from maskformer.cli.files import check_writable, writing
from maskformer.cli.parser import Parser, no_config


def add_arguments(parser: Parser) -> None:
    parser.epilog = "--config=RECIPE.py makes the masks known that the recipe registers"
    parser.add_argument("expression", help="such as 'causal & window(8)'")
    parser.add_argument("--length", type=int, default=32, help="query length (and key length)")
    parser.add_argument("--kv-length", type=int, help="key length, when it differs")
    parser.add_argument("--blocks", type=int, help="show the block map for tiles of this size")
    parser.add_argument("--png", help="write a picture too")


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    check_writable("--png", arguments.png)
    from maskformer import masks

    has_recipe = bool(config_flags)
    if has_recipe:
        from maskformer.training import recipes

        # A recipe registers the masks of its own when it is read.
        recipes.load_config(config_flags)
    else:
        no_config(config_flags)
    try:
        with writing("--png", arguments.png):
            picture = masks.picture(
                arguments.expression,
                arguments.length,
                kv_length=arguments.kv_length,
                block=arguments.blocks,
                path=arguments.png,
            )
    except ValueError as error:
        if "unknown mask" in str(error) and not has_recipe:
            raise ValueError(f"{error}; a mask that a recipe registers needs --config=RECIPE.py") from error
        raise
    print(picture)
    return 0
