"""Masking rate at a scale for two CPU cores: the demo's BERT, 500 steps of 2,048 tokens, about a minute a run."""

from configs import bert
from maskformer.training.sweeps import arms, product

RATES = (0.15, 0.4, 0.8)
SEEDS = (0, 1, 2)


def get_config(arg=None):
    config = bert.get_config("demo")
    config.train.steps, config.train.log_every = 500, 50
    config.evaluation.every = config.checkpoint.every = 250
    config.checkpoint.keep = 1
    config.evaluation.objective = {"rate": 0.15}
    # As in the paper's main table: every chosen token becomes [MASK].
    config.objective.replacement = (1.0, 0.0, 0.0)
    config.writers.progress = config.writers.tensorboard = False
    return config


def sweep():
    return product(arms("seed", SEEDS), arms("objective.rate", RATES))
