"""Prefix language modelling: a prefix of every document is read both ways, the rest predicted (Raffel et al. 2020).

    maskformer train --config=configs/prefix_lm.py:mini --workdir=runs/prefix_lm

Sizes and options are those of configs/bert.py; only the objective, and with it the attention mask, differs.
"""

from configs import bert
from maskformer.training import objectives_section


def get_config(arg=None):
    config = bert.get_config(arg)
    config.objective = objectives_section("prefix_lm")
    config.evaluation.objective = {}
    return config


sweep_seeds = bert.sweep_seeds
