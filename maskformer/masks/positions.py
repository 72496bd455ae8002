"""Masks of positions alone: no arrays, the same for every example."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from maskformer.masks.builder_arguments import whole_number
from maskformer.masks.builders import builder
from maskformer.masks.expression import Mask, leaf


@leaf()
class Everything(Mask):
    """Every query sees every key."""

    def attend(self, q: Any, k: Any) -> Any:
        return jnp.ones(jnp.broadcast_shapes(jnp.shape(q), jnp.shape(k)), bool)


@leaf()
class Nothing(Mask):
    """No query sees any key."""

    def attend(self, q: Any, k: Any) -> Any:
        return jnp.zeros(jnp.broadcast_shapes(jnp.shape(q), jnp.shape(k)), bool)


@leaf()
class Causal(Mask):
    """``k <= q``."""

    def attend(self, q: Any, k: Any) -> Any:
        return k <= q


@leaf()
class SlidingWindow(Mask):
    """``q - left <= k <= q + right``."""

    left: int
    right: int = 0

    def attend(self, q: Any, k: Any) -> Any:
        return (q - k <= self.left) & (k - q <= self.right)


@leaf()
class DilatedWindow(Mask):
    """Every ``dilation``-th position of a sliding window, counted from the query."""

    left: int
    right: int
    dilation: int

    def attend(self, q: Any, k: Any) -> Any:
        return (q - k <= self.left) & (k - q <= self.right) & ((q - k) % self.dilation == 0)


@leaf()
class Strided(Mask):
    """``(q - k) % stride == 0``."""

    stride: int

    def attend(self, q: Any, k: Any) -> Any:
        return (q - k) % self.stride == 0


@leaf()
class Sinks(Mask):
    """``k < count``."""

    count: int

    def attend(self, q: Any, k: Any) -> Any:
        return k < self.count


@leaf()
class Chunked(Mask):
    """The query's chunk, ``left`` chunks before it and ``right`` after."""

    size: int
    left: int = 0
    right: int = 0

    def attend(self, q: Any, k: Any) -> Any:
        distance = q // self.size - k // self.size
        return (distance <= self.left) & (distance >= -self.right)


@leaf()
class BlockDiffusion(Mask):
    """Noised tokens ``0 .. length - 1`` and then the same tokens clean, denoised block by block."""

    block: int
    length: int

    def attend(self, q: Any, k: Any) -> Any:
        n = self.length
        q_clean, k_clean = q >= n, k >= n
        q_block = jnp.where(q_clean, q - n, q) // self.block
        k_block = jnp.where(k_clean, k - n, k) // self.block
        own_block = ~q_clean & ~k_clean & (q_block == k_block)
        clean_past = ~q_clean & k_clean & (q_block > k_block)
        clean = q_clean & k_clean & (q_block >= k_block)
        return own_block | clean_past | clean


@builder("full")
def everything() -> Mask:
    """Every query sees every key: bidirectional attention, and the neutral element of ``&``.

    >>> from maskformer import masks
    >>> print(masks.everything().to_string(2, 3))
    █ █ █
    █ █ █
    """
    return Everything()


@builder()
def nothing() -> Mask:
    """No query sees any key: the neutral element of ``|``.

    >>> from maskformer import masks
    >>> print(masks.nothing().to_string(2, 3))
    · · ·
    · · ·
    """
    return Nothing()


@builder()
def causal() -> Mask:
    """A query sees its own position and those before it: ``k <= q``, with ``q`` counted from ``q_offset``.

    >>> from maskformer import masks
    >>> print(masks.causal().to_string(4, 4))
    █ · · ·
    █ █ · ·
    █ █ █ ·
    █ █ █ █
    """
    return Causal()


@builder("window")
def sliding_window(left: int, right: int = 0) -> Mask:
    """A query at ``i`` sees ``i - left <= j <= i + right``: ``left + 1 + right`` keys, itself among them.

    The convention of ``jax.nn.dot_product_attention(local_window_size=(left, right))``. A causal window of
    ``w`` keys in Hugging Face, MaxText, Levanter and Mistral is ``sliding_window(w - 1)``; Hugging Face's
    bidirectional ``w`` is ``sliding_window(w, w)``, FlashAttention's ``(left, right)`` is the same as here.

    >>> from maskformer import masks
    >>> print(masks.sliding_window(1).to_string(5, 5))
    █ · · · ·
    █ █ · · ·
    · █ █ · ·
    · · █ █ ·
    · · · █ █
    >>> print(masks.sliding_window(1, 2).to_string(5, 5))
    █ █ █ · ·
    █ █ █ █ ·
    · █ █ █ █
    · · █ █ █
    · · · █ █
    """
    return SlidingWindow(
        whole_number("sliding_window", "left", left, 0), whole_number("sliding_window", "right", right, 0)
    )


