"""Fill in the middle: causal modelling of documents rearranged as prefix, suffix, middle (Bavarian et al. 2022).

    maskformer train --config=configs/fim.py:mini --workdir=runs/fim

Sizes and options are those of configs/bert.py; only the objective, and with it the attention mask, differs.
"""

from configs import bert
from maskformer.training import objectives_section


def get_config(arg=None):
    config = bert.get_config(arg)
    # The markers are three tokens that no text has; the tokenizer numbers its sentinels from the last id downwards.
    config.data.sentinels = 3
    last = config.data.vocabulary_size - 1
    markers = {"prefix_token": last, "suffix_token": last - 1, "middle_token": last - 2}
    config.objective = objectives_section("fim", **markers)
    config.evaluation.objective = {}
    return config


sweep_seeds = bert.sweep_seeds
