"""Masks given as a matrix or as any function of two positions."""

from __future__ import annotations

from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.masks.expression import Mask, leaf, take
from maskformer.masks.registry import builder


@leaf(array=2)
class Dense(Mask):
    """``array[q, k]``."""

    array: Any

    def attend(self, q: Any, k: Any) -> Any:
        return take(self.array, (q, k)) != 0


@jax.tree_util.register_pytree_node_class
class Predicate(Mask):
    """``fn(q, k, *captured)``; ``array_ranks`` counts each captured array's dimensions without ``[batch, heads]``."""

    def __init__(self, fn: Callable[..., Any], captured: tuple[Any, ...] = (), array_ranks: tuple[int, ...] = ()):
        self.fn, self.captured, self.array_ranks = fn, tuple(captured), tuple(array_ranks)

    def tree_flatten(self) -> tuple[Any, Any]:
        return self.captured, (self.fn, self.array_ranks)

    @classmethod
    def tree_unflatten(cls, static: Any, captured: Any) -> Predicate:
        return cls(static[0], tuple(captured), static[1])

    def arrays(self) -> Iterator[tuple[str, Any, int]]:
        for index, (array, rank) in enumerate(zip(self.captured, self.array_ranks)):
            yield f"captured[{index}]", array, rank

    def select_leaf(self, pick: Callable[[Any, int], Any]) -> Mask:
        return Predicate(self.fn, tuple(pick(a, r) for _, a, r in self.arrays()), self.array_ranks)

    def spell(self) -> tuple[str, list[tuple[str | None, Any]]]:
        arguments: list[tuple[str | None, Any]] = [("fn", self.fn), *((None, array) for array in self.captured)]
        batch_dims = max((np.ndim(a) - rank for _, a, rank in self.arrays()), default=0)
        return "predicate", arguments + ([("batch_dims", batch_dims)] if batch_dims else [])

    def attend(self, q: Any, k: Any) -> Any:
        # The function is written for one query and one key; broadcasting is ours to do.
        return jnp.vectorize(lambda q, k: self.fn(q, k, *self.captured))(q, k)


@builder(array="array")
def dense(array: Any) -> Mask:
    """A mask given as its matrix: bool ``[q_len, kv_len]``, ``[batch, ...]`` or ``[batch, heads, ...]`` in front."""
    return Dense(array)


@builder(fn="fn")
def predicate(fn: Callable[..., Any], *arrays: Any, batch_dims: int = 0) -> Mask:
    """Any elementwise function ``fn(q, k, *arrays) -> bool`` of positions and captured arrays."""
    return Predicate(fn, arrays, tuple(np.ndim(array) - batch_dims for array in arrays))
