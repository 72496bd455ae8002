"""maskformer: masked transformers in JAX.

A mask is a predicate (query, key) -> may attend; the dense matrix, the block-sparse kernel, the sharding and the
picture are all derived from it.

    import maskformer as mf
    from maskformer import masks

    mask = masks.causal() & masks.sliding_window(1024)
    output = mf.dot_product_attention(query, key, value, mask=mask)
"""

from maskformer import attention, masks
from maskformer.attention import dot_product_attention, explain

__version__ = "0.1.0"

__all__ = ["attention", "dot_product_attention", "explain", "masks"]
