"""The backward pass of blockwise attention: once over the columns of tiles, for all gradients.

The logits of a tile are computed again from what the forward pass left, one logsumexp per row. Keys and values collect
their gradients in the column that holds them, queries in place.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from maskformer.attention.arguments import Inputs
from maskformer.attention.blockwise_chunk import (
    Chunk,
    Residuals,
    dot,
    full,
    layout_of,
    padded,
    positions,
    precise_dtype,
    scales_queries,
    working_dtype,
)
from maskformer.attention.blockwise_layout import Walk, add_cut


def backward(residuals: Residuals, d_output: jax.Array, d_residual: jax.Array | None, wanted: Inputs) -> Inputs:
    """Gradients of all inputs; None for those nobody wants."""
    original, fixed = residuals.inputs, residuals.fixed
    layout, precise = layout_of(original, fixed, transposed=True), precise_dtype(original)
    log_total, delta = _row_numbers(residuals, d_output, d_residual)
    inputs = padded(original, layout)
    # Queries that pad weigh nothing either.
    numbers = layout.pad_queries(jnp.stack([log_total, delta], axis=-1)).at[:, layout.q_len :, :, 0].set(jnp.inf)
    rows = _Rows(layout.pad_queries(d_output), numbers)
    captured_wanted = [i for i, flag in enumerate(wanted.captured) if flag]
    want_bias = inputs.bias is not None and wanted.bias

    def chunk_pass(carry, index):
        chunk = Chunk(layout, inputs, fixed, index)
        walk = Walk.of(fixed.block_map, chunk.entry, transposed=True)

        def column_pass(carry, column):
            gradients, d_keys, d_values = carry
            here = _Column(chunk, rows, captured_wanted, column)
            d_key, d_value, gradients = walk.fold(column, here.visit, (*here.zeros(), gradients))
            d_keys, d_values = chunk.put_keys(d_keys, d_key, here.start), chunk.put_keys(d_values, d_value, here.start)
            return (gradients, d_keys, d_values), None

        return jax.lax.scan(column_pass, carry, positions(layout.kv_blocks))[0], None

    gradients = _Gradients(
        query=full(inputs, inputs.query.shape, 0, precise),
        bias=full(inputs, inputs.bias.shape, 0, precise) if want_bias and inputs.bias is not None else None,
        captured=[full(inputs, inputs.captured[i].shape, 0, precise) for i in captured_wanted],
    )
    carry = gradients, *(full(inputs, x.shape, 0, precise) for x in (inputs.key, inputs.value))
    (gradients, d_key, d_value), _ = jax.lax.scan(chunk_pass, carry, positions(layout.chunks))
    d_query, d_key, d_value = gradients.query[:, : layout.q_len], d_key[:, : layout.kv_len], d_value[:, : layout.kv_len]

    # d_query lacks the scale; so does d_key, unless the queries carried it.
    scale = inputs.scale
    d_scale = jnp.sum(d_query * original.query.astype(precise)).astype(scale.dtype) if wanted.scale else None
    if not scales_queries(inputs):
        d_key = d_key * scale
    d_captured: list[jax.Array | None] = [None] * len(inputs.captured)
    for i, gradient in zip(captured_wanted, gradients.captured, strict=True):
        d_captured[i] = gradient.astype(inputs.captured[i].dtype)
    d_bias = gradients.bias
    if d_bias is not None and original.bias is not None:
        d_bias = jax.lax.slice(d_bias, (0,) * 4, original.bias.shape).astype(original.bias.dtype)
    d_sinks = None
    if original.sink_logits is not None and wanted.sink_logits:
        d_sinks = -jnp.sum(jnp.exp(original.sink_logits.astype(precise) - log_total) * delta, axis=(0, 1))
        d_sinks = d_sinks.astype(original.sink_logits.dtype)
    dtype = original.query.dtype
    return Inputs(
        query=(d_query * scale).astype(dtype),
        key=d_key.astype(dtype),
        value=d_value.astype(dtype),
        bias=d_bias,
        captured=tuple(d_captured),
        sink_logits=d_sinks,
        scale=d_scale,
    )


def _row_numbers(residuals: Residuals, d_output: jax.Array, d_residual: jax.Array | None):
    """The logsumexp and ``delta`` of every row, [batch, q_len, heads]: d logits = weights * (d weights - delta)."""
    precise = precise_dtype(residuals.inputs)
    # delta = rowsum(dO * O) - d logsumexp, but an empty row's logsumexp is the constant -inf.
    delta = jnp.sum(d_output.astype(precise) * residuals.output.astype(precise), axis=-1)
    if d_residual is not None:
        delta = delta - jnp.where(residuals.residual == -jnp.inf, 0.0, d_residual)
    # exp(logit - inf) = 0: what an empty row sees weighs nothing.
    return jnp.where(residuals.residual == -jnp.inf, jnp.inf, residuals.residual), delta


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What a tile needs of its queries, padded: ``d_output``, and logsumexp and delta, [batch, q_len, heads, 2]."""

    d_output: jax.Array
    numbers: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Gradients:
    """What every column adds to, of the inputs' shapes; ``captured`` has those that are wanted."""

    query: jax.Array
    bias: jax.Array | None
    captured: list[jax.Array]


