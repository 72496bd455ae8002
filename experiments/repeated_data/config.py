"""Causal modelling against masked diffusion on 8,192 tokens, 150 times over: about a minute a run on two CPU cores.

    maskformer train --config=experiments/repeated_data/config.py:diffusion --workdir=runs/repeated_diffusion

The argument names the objective, and nothing else depends on it.
"""

from configs import bert
from maskformer.training import objectives_section, parse_arg
from maskformer.training.sweeps import arms

# Every token of a row is predicted by both: the causal model reads a start token first, diffusion hides any of them.
OBJECTIVES = {"causal_lm": {"shift": "right"}, "diffusion": {"compat": "llada", "sampling": "batch"}}
SEEDS = (0, 1, 2, 3, 4)


def get_config(arg=None):
    name, _ = parse_arg(arg, choices=tuple(OBJECTIVES), default="diffusion")
    config = bert.get_config("demo")
    config.objective = objectives_section(name, **OBJECTIVES[name])
    config.evaluation.objective = {}

    # Rows of text and nothing else, so that both likelihoods are of the same tokens.
    config.data.start_token = config.data.end_token = None
    config.data.length, config.data.vocabulary_size, config.data.max_rows = 32, 256, 256

    # A first layer that sees two tokens to each side, and a small learning rate, in both arms: without them the
    # diffusion model stays on the unigram plateau for all of these steps.
    config.model.mask = ("window(2, 2)", "everything")
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-3, "constant"
    config.train.batch_size, config.train.steps, config.optimizer.warmup_steps = 32, 1200, 50
    config.train.log_every = 100

    # The curves are read off these evaluations, and the lowest one keeps its checkpoint.
    config.evaluation.every = config.checkpoint.every = 50
    config.evaluation.batch_size, config.evaluation.max_batches = 64, 16
    config.checkpoint.keep = 1
    config.writers.progress = config.writers.tensorboard = False
    return config


def sweep():
    return arms("seed", SEEDS)
