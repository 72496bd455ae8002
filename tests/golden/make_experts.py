"""Rebuilds experts_tiny.npz: one feed-forward block of Mixtral, OLMoE and Qwen1.5-MoE with random weights, and what it
computes, from Hugging Face Transformers.

    pip install torch transformers numpy
    python tests/golden/make_experts.py

Holds for each model its weights as (experts, outputs, inputs) arrays, one input and the output, all float64.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import MixtralConfig, OlmoeConfig, Qwen2MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

SHAPE = dict(hidden_size=8, hidden_act="silu", experts_implementation="eager")
BLOCKS = {
    "mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(**SHAPE, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2),
    ),
    "olmoe": (
        OlmoeSparseMoeBlock,
        OlmoeConfig(**SHAPE, intermediate_size=12, num_experts=4, num_experts_per_tok=2, norm_topk_prob=False),
    ),
    "qwen": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(
            **SHAPE, moe_intermediate_size=12, shared_expert_intermediate_size=10, num_experts=4, num_experts_per_tok=2,
            norm_topk_prob=False,
        ),
    ),
}


def main() -> None:
    torch.manual_seed(0)
    arrays = {}
    for name, (block, config) in BLOCKS.items():
        module = block(config).to(torch.float64).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape))
            x = torch.randn(2, 5, 8, dtype=torch.float64)
            y = module(x)
        arrays |= {f"{name}/{key}": weight.detach().numpy().copy() for key, weight in module.named_parameters()}
        arrays |= {f"{name}/input": x.numpy(), f"{name}/output": y.numpy()}
    np.savez_compressed(Path(__file__).with_name("experts_tiny.npz"), **arrays)


if __name__ == "__main__":
    main()
