"""Masks given by ranges: a range of keys for each query or of queries for each key, or the lengths of blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp

from maskformer.checks import nearest, shown
from maskformer.masks.builder_arguments import array, whole_number
from maskformer.masks.builders import builder
from maskformer.masks.expression import Mask, leaf, take


@leaf(begin=1, end=1)
class QueryRanges(Mask):
    """``begin[q] <= k < end[q]``."""

    begin: Any
    end: Any

    axes: ClassVar[dict[str, str]] = {"begin": "query", "end": "query"}

    def attend(self, q: Any, k: Any) -> Any:
        return (take(self.begin, q) <= k) & (k < take(self.end, q))


@leaf(begin=1, end=1)
class KeyRanges(Mask):
    """``begin[k] <= q < end[k]``."""

    begin: Any
    end: Any

    axes: ClassVar[dict[str, str]] = {"begin": "key", "end": "key"}

    def attend(self, q: Any, k: Any) -> Any:
        return (take(self.begin, k) <= q) & (q < take(self.end, k))


@leaf(q_lengths=1, kv_lengths=1, kv_starts=1)
class BlockDiagonal(Mask):
    """Query and key in the same block, and within ``left`` and ``right`` of the block's own diagonal."""

    q_lengths: Any
    kv_lengths: Any = None
    kv_starts: Any = None
    align: str = "start"
    left: int | None = None
    right: int | None = None

    def attend(self, q: Any, k: Any) -> Any:
        q_end = jnp.cumsum(jnp.asarray(self.q_lengths))
        q_begin = q_end - self.q_lengths
        k_length = jnp.asarray(self.q_lengths if self.kv_lengths is None else self.kv_lengths)
        k_begin = jnp.cumsum(k_length) - k_length if self.kv_starts is None else jnp.asarray(self.kv_starts)
        q, k = jnp.asarray(q)[..., None], jnp.asarray(k)[..., None]
        inside = (q >= q_begin) & (q < q_end) & (k >= k_begin) & (k < k_begin + k_length)
        # The diagonal runs through the first query and key of each block, or through the last ones.
        late = 0 if self.align == "start" else k_length - self.q_lengths
        diagonal = q - q_begin + k_begin + late
        if self.left is not None:
            inside = inside & (k >= diagonal - self.left)
        if self.right is not None:
            inside = inside & (k <= diagonal + self.right)
        return jnp.any(inside, axis=-1)


@builder(begin="begin", end="end")
def query_ranges(begin: Any, end: Any) -> Mask:
    """A range of keys for each query: ``begin[q] <= k < end[q]``.

    Args:
      begin, end: int ``[batch, q_len]``; a range with ``end <= begin`` is empty.

    >>> import numpy as np
    >>> from maskformer import masks
    >>> print(masks.query_ranges(np.array([0, 1, 0, 3]), np.array([2, 4, 0, 4])).to_string(4, 4))
    █ █ · ·
    · █ █ █
    · · · ·
    · · · █
    """
    return QueryRanges(array("query_ranges", "begin", begin, 1), array("query_ranges", "end", end, 1))


@builder(begin="begin", end="end")
def key_ranges(begin: Any, end: Any) -> Mask:
    """A range of queries for each key: ``begin[k] <= q < end[k]``, e.g. the text that may see each image token.

    Args:
      begin, end: int ``[batch, kv_len]``; a range with ``end <= begin`` is empty.

    >>> import numpy as np
    >>> from maskformer import masks
    >>> print(masks.key_ranges(np.array([0, 0, 2]), np.array([2, 3, 4])).to_string(4, 3))
    █ █ ·
    █ █ ·
    · █ █
    · · █
    """
    return KeyRanges(array("key_ranges", "begin", begin, 1), array("key_ranges", "end", end, 1))


@builder(q_lengths="q_lengths", kv_lengths="kv_lengths", kv_starts="kv_starts")
def block_diagonal(
    q_lengths: Any,
    kv_lengths: Any = None,
    kv_starts: Any = None,
    align: str = "start",
    left: int | None = None,
    right: int | None = None,
) -> Mask:
    """Sequences of given lengths, one after another, each seeing only itself; xformers' ``BlockDiagonalMask`` family.

    Args:
      q_lengths: int ``[blocks]``, or ``[batch, blocks]``.
      kv_lengths: int ``[blocks]``, where keys differ in number from queries.
      kv_starts: int ``[blocks]``, where each block's keys begin (a padded cache); default one after another.
      align: each block's diagonal runs through its first query and key, ``"start"``, or through its last ones,
        ``"end"`` (so that a new query sees the whole cache).
      left, right: keys seen before and after the diagonal, None for all: ``right=0`` is causal, ``right=0,
        left=w - 1`` a causal window of ``w`` keys.

    >>> from maskformer import masks
    >>> print(masks.block_diagonal((2, 3)).to_string(5, 5))
    █ █ · · ·
    █ █ · · ·
    · · █ █ █
    · · █ █ █
    · · █ █ █
    >>> print(masks.block_diagonal((1, 2), (2, 3), (0, 4), align="end", right=0).to_string(3, 8))
    █ █ · · · · · ·
    · · · · █ █ · ·
    · · · · █ █ █ ·
    """
    name = "block_diagonal"
    if not isinstance(align, str) or align not in ("start", "end"):
        raise ValueError(f"{name}: align={shown(align)}, expected 'start' or 'end'{nearest(align, ('start', 'end'))}")
    given = [("q_lengths", q_lengths), ("kv_lengths", kv_lengths), ("kv_starts", kv_starts)]
    arrays = [None if value is None else array(name, key, value, 1) for key, value in given]
    sizes = {value.shape[-1] for value in arrays if value is not None}
    if len(sizes) > 1:
        raise ValueError(f"{name}: q_lengths, kv_lengths and kv_starts count {sorted(sizes)} blocks; expected the same")
    left = None if left is None else whole_number(name, "left", left, 0)
    right = None if right is None else whole_number(name, "right", right, 0)
    return BlockDiagonal(*arrays, align, left, right)
