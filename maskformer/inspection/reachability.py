"""Which inputs can reach which outputs through several layers of attention, and by what path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from maskformer.masks import And, Mask, Or
from maskformer.objectives.rows import Reads, Side


@dataclass(frozen=True)
class Hop:
    """One step of a path: in `layer` (counted from 1, from the input) `query` reads `key` because of `term`."""

    layer: int
    query: str
    key: str
    term: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.query} reads {self.key} by {self.term}"


def allowing_term(mask: Mask, query: int, key: int) -> str:
    """The part of a mask (of shape (1, 1)) that lets `query` attend to `key`: of alternatives the first that does.

    >>> from maskformer import masks
    >>> mask = masks.causal() & masks.sliding_window(2) | masks.sinks(1)
    >>> allowing_term(mask, 0, 0), allowing_term(mask, 5, 0)
    ('causal & sliding_window(2)', 'sinks(1)')
    """
    if isinstance(mask, Or):
        for term in mask.terms:
            if bool(term(query, key)):
                return allowing_term(term, query, key)
    return str(mask)


def forbidding_term(mask: Mask, query: int, key: int) -> str:
    """The part of a mask that keeps `query` from `key`: of several conditions the first that fails.

    >>> from maskformer import masks
    >>> forbidding_term(masks.causal() & masks.sliding_window(2), 5, 1)
    'sliding_window(2)'
    """
    if isinstance(mask, And):
        for term in mask.terms:
            if not bool(term(query, key)):
                return forbidding_term(term, query, key)
    return str(mask)


@dataclass(frozen=True)
class Layer:
    """One layer of attention over `length` places: who reads whom, and which term of which mask says so."""

    attends: np.ndarray
    term: Callable[[int, int], str]


@dataclass(frozen=True)
class Stack:
    """Layers over one row of places, with the names by which a report calls the places.

    Every layer also passes on what each place already holds (the residual).
    """

    layers: tuple[Layer, ...]
    names: Callable[[int], str]

    def reach(self) -> list[np.ndarray]:
        """bool `[length, length]` after 0, 1, ... layers: [i, j] is True where output i can depend on input j."""
        length = self.layers[0].attends.shape[0]
        reached = [np.eye(length, dtype=bool)]
        for layer in self.layers:
            before = reached[-1]
            through = layer.attends.astype(np.float32) @ before.astype(np.float32) > 0
            reached.append(before | through)
        return reached

    def path(self, query: int, key: int, reached: Sequence[np.ndarray] | None = None) -> tuple[Hop, ...]:
        """The hops by which input `key` reaches output `query`, from the last layer to the first."""
        reached = self.reach() if reached is None else reached
        hops = []
        for number in range(len(self.layers), 0, -1):
            before = reached[number - 1]
            if before[query, key]:
                continue
            layer = self.layers[number - 1]
            middle = int(np.flatnonzero(layer.attends[query] & before[:, key])[0])
            hops.append(Hop(number, self.names(query), self.names(middle), layer.term(query, middle)))
            query = middle
        return tuple(hops)


def _dense(mask: Mask, row: int, q_len: int, kv_len: int) -> np.ndarray:
    """bool `[q_len, kv_len]` of one row, True where any head attends."""
    batch, heads = mask.shape
    row = row if batch > 1 else 0
    return np.any([np.asarray(mask.select(row, h).dense(q_len, kv_len)) for h in range(heads)], axis=0)


def _term(mask: Mask, row: int) -> Callable[[int, int], str]:
    batch, heads = mask.shape
    row = row if batch > 1 else 0

    def term(query: int, key: int) -> str:
        for head in range(heads):
            one = mask.select(row, head)
            if bool(one(query, key)):
                return allowing_term(one, query, key)
        return str(mask)

    return term


def stack_of(sides: Sequence[Side], layers: Sequence[Sequence[Reads]], row: int) -> Stack:
    """The stack that reads one row: the places of all sides one after another, under what each layer reads.

    Args:
      sides: of the batch, as its `sides()` gives them.
      layers: what each layer reads, the first one first.
      row: of the batch.
    """
    lengths = [side.tokens.shape[1] for side in sides]
    first = [sum(lengths[:number]) for number in range(len(sides))]

    def layer(reads: Sequence[Reads]) -> Layer:
        attends = np.zeros((sum(lengths),) * 2, bool)
        for one in reads:
            q, k = first[one.query], first[one.key]
            here = _dense(one.mask, row, lengths[one.query], lengths[one.key])
            attends[q : q + lengths[one.query], k : k + lengths[one.key]] = here
        terms = {(one.query, one.key): (one.name, _term(one.mask, row)) for one in reads}

        def term(query: int, key: int) -> str:
            (query_side, query), (key_side, key) = place(query), place(key)
            name, of_mask = terms[query_side, key_side]
            return f"{name} {of_mask(query, key)}".lstrip()

        return Layer(attends, term)

    def place(index: int) -> tuple[int, int]:
        """(side, place on it)"""
        side = max(number for number, start in enumerate(first) if start <= index)
        return side, index - first[side]

    def name(index: int) -> str:
        side, at = place(index)
        return f"{sides[side].name} {at}" if len(sides) > 1 else f"position {at}"

    # Layers that share their masks are one matrix.
    known: dict[tuple[int, ...], Layer] = {}
    keys = [tuple(id(one.mask) for one in reads) for reads in layers]
    for key, reads in zip(keys, layers, strict=True):
        if key not in known:
            known[key] = layer(reads)
    return Stack(tuple(known[key] for key in keys), name)