class _Column:
    """One column of tiles of a chunk."""

    def __init__(self, chunk: Chunk, rows: _Rows, captured_wanted: list[int], column: jax.Array):
        self.chunk, self.rows, self.captured_wanted = chunk, rows, captured_wanted
        self.start = column * chunk.layout.block_kv
        self.work = working_dtype(chunk.inputs)
        self.keys, self.values = (
            chunk.of_keys(x, self.start).astype(self.work) for x in (chunk.inputs.key, chunk.inputs.value)
        )

    def zeros(self) -> tuple[jax.Array, jax.Array]:
        """Gradients of the keys and values that nothing has been added to, transposed: [b, h, d, kv_size]."""
        inputs = self.chunk.inputs
        d_key, d_value = (
            full(inputs, x.swapaxes(2, 3).shape, 0, precise_dtype(inputs)) for x in (self.keys, self.values)
        )
        return d_key, d_value

    def visit(self, q_start: jax.Array, carry, masked: bool):
        """Adds what the tile with these queries gives to all gradients."""
        chunk, (d_key, d_value, gradients) = self.chunk, carry
        inputs, rows, work = chunk.inputs, self.rows, self.work
        queries = chunk.scaled(chunk.of_queries(inputs.query, q_start).astype(work))
        d_out = chunk.of_queries(rows.d_output, q_start).astype(work)
        # dK = dS^T Q and dV = P^T dO as (Q^T dS)^T and (dO^T P)^T: turning the narrow operand is cheap, while a
        # product that reads a tile of logits by columns runs at a quarter of the speed on a CPU.
        queries_turned = chunk.scaled(chunk.of_queries_turned(inputs.query, q_start).astype(work))
        d_out_turned = chunk.of_queries_turned(rows.d_output, q_start).astype(work)
        shape, flat = (chunk.batches.size, chunk.heads.size, chunk.q_size), (*queries.shape[:3], chunk.kv_size)
        numbers = chunk.of_queries(rows.numbers, q_start).reshape(*shape, 2)
        log_total, delta = numbers[..., :1], numbers[..., 1:]
        places = chunk.places(q_start, self.start)

        scores, pull_back = self._scores(queries, q_start, places)
        weights = jnp.exp(scores - log_total)
        if masked:
            weights = jnp.where(chunk.visible(places, self.start), weights, 0.0)
        d_weights = dot(d_out, self.values, (3, 3)).reshape(weights.shape)
        dropped = weights
        if chunk.rest.seed is not None:
            grown = jnp.where(chunk.keep(places), 1.0 / (1.0 - chunk.rest.dropout_rate), 0.0)
            dropped, d_weights = weights * grown, d_weights * grown
        d_value = d_value + dot(d_out_turned, dropped.astype(work).reshape(flat), (3, 2))

        d_scores, d_bias, d_captured = pull_back(weights * (d_weights - delta))
        d_scores = d_scores.astype(work).reshape(flat)
        d_key = d_key + dot(queries_turned, d_scores, (3, 2))
        d_query = chunk.of_queries(gradients.query, q_start) + dot(d_scores, self.keys, (3, 2))
        corner = chunk.bias_corner(q_start, self.start)
        gradients = _Gradients(
            query=chunk.put_queries(gradients.query, d_query.reshape(*shape, -1), q_start),
            bias=None if gradients.bias is None else add_cut(gradients.bias, d_bias, corner),
            captured=[old + new for old, new in zip(gradients.captured, d_captured, strict=True)],
        )
        return d_key, d_value, gradients

    def _scores(self, queries: jax.Array, q_start: jax.Array, places):
        """The logits of a tile, and what gives the gradients of its products, bias and captured arrays from theirs."""
        chunk, captured = self.chunk, self.chunk.inputs.captured

        def transform(products, bias, wanted):
            merged = list(captured)
            for i, array in zip(self.captured_wanted, wanted, strict=True):
                merged[i] = array
            return chunk.transform(products, bias, tuple(merged), places)

        return jax.vjp(
            transform,
            chunk.products(queries, self.keys),
            chunk.bias(q_start, self.start),
            [captured[i] for i in self.captured_wanted],
        )
