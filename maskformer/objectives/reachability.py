"""Which inputs can reach which outputs through several layers of attention, and by what path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from maskformer.masks import And, Mask, Or


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


def single_stack(layer_masks: Sequence[Mask], row: int, length: int) -> Stack:
    """The stack that reads one row of `length` tokens under one mask per layer."""
    known: dict[int, Layer] = {}
    for mask in layer_masks:
        if id(mask) not in known:
            known[id(mask)] = Layer(_dense(mask, row, length, length), _term(mask, row))
    return Stack(tuple(known[id(mask)] for mask in layer_masks), lambda place: f"position {place}")


def encoder_decoder_stack(pair, row: int, encoder_length: int, decoder_length: int, layers: int) -> Stack:
    """An encoder-decoder as one stack: encoder places first, then decoder places; encoder layers, then decoder layers.

    `pair` holds the masks `encoder`, `decoder` and `cross`.
    """
    total = encoder_length + decoder_length
    encoder = np.zeros((total, total), bool)
    encoder[:encoder_length, :encoder_length] = _dense(pair.encoder, row, encoder_length, encoder_length)
    decoder = np.zeros((total, total), bool)
    decoder[encoder_length:, encoder_length:] = _dense(pair.decoder, row, decoder_length, decoder_length)
    decoder[encoder_length:, :encoder_length] = _dense(pair.cross, row, decoder_length, encoder_length)
    terms = {name: _term(getattr(pair, name), row) for name in ("encoder", "decoder", "cross")}

    def term(query: int, key: int) -> str:
        if query < encoder_length:
            return f"encoder {terms['encoder'](query, key)}"
        if key < encoder_length:
            return f"cross {terms['cross'](query - encoder_length, key)}"
        return f"decoder {terms['decoder'](query - encoder_length, key - encoder_length)}"

    def name(place: int) -> str:
        return f"encoder {place}" if place < encoder_length else f"decoder {place - encoder_length}"

    return Stack((Layer(encoder, term),) * layers + (Layer(decoder, term),) * layers, name)
