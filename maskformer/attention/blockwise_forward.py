"""The forward pass of blockwise attention: a softmax per row of tiles, over the tiles that the row has to visit."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from maskformer.attention.arguments import Inputs
from maskformer.attention.blockwise_chunk import (
    Chunk,
    Fixed,
    dot,
    full,
    layout_of,
    padded,
    positions,
    precise_dtype,
    working_dtype,
)
from maskformer.attention.blockwise_layout import Walk


def forward(inputs: Inputs, fixed: Fixed, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Output [batch, q_len, heads, value_dim] in ``dtype`` and logsumexp [batch, q_len, heads]."""
    layout = layout_of(inputs, fixed, transposed=False)
    inputs = padded(inputs, layout)

    def chunk_pass(results, index):
        chunk = Chunk(layout, inputs, fixed, index)
        walk = Walk.of(fixed.block_map, chunk.entry, transposed=False)

        def row_pass(results, row):
            here = _Row(chunk, row)
            output, residual = _finish(chunk, *here.softmax(walk))
            new = output, residual[..., None]
            return tuple(chunk.put_queries(old, part, here.start) for old, part in zip(results, new, strict=True)), None

        return jax.lax.scan(row_pass, results, positions(layout.q_blocks))[0], None

    # Written where they belong, tile by tile: stacking them would cost a transposed copy.
    shape = inputs.query.shape[:3]
    results = (
        full(inputs, (*shape, inputs.value.shape[-1]), 0, dtype),
        full(inputs, (*shape, 1), 0, precise_dtype(inputs)),
    )
    (output, residual), _ = jax.lax.scan(chunk_pass, results, positions(layout.chunks))
    return output[:, : layout.q_len], residual[:, : layout.q_len, :, 0]


class _Row:
    """One row of tiles of a chunk.

    Its softmax so far is three arrays: the maximum of the logits and the sum of the weights relative to it,
    [batch_chunk, heads of the chunk, q_size], and the weighted sum of the values, [..., value_dim].
    """

    def __init__(self, chunk: Chunk, row: jax.Array):
        self.chunk, self.row = chunk, row
        self.start = row * chunk.layout.block_q
        self.work = working_dtype(chunk.inputs)
        self.queries = chunk.scaled(chunk.of_queries(chunk.inputs.query, self.start).astype(self.work))

    def softmax(self, walk: Walk) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Over all that the row has to visit."""
        chunk, layout = self.chunk, self.chunk.layout
        shape, precise = (chunk.batches.size, chunk.heads.size, chunk.q_size), precise_dtype(chunk.inputs)
        nothing = (
            full(chunk.inputs, shape, -jnp.inf, precise),
            full(chunk.inputs, shape, 0, precise),
            full(chunk.inputs, (*shape, chunk.inputs.value.shape[-1]), 0, precise),
        )
        # Where a bias or a score_mod makes -inf or NaN of its own, only the online softmax tells them apart.
        plain = chunk.inputs.bias is None and chunk.rest.score_mod is None
        if plain and walk.banded:
            return self.at_once(chunk, walk.band_start(self.row))
        if not (plain and layout.widths):
            return walk.fold(self.row, self.visit, nothing)
        # Known at run time only: a row whose tiles span no more than so many blocks is visited at once too.
        first, span = walk.span(self.row)
        branches = [
            functools.partial(self.at_once, chunk.of_width(width), walk.start(first, width)) for width in layout.widths
        ]
        branches.append(functools.partial(walk.fold, self.row, self.visit, nothing))
        return jax.lax.switch(jnp.sum(span > jnp.asarray(layout.widths), dtype=jnp.int32), branches)

    def visit(self, kv_start: jax.Array, carry, masked: bool):
        """Online softmax: the row's weights are kept relative to its maximum so far."""
        top, total, output = carry
        places = self.chunk.places(self.start, kv_start)
        scores = self._scores(self.chunk, kv_start, places)
        if masked:
            scores = jnp.where(self.chunk.visible(places, kv_start), scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        # While a row has seen nothing its maximum is -inf, which must not meet itself in a difference.
        finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp(scores - finite[..., None])
        shrink = jnp.exp(top - finite)
        total = total * shrink + jnp.sum(weights, axis=-1)
        return new_top, total, output * shrink[..., None] + self._values(self.chunk, weights, kv_start, places)

    def at_once(self, chunk: Chunk, kv_start: jax.Array):
        """Softmax of a row in one visit, as wide as the chunk's. A query without keys is NaN until it is set to 0."""
        places = chunk.places(self.start, kv_start)
        scores, seen = chunk.capped(self._scores(chunk, kv_start, places), places, kv_start)
        top = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - top[..., None])
        total, output = jnp.sum(weights, axis=-1), self._values(chunk, weights, kv_start, places)
        return top, jnp.where(seen[:, 0], total, 0.0), jnp.where(seen, output, 0.0)

    def _scores(self, chunk: Chunk, kv_start: jax.Array, places) -> jax.Array:
        scores = chunk.products(self.queries, chunk.of_keys(chunk.inputs.key, kv_start).astype(self.work))
        return chunk.transform(scores, chunk.bias(self.start, kv_start), chunk.inputs.captured, places)

    def _values(self, chunk: Chunk, weights: jax.Array, kv_start: jax.Array, places) -> jax.Array:
        shape = weights.shape[:3]
        if chunk.rest.seed is not None:
            weights = jnp.where(chunk.keep(places), weights, 0.0)
        weights = weights.astype(self.work).reshape(*self.queries.shape[:3], chunk.kv_size)
        values = chunk.of_keys(chunk.inputs.value, kv_start).astype(self.work)
        return dot(weights, values, (3, 2)).reshape(*shape, values.shape[-1])


def _finish(chunk: Chunk, top: jax.Array, total: jax.Array, output: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds the sinks to the denominator, divides, and takes the logarithm."""
    # A row's maximum weighs 1. (To ask whether `top` is -inf would keep XLA's CPU library from fusing the softmax.)
    empty = total == 0
    if chunk.inputs.sink_logits is not None:
        sink = chunk.inputs.sink_logits.astype(top.dtype)[chunk.heads][:, None]
        new_top = jnp.where(empty, top, jnp.maximum(top, sink))
        shrink = jnp.where(empty, 1.0, jnp.exp(top - new_top))
        total = total * shrink + jnp.where(empty, 0.0, jnp.exp(sink - new_top))
        output, top = output * shrink[..., None], new_top
    total = jnp.where(empty, 1.0, total)
    kept = 1.0 - chunk.rest.dropout_rate
    return output / (total * kept)[..., None], top + jnp.log(total)
