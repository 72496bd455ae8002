"""maskformer: masked transformers in JAX.

A mask is a predicate (query, key) -> may attend; the dense matrix, the block-sparse kernel, the sharding and the
picture are all derived from it.

    import maskformer as mf
    from maskformer import masks

    mask = masks.causal() & masks.sliding_window(1024)
    output = mf.dot_product_attention(query, key, value, mask=mask)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskformer import attention, masks
    from maskformer.attention import dot_product_attention, explain

__version__ = "0.1.0"

__all__ = ["attention", "dot_product_attention", "explain", "masks"]


def __getattr__(name: str) -> Any:
    # On first use: JAX takes seconds to import, in which `maskformer --help` is to answer and `train` to hear signals.
    if name in ("attention", "masks"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.attention"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
