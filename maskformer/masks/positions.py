"""Masks of positions alone: no arrays, the same for every example."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from maskformer.masks.expression import Mask, leaf
from maskformer.masks.registry import builder


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


@builder("full")
def everything() -> Mask:
    """Every query sees every key (full, bidirectional attention)."""
    return Everything()


@builder()
def nothing() -> Mask:
    """No query sees any key; the neutral element of ``|``."""
    return Nothing()


@builder()
def causal() -> Mask:
    """A query sees its own position and those before it: ``k <= q``."""
    return Causal()


@builder("window")
def sliding_window(left: int, right: int = 0) -> Mask:
    """A query at ``i`` sees ``i - left <= j <= i + right``."""
    return SlidingWindow(int(left), int(right))
