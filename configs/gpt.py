"""GPT: causal language modelling, the next token of each document of a packed row (GPT-2: Radford et al. 2019).

    maskformer train --config=configs/gpt.py:mini --workdir=runs/gpt
    maskformer train --config=configs/gpt.py:small,seq=1024,vocab=50257,data=tfds:lm1b --workdir=runs/gpt-small
    maskformer plan --config=configs/gpt.py:llama-7b --topology v5p:4x4x8 --search

The part after the colon picks the structure: a size (tiny, mini, small, medium, large, xl, demo, or llama-7b) and the
options of configs/bert.py. From small to xl they are GPT-2's (configs/shapes.py), and all of these have its shape:
norms before the sublayers and after the last one, tanh-approximated GELU, learned positions (rotary in demo), biases,
one table for tokens and logits with nothing between, and no dropout, as in its released code. The optimizer is that of
GPT-3 (Brown et al. 2020, appendix B), since GPT-2's was not published.

llama-7b is the shape and the optimizer of Llama 2 (Touvron et al. 2023b, section 2): rotary positions, RMSNorm, SwiGLU,
no biases, logits from a table of their own; rows of 4,096 tokens and 32,000 pieces, products in bfloat16.
"""

from configs import bert, shapes
from maskformer.training import objectives_section


def get_config(arg=None):
    size, config = shapes.start(arg, shapes.GPT)
    config.objective = objectives_section("causal_lm")

    config.model.norm_position, config.model.norm_epsilon = "pre", 1e-5
    config.model.activation = "gelu_tanh"
    config.model.positions = "rotary" if size == "demo" else "learned"
    config.model.embedding_norm = config.model.head_transform = config.model.head_bias = False
    config.model.hidden_dropout = config.model.attention_dropout = 0.0

    config.optimizer.schedule, config.optimizer.final_fraction = "cosine", 0.1
    config.optimizer.b2, config.optimizer.weight_decay = 0.95, 0.1
    if size == "llama-7b":
        config.model.norm, config.model.activation, config.model.positions = "rmsnorm", "swiglu", "rotary"
        config.model.use_bias = config.model.tied_embeddings = False
        config.model.compute_dtype = "bfloat16"
        config.optimizer.epsilon = 1e-5
        config.data.tokenizer = "bpe"
    return config


sweep_seeds = bert.sweep_seeds
