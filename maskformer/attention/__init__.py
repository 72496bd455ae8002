"""softmax(QK^T)V under a mask: one function, several backends."""

from maskformer.attention import dropout, score_mods
from maskformer.attention.api import dot_product_attention, explain
from maskformer.attention.explanation import Explanation

__all__ = ["Explanation", "dot_product_attention", "dropout", "explain", "score_mods"]
