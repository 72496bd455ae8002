"""BERT: masked-language-model pretraining of a bidirectional encoder (Devlin et al. 2019).

    maskformer train --config=configs/bert.py:demo --workdir=runs/demo
    maskformer train --config=configs/bert.py:mini,seq=256 --config.objective.rate=0.4 --workdir=runs/mini

The part after the colon picks the structure: a size (tiny, mini, small, base, large, or demo) and options: `seq` row
length, `vocab` vocabulary size, `data` dataset. Sizes are those of Turc et al. 2019; demo is a tiny with pre-norm and
rotary positions, which leaves the unigram plateau within minutes on two CPU cores.
"""

from maskformer.training import default_config, parse_arg
from maskformer.training.sweeps import arms, product

# layers, width, heads (Turc et al. 2019, table 1; base and large: Devlin et al. 2019)
SIZES = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
    "demo": (2, 128, 2),
}


def structure(arg=None):
    """The size and the options that an argument such as "mini,seq=256" picks."""
    return parse_arg(arg, choices=tuple(SIZES), default="mini", seq=128, vocab=8192, data="austen")


def get_config(arg=None):
    size, options = structure(arg)

    config = default_config()
    config.data.name = options.data
    config.data.length = options.seq
    config.data.vocabulary_size = options.vocab

    config.model.layers, config.model.width, config.model.heads = SIZES[size]

    config.objective.rate = 0.15
    # Measured at 15% whatever the training rate, so that runs at different rates compare.
    config.evaluation.objective = {"rate": 0.15}

    config.optimizer.learning_rate = 1e-4 if size in ("base", "large") else 1e-3
    config.optimizer.schedule = "linear"
    config.optimizer.weight_decay = 0.01

    config.train.steps = 100_000 if size in ("base", "large") else 10_000
    config.train.batch_size = 256 if size in ("base", "large") else 32
    config.optimizer.warmup_steps = config.train.steps // 10
    config.train.log_every = 50
    config.evaluation.every = config.checkpoint.every = config.train.steps // 20

    if size == "demo":
        config.data.length, config.data.vocabulary_size = 64, 4096
        config.model.norm_position, config.model.positions = "pre", "rotary"
        # A few passes over 860,000 words: far from overfitting, and dropout would only slow it down.
        config.model.hidden_dropout = config.model.attention_dropout = 0.0
        config.objective.rate = 0.2
        config.optimizer.learning_rate = 3e-3
        config.train.steps, config.optimizer.warmup_steps = 1400, 70
        config.train.log_every = 20
        config.evaluation.every = config.checkpoint.every = 200
        config.evaluation.max_batches = 30
    return config


def sweep():
    """Masking rate and peak learning rate: the two that matter most."""
    return product(arms("objective.rate", [0.15, 0.3, 0.4]), arms("optimizer.learning_rate", [3e-4, 1e-3, 3e-3]))


def sweep_seeds():
    return arms("seed", range(5))