@builder()
def dilated_window(left: int, right: int = 0, dilation: int = 2) -> Mask:
    """A sliding window with gaps: ``i - left <= j <= i + right`` where ``dilation`` divides ``i - j``.

    ``left`` and ``right`` are distances in positions, as in ``sliding_window`` (Longformer, arXiv:2004.05150,
    section 3.1; attention-gym's ``dilated_sliding_window(w, d)`` is ``dilated_window(w, w, d)``).

    >>> from maskformer import masks
    >>> print(masks.dilated_window(4, dilation=2).to_string(6, 6))
    █ · · · · ·
    · █ · · · ·
    █ · █ · · ·
    · █ · █ · ·
    █ · █ · █ ·
    · █ · █ · █
    """
    return DilatedWindow(
        whole_number("dilated_window", "left", left, 0),
        whole_number("dilated_window", "right", right, 0),
        whole_number("dilated_window", "dilation", dilation, 1),
    )


@builder()
def strided(stride: int) -> Mask:
    """Every ``stride``-th position, counted from the query: ``(q - k) % stride == 0``.

    The strided pattern of Sparse Transformers (arXiv:1904.10509) is
    ``causal & (window(stride - 1) | strided(stride))``.

    >>> from maskformer import masks
    >>> print(masks.parse("causal & strided(3)").to_string(6, 6))
    █ · · · · ·
    · █ · · · ·
    · · █ · · ·
    █ · · █ · ·
    · █ · · █ ·
    · · █ · · █
    """
    return Strided(whole_number("strided", "stride", stride, 1))


@builder()
def sinks(count: int) -> Mask:
    """The first ``count`` keys (attention sinks, arXiv:2309.17453); join it to a window with ``|``.

    >>> from maskformer import masks
    >>> print(masks.parse("causal & (window(1) | sinks(1))").to_string(5, 5))
    █ · · · ·
    █ █ · · ·
    █ █ █ · ·
    █ · █ █ ·
    █ · · █ █
    """
    return Sinks(whole_number("sinks", "count", count, 0))


@builder()
def chunked(size: int, left: int = 0, right: int = 0) -> Mask:
    """Attention within chunks of ``size`` positions, and ``left`` chunks before and ``right`` after one's own.

    ``causal & chunked(n)`` is Llama 4's chunked attention; ``chunked(b, 1, 1)`` is BigBird's blocked window;
    ``chunked(1)`` is the diagonal.

    >>> from maskformer import masks
    >>> print(masks.chunked(2).to_string(5, 5))
    █ █ · · ·
    █ █ · · ·
    · · █ █ ·
    · · █ █ ·
    · · · · █
    >>> print(masks.chunked(2, left=1).to_string(5, 5))
    █ █ · · ·
    █ █ · · ·
    █ █ █ █ ·
    █ █ █ █ ·
    · · █ █ █
    """
    return Chunked(
        whole_number("chunked", "size", size, 1),
        whole_number("chunked", "left", left, 0),
        whole_number("chunked", "right", right, 0),
    )


@builder()
def block_diffusion(block: int, length: int) -> Mask:
    """Training mask of block diffusion (BD3-LM, arXiv:2503.09573, section 3): ``[noised | clean]``, each ``length``.

    A noised token sees its own noised block and the clean blocks before it; a clean token sees the clean blocks
    up to and including its own.

    >>> from maskformer import masks
    >>> print(masks.block_diffusion(2, length=4).to_string(8, 8))
    █ █ · · · · · ·
    █ █ · · · · · ·
    · · █ █ █ █ · ·
    · · █ █ █ █ · ·
    · · · · █ █ · ·
    · · · · █ █ · ·
    · · · · █ █ █ █
    · · · · █ █ █ █
    """
    return BlockDiffusion(
        whole_number("block_diffusion", "block", block, 1), whole_number("block_diffusion", "length", length, 1)
    )
