"""BERT: masked-language-model pretraining of a bidirectional encoder (Devlin et al. 2019).

    maskformer train --config=configs/bert.py:demo --workdir=runs/demo
    maskformer train --config=configs/bert.py:mini,seq=256 --config.objective.rate=0.4 --workdir=runs/mini

The part after the colon picks the structure: a size (tiny, mini, small, base, large, or demo) and options: `seq` row
length, `vocab` vocabulary size, `data` dataset. Sizes are those of Turc et al. 2019, with their rhythm in
configs/shapes.py; demo is a tiny with pre-norm and rotary positions, which leaves the unigram plateau within minutes on
two CPU cores.
"""

from configs import shapes
from maskformer.training.sweeps import arms, product


def get_config(arg=None):
    size, config = shapes.start(arg, shapes.BERT)

    config.objective.rate = 0.2 if size == "demo" else 0.15
    # Measured at 15% whatever the training rate, so that runs at different rates compare.
    config.evaluation.objective = {"rate": 0.15}

    config.optimizer.schedule = "linear"
    config.optimizer.weight_decay = 0.01
    return config


def sweep():
    """Masking rate and peak learning rate: the two that matter most."""
    return product(arms("objective.rate", [0.15, 0.3, 0.4]), arms("optimizer.learning_rate", [3e-4, 1e-3, 3e-3]))


def sweep_seeds():
    return arms("seed", range(5))
