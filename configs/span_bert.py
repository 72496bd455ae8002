"""SpanBERT: contiguous spans of words with geometric lengths, replaced as one (Joshi et al. 2020).

    maskformer train --config=configs/span_bert.py:mini --workdir=runs/span_bert

Sizes and options are those of configs/bert.py; only the objective, and with it the attention mask, differs.
"""

from configs import bert
from maskformer.training import objectives_section


def get_config(arg=None):
    config = bert.get_config(arg)
    config.objective = objectives_section("spanbert")
    config.evaluation.objective = {"rate": 0.15}
    return config


sweep_seeds = bert.sweep_seeds
