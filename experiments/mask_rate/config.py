"""Masking rate at a scale for two CPU cores: the demo's BERT, 700 steps of 2,048 tokens, about a minute a run."""

from configs import bert
from maskformer.training.sweeps import arms, product

RATES = (0.15, 0.4, 0.8)
SEEDS = (0, 1, 2, 3, 4)


def get_config(arg=None):
    config = bert.get_config("demo")
    config.train.steps, config.train.log_every = 700, 50
    config.evaluation.every = config.checkpoint.every = 350
    config.checkpoint.keep = 1
    config.evaluation.objective = {"rate": 0.15}
    # 80/10/10, not the paper's all-[MASK], which at this budget stays on the unigram plateau (see the README).
    config.objective.replacement = (0.8, 0.1, 0.1)
    config.writers.progress = config.writers.tensorboard = False
    return config


def sweep():
    return product(arms("seed", SEEDS), arms("objective.rate", RATES))
