"""Masks made of other masks in ways other than ``& | ~``: one for each head, and positions counted from elsewhere."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import shown
from maskformer.masks.builder_arguments import offset
from maskformer.masks.builders import builder
from maskformer.masks.expression import Mask, broadcast_leads, node
from maskformer.masks.intervals import Interval
from maskformer.masks.tiles import Reading


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Known:
    """A number that is part of a mask's structure, and so stays known under any transformation."""

    value: int


@node
class Shift(Mask):
    """``term`` with positions counted from elsewhere: attends where ``term(q + q_offset, k + k_offset)`` does.

    Attributes:
      by: the two offsets, each a `Known` or an integer scalar array.
    """

    term: Mask
    by: tuple[Any, Any]

    @classmethod
    def of(cls, term: Mask, q_offset: Any = 0, k_offset: Any = 0) -> Shift:
        """Of ints or arrays, which are not checked."""
        return cls(term, tuple(Known(x) if isinstance(x, int) else x for x in (q_offset, k_offset)))

    @property
    def q_offset(self) -> Any:
        return self.by[0].value if isinstance(self.by[0], Known) else self.by[0]

    @property
    def k_offset(self) -> Any:
        return self.by[1].value if isinstance(self.by[1], Known) else self.by[1]

    def children(self) -> tuple[Mask, ...]:
        return (self.term,)

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        return Shift(children[0], self.by)

    def attend(self, q: Any, k: Any) -> Any:
        return self.term.attend(q + self.q_offset, k + self.k_offset)

    def tile_bounds(self, reading: Reading) -> Interval:
        return self.term.tile_bounds(reading.shifted(self.q_offset, self.k_offset))

    def check_lengths(self, q_len: int, kv_len: int, q_offset: Any = 0) -> None:
        if all(isinstance(offset, int) for offset in (self.q_offset, self.k_offset, q_offset)):
            self.term.check_lengths(q_len, kv_len + self.k_offset, q_offset + self.q_offset)

    def spell(self) -> tuple[str, list[tuple[str | None, Any]]]:
        return "shift", [("mask", self.term), ("q_offset", self.q_offset), ("k_offset", self.k_offset)]


@node
class PerHead(Mask):
    """Head ``h`` follows ``heads[h]``."""

    heads: tuple[Mask, ...]

    def children(self) -> tuple[Mask, ...]:
        return self.heads

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        return PerHead(tuple(children))

    @property
    def has_per_head(self) -> bool:
        return True

    @property
    def lead(self) -> tuple[int, ...]:
        batch = broadcast_leads([head.lead for head in self.heads])
        if len(batch) == 2 and batch[1] not in (1, len(self.heads)):
            raise ValueError(
                f"per_head of {len(self.heads)} masks, one of which has arrays for {batch[1]} heads: expected as many "
                "masks as heads"
            )
        return (batch or (1,))[:1] + (len(self.heads),)

    def select(self, b: Any = 0, h: Any = 0) -> Mask:
        if isinstance(h, (int, np.integer)):
            if not 0 <= h < len(self.heads):
                raise IndexError(f"select(head={h}) of a mask with {len(self.heads)} heads")
            return self.heads[h].select(b, h)
        return Choice(h, tuple(head.select(b, h) for head in self.heads))

    def attend(self, q: Any, k: Any) -> Any:
        raise ValueError("a per-head mask needs a head: mask.select(b, h)")

    def spell(self) -> tuple[str, list[tuple[str | None, Any]]]:
        return "per_head", [(None, head) for head in self.heads]


@node
class Choice(Mask):
    """``terms[index]`` for a traced ``index``; made by ``select`` of a per-head mask with a traced head."""

    index: Any
    terms: tuple[Mask, ...]

    def children(self) -> tuple[Mask, ...]:
        return self.terms

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        return Choice(self.index, tuple(children))

    def attend(self, q: Any, k: Any) -> Any:
        shape = jnp.broadcast_shapes(jnp.shape(q), jnp.shape(k))
        branches = [functools.partial(_attend_on, shape, term) for term in self.terms]
        return jax.lax.switch(self.index, branches, q, k)

    def tile_bounds(self, reading: Reading) -> Interval:
        analysis, tiles = reading.analysis, reading.tiles
        depends, terms = analysis.align(*[term.tile_bounds(reading) for term in self.terms])
        xp, index = tiles.xp, analysis.constant(self.index)
        # Without knowing which, a tile is what all of the terms agree on.
        lo = xp.stack([xp.broadcast_to(term.lo, tiles.shape(depends)) for term in terms])
        hi = xp.stack([xp.broadcast_to(term.hi, tiles.shape(depends)) for term in terms])
        if index.exact:
            return Interval(lo[index.lo], hi[index.lo], depends)
        return Interval(lo.all(0), hi.any(0), depends)

    def spell(self) -> tuple[str, list[tuple[str | None, Any]]]:
        return "per_head", [(None, term) for term in self.terms]


def _attend_on(shape: tuple[int, ...], mask: Mask, q: Any, k: Any) -> jax.Array:
    attends = jnp.broadcast_to(mask.attend(q, k), shape).astype(bool)
    # All branches have to vary over the mesh axes of a caller's shard_map, even one that looks at neither position.
    return attends | (q != q) | (k != k)


@builder()
def per_head(*heads: Mask) -> Mask:
    """A mask for each head: head ``h`` follows the ``h``-th mask given (separately, or as one list).

    >>> from maskformer import masks
    >>> masks.per_head([masks.causal(), masks.sliding_window(1)]).dense(3, 3).astype(int)
    Array([[[[1, 0, 0],
             [1, 1, 0],
             [1, 1, 1]],
    <BLANKLINE>
            [[1, 0, 0],
             [1, 1, 0],
             [0, 1, 1]]]], dtype=int32)
    """
    if len(heads) == 1 and isinstance(heads[0], (tuple, list)):
        heads = tuple(heads[0])
    wrong = [type(head).__name__ for head in heads if not isinstance(head, Mask)]
    if wrong or not heads:
        raise ValueError(f"per_head takes one mask for each head; got {', '.join(wrong[:4]) or 'none'}")
    return PerHead(heads)


@builder(q_offset="q_offset", k_offset="k_offset")
def shift(mask: Mask, q_offset: Any = 0, k_offset: Any = 0) -> Mask:
    """A mask whose positions are counted from elsewhere: attends where ``mask(q + q_offset, k + k_offset)`` does.

    For a shard that holds a piece of the sequence; the offsets may be traced.

    >>> from maskformer import masks
    >>> masks.shift(masks.causal(), q_offset=1).dense(2, 3).astype(int)
    Array([[1, 1, 0],
           [1, 1, 1]], dtype=int32)
    """
    offsets = (offset("shift", name, value) for name, value in (("q_offset", q_offset), ("k_offset", k_offset)))
    if not isinstance(mask, Mask):
        raise ValueError(f"shift: mask={shown(mask)}, expected a mask")
    return Shift.of(mask, *offsets)
