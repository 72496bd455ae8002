"""Sizes and rhythms by name, in one place for the recipes beside this file; it is no recipe itself."""

import dataclasses

from maskformer.training import default_config, parse_arg


@dataclasses.dataclass(frozen=True)
class Size:
    """A shape and the run that suits it.

    Attributes:
      layers, width, heads: of the stack.
      mlp_width: of the feed-forward layer; None for four times the width.
      length, vocabulary: of a row and of the tokenizer, where the argument does not say.
      steps, batch_size, learning_rate: of the run.
      warmup: share of the steps.
      evaluations: how often it is evaluated and saved.
      log_every: steps between log lines.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int | None = None
    length: int = 128
    vocabulary: int = 8192
    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: float = 0.1
    evaluations: int = 20
    log_every: int = 50


# A few minutes on two CPU cores. It takes pre-norm and rotary positions to leave the unigram plateau in that time.
DEMO = Size(2, 128, 2, steps=1400, learning_rate=3e-3, warmup=0.05, evaluations=7, log_every=20)

# Turc et al. 2019, table 1; base and large: Devlin et al. 2019.
BERT = {
    "tiny": Size(2, 128, 2),
    "mini": Size(4, 256, 4),
    "small": Size(4, 512, 8),
    "base": Size(12, 768, 12, steps=100_000, batch_size=256, learning_rate=1e-4),
    "large": Size(24, 1024, 16, steps=100_000, batch_size=256, learning_rate=1e-4),
    "demo": DEMO,
}

# Clark et al. 2020, table 6. Deeper than BERT's small.
ELECTRA_SMALL = Size(12, 256, 4, steps=1_000_000, batch_size=128, learning_rate=5e-4, warmup=0.01)

# Radford et al. 2019, table 2: 124, 355, 774 and 1558 million parameters with their 50,257 tokens and 1,024 positions.
# The paper gives no learning rates; these are those of Brown et al. 2020, table 2.1, at these depths and widths.
GPT = {
    "tiny": BERT["tiny"],
    "mini": BERT["mini"],
    "small": Size(12, 768, 12, steps=100_000, batch_size=512, learning_rate=6e-4, warmup=0.01),
    "medium": Size(24, 1024, 16, steps=100_000, batch_size=512, learning_rate=3e-4, warmup=0.01),
    "large": Size(36, 1280, 20, steps=100_000, batch_size=512, learning_rate=2.5e-4, warmup=0.01),
    "xl": Size(48, 1600, 25, steps=100_000, batch_size=512, learning_rate=2e-4, warmup=0.01),
    "demo": DEMO,
    # Touvron et al. 2023b, the 7B of Llama 2: batches of 4 million tokens, 2 trillion in all.
    "llama-7b": Size(
        32, 4096, 32, mlp_width=11_008, length=4096, vocabulary=32_000, steps=500_000, batch_size=1024,
        learning_rate=3e-4, warmup=0.004,
    ),
}  # fmt: skip


def start(arg, sizes):
    """(name of the size, config) for an argument such as "mini,seq=256": data, shape and rhythm are set.

    Options: `seq` row length, `vocab` vocabulary size, `data` dataset, `experts` of a mixture, 0 for none.
    """
    known = {"choices": tuple(sizes), "default": "mini", "data": "austen", "experts": 0}
    # The size brings the defaults of the others.
    name, _ = parse_arg(arg, seq=128, vocab=8192, **known)
    _, options = parse_arg(arg, seq=sizes[name].length, vocab=sizes[name].vocabulary, **known)
    config = default_config()
    config.data.name = options.data
    config.data.length = options.seq
    config.data.vocabulary_size = options.vocab
    config.model.experts = options.experts
    resize(config, sizes[name])
    if name == "demo":
        config.data.length, config.data.vocabulary_size = 64, 4096
        config.model.norm_position, config.model.positions = "pre", "rotary"
        # A few passes over 860,000 words: far from overfitting, and dropout would only slow it down.
        config.model.hidden_dropout = config.model.attention_dropout = 0.0
        config.evaluation.max_batches = 30
    return name, config


def resize(config, size):
    """Give `config` the shape and the rhythm of `size`."""
    config.model.layers, config.model.width, config.model.heads = size.layers, size.width, size.heads
    config.model.mlp_width = size.mlp_width
    config.optimizer.learning_rate = size.learning_rate
    config.train.steps, config.train.batch_size = size.steps, size.batch_size
    config.optimizer.warmup_steps = round(size.warmup * size.steps)
    config.train.log_every = size.log_every
    config.evaluation.every = config.checkpoint.every = size.steps // size.evaluations
