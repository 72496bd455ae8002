"""Rebuilds bert_tiny.npz: a tiny Hugging Face BERT with random weights, and what it computes.

    pip install torch transformers numpy
    python tests/golden/make_bert.py

Holds the weights under their Hugging Face names ("weight/..."), one padded batch ("input/...") and the hidden states
and logits in float64 ("float64/...") and float32 ("float32/..."): the second one's error is the yardstick.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

CONFIG = BertConfig(
    vocab_size=67,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=20,
    type_vocab_size=2,
)


def main() -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(CONFIG).eval()
    # Fresh biases are zero, scales one and weights too small to matter: a mistake in any of them would not show.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
    random = np.random.default_rng(0)
    tokens = random.integers(1, CONFIG.vocab_size, (3, 14))
    lengths = np.array([14, 9, 1])
    valid = np.arange(14) < lengths[:, None]
    types = (np.arange(14) >= lengths[:, None] // 2).astype(np.int64)

    arrays = {f"weight/{name}": parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    arrays |= {"input/tokens": tokens, "input/valid": valid, "input/token_types": types}
    for precision in ("float32", "float64"):
        model = model.to(getattr(torch, precision))
        with torch.no_grad():
            output = model(
                input_ids=torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(valid.astype(np.int64)),
                token_type_ids=torch.from_numpy(types),
                output_hidden_states=True,
            )
        arrays[f"{precision}/hidden"] = output.hidden_states[-1].numpy()
        arrays[f"{precision}/logits"] = output.logits.numpy()
    np.savez_compressed(Path(__file__).with_name("bert_tiny.npz"), **arrays)


if __name__ == "__main__":
    main()
