"""Adaptive masking: a token is hidden the more often the worse it is still predicted, by a running mean of its loss.

    maskformer train --config=configs/adaptive.py:mini --workdir=runs/adaptive
    maskformer train --config=configs/adaptive.py:mini --config.objective.decay=0.9 --workdir=runs/adaptive-quick

Sizes and options are those of configs/bert.py; only the choice of positions differs. Evaluation hides all tokens alike,
so that its numbers compare with those of other runs.
"""

from configs import bert
from maskformer.training import objectives_section


def get_config(arg=None):
    config = bert.get_config(arg)
    config.objective = objectives_section("conditional_mlm", weights="loss", rate=config.objective.rate)
    return config


sweep_seeds = bert.sweep_seeds
