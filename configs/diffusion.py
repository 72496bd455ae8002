"""Masked diffusion: a rate drawn for each row, loss weighted by its inverse (Sahoo et al. 2024, Nie et al. 2025).

    maskformer train --config=configs/diffusion.py:mini --workdir=runs/diffusion

Sizes and options are those of configs/bert.py; only the objective, and with it the attention mask, differs.
"""

from configs import bert
from maskformer.training import objectives_section


def get_config(arg=None):
    config = bert.get_config(arg)
    config.objective = objectives_section("diffusion")
    config.evaluation.objective = {}
    return config


sweep_seeds = bert.sweep_seeds
