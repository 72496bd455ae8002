"""softmax(QK^T)V under a mask: one function, several backends."""

from maskformer.attention import dropout, placements, platform, score_mods
from maskformer.attention.api import dot_product_attention, explain
from maskformer.attention.explanation import Explanation
from maskformer.attention.placements import Placement

__all__ = [
    "Explanation",
    "Placement",
    "dot_product_attention",
    "dropout",
    "explain",
    "placements",
    "platform",
    "score_mods",
]
