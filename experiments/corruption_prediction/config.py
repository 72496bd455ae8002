"""Corruption and prediction rates apart, for two CPU cores: the demo's BERT, 600 steps of 2,048 tokens a run."""

from configs import bert
from maskformer.training.sweeps import arms, product, zipit

# (corruption rate, prediction rate)
ARMS = ((0.4, 0.4), (0.4, 0.2), (0.2, 0.2), (0.2, 0.4))
SEEDS = (0, 1, 2, 3, 4)


def get_config(arg=None):
    config = bert.get_config("demo")
    # A small vocabulary leaves the unigram plateau within the first hundred steps.
    config.data.vocabulary_size = 1024
    config.train.steps, config.train.log_every = 600, 50
    config.optimizer.warmup_steps = 60
    config.evaluation.every = config.checkpoint.every = 300
    config.checkpoint.keep = 1
    # 80/10/10, not the paper's all-[MASK], which at this budget stays on the unigram plateau.
    config.objective.replacement = (0.8, 0.1, 0.1)
    # Every arm is measured under the same masks, all of them predicted.
    config.evaluation.objective = {"rate": 0.15, "predict_rate": None}
    config.writers.progress = config.writers.tensorboard = False
    return config


def sweep():
    corrupt, predict = zip(*ARMS)
    return product(
        arms("seed", SEEDS), zipit(arms("objective.rate", corrupt), arms("objective.predict_rate", predict))
    )
