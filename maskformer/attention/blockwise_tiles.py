"""The two passes of blockwise attention over the tiles of a block map."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maskformer import masks
from maskformer.attention import logits, platform
from maskformer.attention.blockwise_layout import Layout, Walk, add_cut, cut, plan
from maskformer.attention.score_mods import Lifted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What may have a gradient. Shapes as in `maskformer.attention.arguments.Call`; ``scale`` is []."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    captured: tuple[jax.Array, ...]
    sinks: jax.Array | None
    scale: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """What has none."""

    mask: masks.Mask
    block_map: masks.BlockMap
    seed: jax.Array | None
    q_offset: jax.Array
    kv_offset: jax.Array
    batch_start: jax.Array
    head_start: jax.Array


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static."""

    score_mod: Lifted | None
    soft_cap: float | None
    dropout_rate: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward pass needs: the inputs, the output (as precise as it may be) and one number per row."""

    inputs: Inputs
    fixed: Fixed
    output: jax.Array
    residual: jax.Array
    wanted: Any


def _range(stop: int) -> jax.Array:
    """0, 1, ... in the int32 of all positions, under jax_enable_x64 too."""
    return jnp.arange(stop, dtype=jnp.int32)


def _full(inputs: Inputs, shape: tuple[int, ...], value: Any, dtype: Any) -> jax.Array:
    """A constant that varies over the same manual mesh axes as the inputs: a loop inside `jax.shard_map` keeps them."""
    return vary(jnp.full(shape, value, dtype), varying(inputs.query))


def varying(x: Any) -> frozenset[str]:
    """The manual mesh axes over which an array varies inside `jax.shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


def vary(x: Any, axes: frozenset[str]) -> Any:
    """``x`` as an array that varies over these too."""
    missing = axes - varying(x)
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product per (batch, head) of the chunk, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    accumulate = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulate)


class _Chunk:
    """One chunk of heads: its mask and its visits, and the logits of any of them.

    A visit is ``q_size`` queries by ``kv_size`` keys: one tile, or one in each row and its whole band in each column
    (or the other way about). It is named by its first query and first key.
    """

    def __init__(self, options: Options, layout: Layout, inputs: Inputs, fixed: Fixed, index: jax.Array):
        self.options, self.layout, self.inputs, self.fixed = options, layout, inputs, fixed
        self.q_size, self.kv_size = layout.visit
        self.batch_start, self.head_start = layout.origin(index)
        self.batches = self.batch_start + _range(layout.batch_chunk)
        self.heads = self.head_start + _range(layout.head_chunk * layout.groups)
        shape = fixed.block_map.shape
        self.entry = (self.batch_start if shape[0] > 1 else 0, self.head_start if shape[1] > 1 else 0)
        self.mask = fixed.mask.select(*self.entry)

    def of_width(self, blocks: int) -> _Chunk:
        """The same chunk, seen so many blocks of keys at a time."""
        chunk = copy.copy(self)
        chunk.kv_size = blocks * self.layout.block_kv
        return chunk

    def bias_corner(self, q_start: jax.Array, kv_start: jax.Array):
        return self.batch_start, self.head_start, q_start, kv_start

    def bias(self, q_start: jax.Array, kv_start: jax.Array) -> jax.Array | None:
        """The bias of a visit, broadcastable to [batch_chunk, heads of the chunk, q_size, kv_size]."""
        if self.inputs.bias is None:
            return None
        sizes = (self.batches.size, self.heads.size, self.q_size, self.kv_size)
        return cut(self.inputs.bias, self.bias_corner(q_start, kv_start), sizes)

    def places(self, q_start: jax.Array, kv_start: jax.Array):
        fixed = self.fixed
        q = fixed.q_offset + q_start + _range(self.q_size)
        k = fixed.kv_offset + kv_start + _range(self.kv_size)
        return fixed.batch_start + self.batches, fixed.head_start + self.heads, q, k

    def of_queries(self, x: jax.Array, q_start: jax.Array) -> jax.Array:
        """A visit's part of [batch, length, heads, d], the heads of a key head stacked: [b, h, groups * q_size, d]."""
        x = self._slice(x, q_start, self.q_size, self.head_start, self.heads.size)
        return x.swapaxes(1, 2).reshape(x.shape[0], self.layout.head_chunk, -1, x.shape[3])

    def of_queries_turned(self, x: jax.Array, q_start: jax.Array) -> jax.Array:
        """`of_queries` transposed: [b, h, d, groups * q_size]."""
        x = self._slice(x, q_start, self.q_size, self.head_start, self.heads.size)
        x = x.reshape(*x.shape[:2], self.layout.head_chunk, -1, x.shape[3]).transpose(0, 2, 4, 3, 1)
        return x.reshape(*x.shape[:3], -1)

    def of_keys(self, x: jax.Array, kv_start: jax.Array) -> jax.Array:
        """A visit's part of [batch, length, kv_heads, d]: [b, h, kv_size, d]."""
        kv_head = self.head_start // self.layout.groups
        return self._slice(x, kv_start, self.kv_size, kv_head, self.layout.head_chunk).swapaxes(1, 2)

    def _slice(self, x: jax.Array, start: jax.Array, size: int, head: jax.Array, heads: int) -> jax.Array:
        sizes = (self.batches.size, size, heads, x.shape[3])
        return jax.lax.dynamic_slice(x, (self.batch_start, start, head, jnp.int32(0)), sizes)

    def scaled(self, queries: jax.Array) -> jax.Array:
        return queries * self.inputs.scale.astype(queries.dtype) if _scales_queries(self.inputs) else queries

    def put_queries(self, results: jax.Array, part: jax.Array, q_start: jax.Array) -> jax.Array:
        """Writes [b, heads of the chunk, q_size, d] where `of_queries` reads."""
        start = (self.batch_start, q_start, self.head_start, jnp.int32(0))
        return jax.lax.dynamic_update_slice(results, part.swapaxes(1, 2).astype(results.dtype), start)

    def put_keys(self, results: jax.Array, part: jax.Array, kv_start: jax.Array) -> jax.Array:
        """Writes the transpose [b, h, d, kv_size] of what `of_keys` reads."""
        start = (self.batch_start, kv_start, self.head_start // self.layout.groups, jnp.int32(0))
        return jax.lax.dynamic_update_slice(results, part.transpose(0, 3, 1, 2).astype(results.dtype), start)

    def products(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Scaled ``QK^T``, [batch_chunk, heads of the chunk, q_size, kv_size]."""
        scores = _dot(queries, keys, (3, 3))
        if not _scales_queries(self.inputs):
            scores = scores * self.inputs.scale
        return scores.reshape(self.batches.size, self.heads.size, self.q_size, self.kv_size)

    def transform(self, scores, bias, captured, places) -> jax.Array:
        return logits.transform(
            scores,
            bias=bias,
            score_mod=self.options.score_mod,
            captured=captured,
            soft_cap=self.options.soft_cap,
            places=places,
        )

    def visible(self, places, kv_start: jax.Array, then: Callable[[jax.Array], Any] = lambda attends: attends) -> Any:
        """``then`` of the mask of a visit, bool [q_size, kv_size]; keys past the end are not there."""
        _, _, q, k = places
        inside = kv_start + _range(self.kv_size) < self.layout.kv_len
        # XLA would merge the mask into every use of the logits and evaluate it anew for each head. It does not look
        # into a conditional, whose condition it cannot know.
        return jax.lax.cond(
            kv_start >= 0,
            lambda: then(self.mask(q[:, None], k[None, :]) & inside),
            lambda: then(_full(self.inputs, (q.size, k.size), False, bool)),
        )

    def capped(self, scores: jax.Array, places, kv_start: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logits of a visit, -inf where the mask says no; and which queries have a key, bool [q_size, 1].

        A minimum does it where no logit is NaN. XLA's CPU library fuses that, and not a select, with the product before
        it and the softmax after it.
        """

        def evaluate(attends):
            ceiling = jnp.where(attends, jnp.inf, -jnp.inf).astype(scores.dtype)
            return ceiling, jnp.any(attends, axis=-1, keepdims=True)

        ceiling, seen = self.visible(places, kv_start, evaluate)
        return jnp.minimum(scores, ceiling), seen

    def keep(self, places) -> jax.Array:
        return logits.keep(self.fixed.seed, self.options.dropout_rate, places)


def _working_dtype(inputs: Inputs) -> jnp.dtype:
    """The dtype of products. A CPU multiplies float32 as fast as half precision, and need not round the weights."""
    dtype = inputs.query.dtype
    return jnp.promote_types(dtype, jnp.float32) if platform.current() == "cpu" else dtype


def _scales_queries(inputs: Inputs) -> bool:
    # Scaling the queries is cheaper than scaling the logits, but rounds them in half precision.
    return _working_dtype(inputs).itemsize >= 4


def _plan(inputs: Inputs, fixed: Fixed, *, transposed: bool) -> Layout:
    batch, q_len, heads, _ = inputs.query.shape
    kv_len, kv_heads = inputs.key.shape[1:3]
    return plan(batch, kv_heads, heads // kv_heads, (q_len, kv_len), fixed.block_map, transposed=transposed)


def _padded(inputs: Inputs, layout: Layout) -> Inputs:
    """Lengths of whole tiles. Kept in their own layout and dtype: each visit copies its part anyway."""
    return dataclasses.replace(
        inputs,
        query=layout.pad_queries(inputs.query),
        key=layout.pad_keys(inputs.key),
        value=layout.pad_keys(inputs.value),
        bias=None if inputs.bias is None else layout.pad_bias(inputs.bias),
    )


def forward(options: Options, inputs: Inputs, fixed: Fixed, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Output [batch, q_len, heads, value_dim] in ``dtype`` and logsumexp [batch, q_len, heads]."""
    layout = _plan(inputs, fixed, transposed=False)
    value_dim = inputs.value.shape[-1]
    work, precise = _working_dtype(inputs), jnp.promote_types(inputs.query.dtype, jnp.float32)
    inputs = _padded(inputs, layout)

    def chunk_pass(results, index):
        chunk = _Chunk(options, layout, inputs, fixed, index)
        walk = Walk.of(fixed.block_map, chunk.entry, transposed=False)
        shape = (chunk.batches.size, chunk.heads.size, chunk.q_size)

        def row_pass(results, row):
            q_start = row * layout.block_q
            queries = chunk.scaled(chunk.of_queries(inputs.query, q_start).astype(work))

            def scores_of(chunk, kv_start, places):
                scores = chunk.products(queries, chunk.of_keys(inputs.key, kv_start).astype(work))
                return chunk.transform(scores, chunk.bias(q_start, kv_start), inputs.captured, places)

            def values_of(chunk, weights, kv_start, places):
                if fixed.seed is not None:
                    weights = jnp.where(chunk.keep(places), weights, 0.0)
                weights = weights.astype(work).reshape(*queries.shape[:3], chunk.kv_size)
                values = chunk.of_keys(inputs.value, kv_start).astype(work)
                return _dot(weights, values, (3, 2)).reshape(*shape, value_dim)

            def visit(kv_start, carry, masked: bool):
                """Online softmax: the row's weights are kept relative to its maximum so far."""
                top, total, output = carry
                places = chunk.places(q_start, kv_start)
                scores = scores_of(chunk, kv_start, places)
                if masked:
                    scores = jnp.where(chunk.visible(places, kv_start), scores, -jnp.inf)
                new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
                # While a row has seen nothing its maximum is -inf, which must not meet itself in a difference.
                finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
                weights = jnp.exp(scores - finite[..., None])
                shrink = jnp.exp(top - finite)
                total = total * shrink + jnp.sum(weights, axis=-1)
                return new_top, total, output * shrink[..., None] + values_of(chunk, weights, kv_start, places)

            def only_visit(chunk, kv_start):
                """Softmax of a row that is whole. One without keys is NaN until it is set to 0."""
                places = chunk.places(q_start, kv_start)
                scores, seen = chunk.capped(scores_of(chunk, kv_start, places), places, kv_start)
                top = jnp.max(scores, axis=-1)
                weights = jnp.exp(scores - top[..., None])
                total, output = jnp.sum(weights, axis=-1), values_of(chunk, weights, kv_start, places)
                return top, jnp.where(seen[:, 0], total, 0.0), jnp.where(seen, output, 0.0)

            # Where a bias or a score_mod makes -inf or NaN of its own, only the online softmax tells them apart.
            plain = inputs.bias is None and options.score_mod is None
            carry = (
                _full(inputs, shape, -jnp.inf, precise),
                _full(inputs, shape, 0, precise),
                _full(inputs, (*shape, value_dim), 0, precise),
            )
            if plain and walk.banded:
                carry = only_visit(chunk, walk.band_start(row))
            elif plain and layout.widths:
                # Known at run time only: a row whose tiles span no more than so many blocks is visited at once too.
                first, span = walk.span(row)
                branches = [
                    functools.partial(only_visit, chunk.of_width(width), walk.start(first, width))
                    for width in layout.widths
                ]
                branches.append(functools.partial(walk.fold, row, visit, carry))
                carry = jax.lax.switch(jnp.sum(span > jnp.asarray(layout.widths), dtype=jnp.int32), branches)
            else:
                carry = walk.fold(row, visit, carry)
            output, residual = _finish(chunk, *carry)
            new = output, residual[..., None]
            return tuple(chunk.put_queries(old, part, q_start) for old, part in zip(results, new, strict=True)), None

        return jax.lax.scan(row_pass, results, _range(layout.q_blocks))[0], None

    # Written where they belong, tile by tile: stacking them would cost a transposed copy.
    shape = inputs.query.shape[:3]
    results = (
        _full(inputs, (*shape, value_dim), 0, dtype),
        _full(inputs, (*shape, 1), 0, precise),
    )
    (output, residual), _ = jax.lax.scan(chunk_pass, results, _range(layout.chunks))
    return output[:, : layout.q_len], residual[:, : layout.q_len, :, 0]


def _finish(chunk: _Chunk, top: jax.Array, total: jax.Array, output: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds the sinks to the denominator, divides, and takes the logarithm."""
    # A row's maximum weighs 1. (To ask whether `top` is -inf would keep XLA's CPU library from fusing the softmax.)
    empty = total == 0
    if chunk.inputs.sinks is not None:
        sink = chunk.inputs.sinks.astype(top.dtype)[chunk.heads][:, None]
        new_top = jnp.where(empty, top, jnp.maximum(top, sink))
        shrink = jnp.where(empty, 1.0, jnp.exp(top - new_top))
        total = total * shrink + jnp.where(empty, 0.0, jnp.exp(sink - new_top))
        output, top = output * shrink[..., None], new_top
    total = jnp.where(empty, 1.0, total)
    kept = 1.0 - chunk.options.dropout_rate
    return output / (total * kept)[..., None], top + jnp.log(total)


def backward(
    options: Options, residuals: Residuals, d_output: jax.Array, d_residual: jax.Array | None, wanted: Inputs
) -> Inputs:
    """Gradients of all inputs; None for those nobody wants."""
    original, fixed = residuals.inputs, residuals.fixed
    layout = _plan(original, fixed, transposed=True)
    dtype = original.query.dtype
    work, precise = _working_dtype(original), jnp.promote_types(dtype, jnp.float32)

    # d logits = p * (dp - delta), with delta = rowsum(dO * O) - d logsumexp.
    delta = jnp.sum(d_output.astype(precise) * residuals.output.astype(precise), axis=-1)
    if d_residual is not None:
        # An empty row's logsumexp is the constant -inf.
        delta = delta - jnp.where(residuals.residual == -jnp.inf, 0.0, d_residual)
    # exp(logit - inf) = 0: empty rows, and the padding below, weigh nothing.
    log_total = jnp.where(residuals.residual == -jnp.inf, jnp.inf, residuals.residual)
    d_sinks = None
    if original.sinks is not None and wanted.sinks:
        d_sinks = -jnp.sum(jnp.exp(original.sinks.astype(precise) - log_total) * delta, axis=(0, 1))
        d_sinks = d_sinks.astype(original.sinks.dtype)
    inputs = _padded(original, layout)
    d_output = layout.pad_queries(d_output)
    numbers = layout.pad_queries(jnp.stack([log_total, delta], axis=-1)).at[:, layout.q_len :, :, 0].set(jnp.inf)

    want_bias = inputs.bias is not None and wanted.bias
    captured_wanted = [i for i, flag in enumerate(wanted.captured) if flag]
    d_bias = _full(inputs, inputs.bias.shape, 0, precise) if want_bias and inputs.bias is not None else None
    d_captured = [_full(inputs, inputs.captured[i].shape, 0, precise) for i in captured_wanted]

    def chunk_pass(carry, index):
        chunk = _Chunk(options, layout, inputs, fixed, index)
        walk = Walk.of(fixed.block_map, chunk.entry, transposed=True)

        def column_pass(carry, column):
            kv_start = column * layout.block_kv
            keys, values = (chunk.of_keys(x, kv_start).astype(work) for x in (inputs.key, inputs.value))

            def visit(q_start, carry, masked: bool):
                d_key, d_value, (d_query, d_bias, d_captured) = carry
                queries = chunk.scaled(chunk.of_queries(inputs.query, q_start).astype(work))
                d_out = chunk.of_queries(d_output, q_start).astype(work)
                # dK = dS^T Q and dV = P^T dO as (Q^T dS)^T and (dO^T P)^T: turning the narrow operand is cheap, while a
                # product that reads a tile of logits by columns runs at a quarter of the speed on a CPU.
                queries_turned = chunk.scaled(chunk.of_queries_turned(inputs.query, q_start).astype(work))
                d_out_turned = chunk.of_queries_turned(d_output, q_start).astype(work)
                shape = (chunk.batches.size, chunk.heads.size, chunk.q_size)
                row_numbers = chunk.of_queries(numbers, q_start).reshape(*shape, 2)
                places = chunk.places(q_start, kv_start)

                def transform(scores, bias, wanted_captured):
                    captured = list(inputs.captured)
                    for i, array in zip(captured_wanted, wanted_captured, strict=True):
                        captured[i] = array
                    return chunk.transform(scores, bias, tuple(captured), places)

                arguments = (
                    chunk.products(queries, keys),
                    chunk.bias(q_start, kv_start),
                    [inputs.captured[i] for i in captured_wanted],
                )
                scores, pull_back = jax.vjp(transform, *arguments)
                weights = jnp.exp(scores - row_numbers[..., :1])
                if masked:
                    weights = jnp.where(chunk.visible(places, kv_start), weights, 0.0)
                flat = (*queries.shape[:3], chunk.kv_size)
                d_weights = _dot(d_out, values, (3, 3)).reshape(weights.shape)
                dropped = weights
                if fixed.seed is not None:
                    grown = jnp.where(chunk.keep(places), 1.0 / (1.0 - options.dropout_rate), 0.0)
                    dropped, d_weights = weights * grown, d_weights * grown
                d_value = d_value + _dot(d_out_turned, dropped.astype(work).reshape(flat), (3, 2))
                d_logits = weights * (d_weights - row_numbers[..., 1:])
                d_scores, d_bias_part, d_captured_part = pull_back(d_logits)
                if want_bias:
                    d_bias = add_cut(d_bias, d_bias_part, chunk.bias_corner(q_start, kv_start))
                d_captured = [old + new for old, new in zip(d_captured, d_captured_part, strict=True)]
                d_scores = d_scores.astype(work).reshape(flat)
                d_key = d_key + _dot(queries_turned, d_scores, (3, 2))
                added = chunk.of_queries(d_query, q_start) + _dot(d_scores, keys, (3, 2))
                d_query = chunk.put_queries(d_query, added.reshape(*shape, -1), q_start)
                return d_key, d_value, (d_query, d_bias, d_captured)

            d_inputs, d_keys, d_values = carry
            tiles = (_full(inputs, x.swapaxes(2, 3).shape, 0, precise) for x in (keys, values))
            d_key, d_value, d_inputs = walk.fold(column, visit, (*tiles, d_inputs))
            d_keys, d_values = chunk.put_keys(d_keys, d_key, kv_start), chunk.put_keys(d_values, d_value, kv_start)
            return (d_inputs, d_keys, d_values), None

        return jax.lax.scan(column_pass, carry, _range(layout.kv_blocks))[0], None

    d_query, d_key, d_value = (_full(inputs, x.shape, 0, precise) for x in (inputs.query, inputs.key, inputs.value))
    carry = ((d_query, d_bias, d_captured), d_key, d_value)
    ((d_query, d_bias, d_captured), d_key, d_value), _ = jax.lax.scan(chunk_pass, carry, _range(layout.chunks))
    d_query, d_key, d_value = d_query[:, : layout.q_len], d_key[:, : layout.kv_len], d_value[:, : layout.kv_len]

    # d_query lacks the scale; so does d_key, unless the queries carried it.
    scale = inputs.scale
    d_scale = jnp.sum(d_query * original.query.astype(precise)).astype(scale.dtype) if wanted.scale else None
    if not _scales_queries(inputs):
        d_key = d_key * scale
    all_captured = [None] * len(inputs.captured)
    for i, gradient in zip(captured_wanted, d_captured, strict=True):
        all_captured[i] = gradient.astype(inputs.captured[i].dtype)
    if d_bias is not None and original.bias is not None:
        d_bias = jax.lax.slice(d_bias, (0,) * 4, original.bias.shape).astype(original.bias.dtype)
    return Inputs(
        query=(d_query * scale).astype(dtype),
        key=d_key.astype(dtype),
        value=d_value.astype(dtype),
        bias=d_bias,
        captured=tuple(all_captured),
        sinks=d_sinks,
        scale=d_scale,
    )
