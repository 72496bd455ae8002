"""Objectives under the names of the implementations whose edge cases they follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Convention:
    """`objective` and `params` for `create`; `source` is the code or paper whose edge cases are followed."""

    objective: str
    params: dict[str, Any] = field(default_factory=dict)
    source: str = ""


COMPAT: dict[str, Convention] = {
    "bert": Convention(
        "mlm", {"compat": "bert", "rate": 0.15, "replacement": (0.8, 0.1, 0.1)},
        "google-research/bert create_pretraining_data.py (Devlin et al. 2019)",
    ),
    "roberta": Convention(
        "mlm", {"compat": "roberta", "rate": 0.15, "replacement": (0.8, 0.1, 0.1)},
        "fairseq mask_tokens_dataset.py (Liu et al. 2019)",
    ),
    "hf": Convention(
        "mlm", {"compat": "hf", "rate": 0.15, "replacement": (0.8, 0.1, 0.1)},
        "transformers DataCollatorForLanguageModeling",
    ),
    "spanbert": Convention(
        "span_mlm",
        {"rate": 0.15, "geometric_p": 0.2, "longest": 10, "in_words": True, "per_span": True,
         "replacement": (0.8, 0.1, 0.1)},
        "SpanBERT masking.py (Joshi et al. 2020)",
    ),
    "t5": Convention(
        "span_corruption", {"rate": 0.15, "mean": 3.0, "variant": "span"},
        "t5 preprocessors.py (Raffel et al. 2020); the decoder starts with pad",
    ),
    "bart": Convention(
        "denoising",
        {"rate": 0.3, "poisson_mean": 3.0, "replace_length": 1, "random_rate": 0.1, "permute_sentences": 1.0},
        "fairseq denoising_dataset.py with the published flags of bart.large (Lewis et al. 2020)",
    ),
    "mdlm": Convention("diffusion", {"compat": "mdlm"}, "kuleshov-group/mdlm diffusion.py (Sahoo et al. 2024)"),
    "llada": Convention("diffusion", {"compat": "llada"}, "LLaDA guidelines (Nie et al. 2025)"),
    "ul2": Convention("ul2", {}, "Tay et al. 2022, table 1"),
    "fim": Convention(
        "fim", {"rate": 0.5, "spm_rate": 0.5}, "bigcode Megatron-LM gpt_dataset.py (Bavarian et al. 2022)"
    ),
}
