"""A swap of the objective in mid-run: masked language modelling for the first half, then causal modelling.

    maskformer train --config=configs/swap.py:mini --workdir=runs/swap

Sizes and options are those of configs/bert.py. One stack serves both, under the mask of the objective that each row
follows; weights that are steps of the schedule make the swap sharp, and `linear` ones a transition. It is evaluated as
what it ends as. The swap follows `train.steps`. To swap elsewhere, give `objective.parts` anew, at a step or at a share
of the run:

    --config.objective.parts="[{'name': 'mlm', 'weight': {'schedule': 'step', 'values': {'0': 1.0, '25%': 0.0}}},
                               {'name': 'causal_lm', 'weight': {'schedule': 'step', 'values': {'0': 0.0, '25%': 1.0}}}]"
"""

from configs import bert
from maskformer.training import objectives_section


def swap(first, second, step):
    """The parts of a mixture that follows `first` up to `step` and `second` after it: a step, or a share as "50%"."""

    def weight(before, after):
        return {"schedule": "step", "values": {"0": before, str(step): after}}

    return [{**first, "weight": weight(1.0, 0.0)}, {**second, "weight": weight(0.0, 1.0)}]


def get_config(arg=None):
    config = bert.get_config(arg)
    masked = {"name": "mlm", "rate": config.objective.rate}
    causal = {"name": "causal_lm"}
    config.objective = objectives_section("mixture", parts=swap(masked, causal, "50%"))
    config.evaluation.objective = {"parts": [causal]}
    return config


sweep_seeds = bert.sweep_seeds
