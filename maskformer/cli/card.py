"""Begin an experiment card: `maskformer card new NAME` writes one that runs, to be changed."""

from __future__ import annotations

import argparse
import keyword
import pathlib
import re
from collections.abc import Sequence

from maskformer.checks import require
from maskformer.cli.files import writing
from maskformer.cli.parser import Parser, no_config

CARD = '''\
"""NAME: what is compared, on what, for how long.

    python -m experiments.NAME.card
"""

from configs import bert
from experiments.card import Card, Claim

# Nats of test loss, about half a percent of it: a smaller difference would be of no use to anyone.
MARGIN = 0.02


def get_config(arg=None):
    """What all arms have in common: the demo's BERT, for two CPU cores."""
    config = bert.get_config("demo")
    config.train.steps, config.optimizer.warmup_steps = 600, 60
    config.evaluation.every = config.checkpoint.every = 300
    return config


def measure(run):
    """What is measured of each finished run: under the same masks whatever the arm."""
    metrics = run.measure("loss", rate=0.15)
    return {"loss": metrics["loss"], "accuracy": metrics["accuracy"]}


def claims(results):
    """Each says that the mean over seeds of its effects exceeds a margin."""
    effects = results.difference("loss", "15%", "40%")
    return [Claim("training at 40% is better than at 15%", effects, MARGIN, "nats")]


CARD = Card(
    __file__,
    config=get_config,
    arms={"15%": {"objective.rate": 0.15}, "40%": {"objective.rate": 0.4}},
    measure=measure,
    claims=claims,
    seeds=range(5),
)
sweep = CARD.sweep

if __name__ == "__main__":
    CARD.main()
'''

README = """\
# NAME

Authors, year, *Title* (arXiv:NUMBER).

**The paper.** What it claims, and its table:

| setting | number |
|---|---|
| | |

**What can be tested here.**

1. The first claim, in terms of what this card measures.

**How.** What is trained, on what, for how long; what is the same in all arms, and what differs.

```sh
python -m experiments.NAME.card
```

`--steps=20 --seeds 0` tries it out.

**Results**, rendered from `results.json` by `--write`, and drawn below.

<!-- results -->
<!-- end of results -->

![results](results.png)

**What differs from the paper.**

**Pitfalls.**
"""


def add_arguments(parser: Parser) -> None:
    parser.epilog = "docs/experiments.md explains what a card says"
    parser.add_argument("action", choices=("new",), help="new: write the skeleton of a card")
    parser.add_argument("name", help="of the card's folder, such as mask_rate")
    parser.add_argument("--folder", default="experiments", help="where the cards are (default: experiments)")


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    no_config(config_flags)
    with writing("--folder", arguments.folder):
        written = write_skeleton(arguments.name, pathlib.Path(arguments.folder))
    print(f"card      {written / 'card.py'}\nprose     {written / 'README.md'}")
    print(f"try it    python -m experiments.{arguments.name}.card --steps=20 --seeds 0")
    return 0


def write_skeleton(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Write a card that runs as it is: two arms, one claim.

    Args:
      name: of the card.
      folder: where the cards are.

    Returns:
      The folder of the card, with `card.py`, `README.md` and `__init__.py`.

    Raises:
      ValueError: not a name for a Python package, or one that is taken; or there are no cards in `folder`.
    """
    fits = re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None and not keyword.iskeyword(name)
    require(fits, "card", name, "a name of lower-case letters, digits and underscores, such as mask_rate")
    there = (folder / "card.py").is_file()
    require(there, "--folder", str(folder), "the experiments/ of a clone of maskformer, which has card.py")
    card = folder / name
    taken = card.exists() or card.with_suffix(".py").exists()
    require(not taken, "card", name, f"a new name; there is one in {str(folder)!r} already")
    card.mkdir()
    (card / "__init__.py").write_text("")
    (card / "card.py").write_text(CARD.replace("NAME", name))
    (card / "README.md").write_text(README.replace("NAME", name))
    return card
