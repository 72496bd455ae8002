"""Causal language modelling: the next token, each document of a packed row on its own (Radford et al. 2019).

    maskformer train --config=configs/gpt.py:mini --workdir=runs/gpt

Sizes and options are those of configs/bert.py; only the objective, and with it the attention mask, differs.
"""

from configs import bert
from maskformer.training import objectives_section


def get_config(arg=None):
    config = bert.get_config(arg)
    config.objective = objectives_section("causal_lm")
    config.evaluation.objective = {}
    return config


sweep_seeds = bert.sweep_seeds
