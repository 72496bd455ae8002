"""ELECTRA: a small generator fills masked tokens, and the model learns to tell which ones (Clark et al. 2020).

    maskformer train --config=configs/electra.py:mini --workdir=runs/electra
    maskformer train --config=configs/electra.py:tiny --config.model.generator.width=0.5 --workdir=runs/electra-half

Sizes and options are those of configs/bert.py, for the discriminator, which is the model that is kept; but small is
ELECTRA-small as published (14 million parameters; deeper than BERT's, with narrow embeddings). `loss`, `accuracy` and
`perplexity` are the generator's, as for any masked language model; `discriminator_loss` and its like stand beside them.
"""

from configs import bert, shapes
from maskformer.training import generator_section, objectives_section
from maskformer.training.sweeps import arms


def get_config(arg=None):
    size, _ = shapes.start(arg, shapes.BERT)
    config = bert.get_config(arg)
    config.objective = objectives_section("electra", rate=0.25 if size == "large" else 0.15)
    config.evaluation.objective = {"rate": 0.15}
    # The best checkpoint is that of the network which is kept.
    config.evaluation.metric = "discriminator_loss"

    # Clark et al. 2020, table 6.
    config.model.generator = generator_section(width=1 / 3 if size == "base" else 1 / 4)
    config.optimizer.epsilon = 1e-6
    if size in ("base", "large"):
        config.optimizer.learning_rate = 2e-4
    if size == "small":
        shapes.resize(config, shapes.ELECTRA_SMALL)
        config.model.embedding_width = 128
    return config


def sweep():
    """The generator's size, as in the paper's figure 3."""
    return arms("model.generator.width", [1 / 8, 1 / 4, 1 / 2, 1.0])


def sweep_questions():
    """ELECTRA, and "ELECTRA 15%" of the paper's table 5, which asks about the masked tokens only."""
    return arms("objective.discriminate_at", ["all", "masked"])


sweep_seeds = bert.sweep_seeds
