"""UL2: a mixture of span, suffix and extreme denoisers on one stack, told apart by mode tokens (Tay et al. 2022).

    maskformer train --config=configs/ul2.py:mini --workdir=runs/ul2

Sizes and options are those of configs/bert.py; only the objective, and with it the attention mask, differs.
"""

from configs import bert
from maskformer.training import objectives_section


def get_config(arg=None):
    config = bert.get_config(arg)
    # Enough sentinels for the busiest denoiser (half of the row in spans of three), and the last three as mode tokens.
    config.data.sentinels = config.data.length // 6 + 8
    first = config.data.vocabulary_size - config.data.sentinels
    modes = {"R": first, "S": first + 1, "X": first + 2}
    config.objective = objectives_section("ul2", mode_tokens=modes)
    config.evaluation.objective = {}
    return config


sweep_seeds = bert.sweep_seeds
