"""The two loops of blockwise attention over the tiles that a block map lists."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maskformer import masks
from maskformer.attention import logits, platform
from maskformer.attention.blockwise_layout import Layout, add_cut, cut, pad_bias, plan
from maskformer.attention.score_mods import Lifted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What may have a gradient. Shapes as in `maskformer.attention.arguments.Call`; ``scale`` is float32 []."""

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
    """What the backward pass needs: the inputs, the output and one number per row."""

    inputs: Inputs
    fixed: Fixed
    output: jax.Array
    residual: jax.Array
    wanted: Any


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product per (batch, head) of the chunk, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    accumulate = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulate)


class _Chunk:
    """One chunk of heads: its mask and tile lists, and the logits of any of its tiles."""

    def __init__(self, options: Options, layout: Layout, inputs: Inputs, fixed: Fixed, index: jax.Array):
        self.options, self.layout, self.inputs, self.fixed = options, layout, inputs, fixed
        self.batch_start, self.head_start = layout.origin(index)
        self.batches = self.batch_start + jnp.arange(layout.batch_chunk)
        self.heads = self.head_start + jnp.arange(layout.head_chunk * layout.groups)
        shape = fixed.block_map.shape
        self.entry = (self.batch_start if shape[0] > 1 else 0, self.head_start if shape[1] > 1 else 0)
        self.mask = fixed.mask.select(*self.entry)

    def lists(self, name: str) -> tuple[jax.Array, jax.Array]:
        """Counts [rows] and indices [rows, width] of this chunk's tile lists."""
        tiles = getattr(self.fixed.block_map, name)
        return jnp.asarray(tiles.count)[self.entry], jnp.asarray(tiles.index)[self.entry]

    def bias_corner(self, row: jax.Array, column: jax.Array):
        return (self.batch_start, self.head_start, row * self.layout.block_q, column * self.layout.block_kv)

    def bias(self, row: jax.Array, column: jax.Array) -> jax.Array | None:
        """The tile of the bias, broadcastable to [batch_chunk, heads of the chunk, block_q, block_kv]."""
        if self.inputs.bias is None:
            return None
        sizes = (self.batches.size, self.heads.size, self.layout.block_q, self.layout.block_kv)
        return cut(self.inputs.bias, self.bias_corner(row, column), sizes)

    def places(self, row: jax.Array, column: jax.Array):
        layout, fixed = self.layout, self.fixed
        q = fixed.q_offset + row * layout.block_q + jnp.arange(layout.block_q)
        k = fixed.kv_offset + column * layout.block_kv + jnp.arange(layout.block_kv)
        return fixed.batch_start + self.batches, fixed.head_start + self.heads, q, k

    def query_tile(self, queries: jax.Array, row: jax.Array) -> jax.Array:
        """Block ``row`` of [batch, length, heads, dim], the heads of a key head stacked: [b, h, groups * block, d]."""
        layout = self.layout
        start = (self.batch_start, row * layout.block_q, self.head_start, 0)
        sizes = (self.batches.size, layout.block_q, self.heads.size, queries.shape[3])
        tile = jax.lax.dynamic_slice(queries, start, sizes)
        tile = tile.astype(_working_dtype(self.inputs))
        if _scales_queries(self.inputs):
            tile = tile * self.inputs.scale.astype(tile.dtype)
        return tile.swapaxes(1, 2).reshape(tile.shape[0], layout.head_chunk, -1, tile.shape[3])

    def key_tile(self, keys: jax.Array, column: jax.Array) -> jax.Array:
        """Block ``column`` of [batch, length, kv_heads, dim]: [b, h, block, d]."""
        layout = self.layout
        start = (self.batch_start, column * layout.block_kv, self.head_start // layout.groups, 0)
        sizes = (self.batches.size, layout.block_kv, layout.head_chunk, keys.shape[3])
        return jax.lax.dynamic_slice(keys, start, sizes).astype(_working_dtype(self.inputs)).swapaxes(1, 2)

    def put(self, results: jax.Array, tile: jax.Array, row: jax.Array) -> jax.Array:
        """Writes [b, heads of the chunk, block_q, d] into block ``row`` of [batch, length, heads, d]."""
        start = (self.batch_start, row * self.layout.block_q, self.head_start, 0)
        return jax.lax.dynamic_update_slice(results, tile.swapaxes(1, 2).astype(results.dtype), start)

    def products(self, q_tile: jax.Array, k_tile: jax.Array) -> jax.Array:
        """Scaled ``QK^T``, [batch_chunk, heads of the chunk, block_q, block_kv]."""
        scores = _dot(q_tile, k_tile, (3, 3))
        if not _scales_queries(self.inputs):
            scores = scores * self.inputs.scale
        return scores.reshape(self.batches.size, self.heads.size, self.layout.block_q, self.layout.block_kv)

    def transform(self, scores, bias, captured, places) -> jax.Array:
        return logits.transform(
            scores,
            bias=bias,
            score_mod=self.options.score_mod,
            captured=captured,
            soft_cap=self.options.soft_cap,
            places=places,
        )

    def visible(self, places, column: jax.Array) -> jax.Array:
        """The mask of a partial tile, bool [block_q, block_kv]; keys past the end are not there."""
        _, _, q, k = places
        inside = column * self.layout.block_kv + jnp.arange(self.layout.block_kv) < self.layout.kv_len

        def evaluate():
            return self.mask(q[:, None], k[None, :]) & inside

        # XLA would merge the mask into every use of the logits and evaluate it anew for each head. It does not look
        # into a conditional, whose condition it cannot know.
        return jax.lax.cond(column >= 0, evaluate, lambda: jnp.zeros((q.size, k.size), bool))

    def keep(self, places) -> jax.Array:
        return logits.keep(self.fixed.seed, self.options.dropout_rate, places)


def _layout(inputs: Inputs, fixed: Fixed) -> Layout:
    batch, q_len, heads, _ = inputs.query.shape
    kv_len, kv_heads = inputs.key.shape[1:3]
    block_map = fixed.block_map
    block = (block_map.block_q, block_map.block_kv)
    return plan(batch, kv_heads, heads // kv_heads, (q_len, kv_len), block, block_map.shape)


def _working_dtype(inputs: Inputs) -> jnp.dtype:
    """The dtype of products. A CPU multiplies float32 as fast as half precision, and need not round the weights."""
    dtype = inputs.query.dtype
    return jnp.promote_types(dtype, jnp.float32) if platform.current() == "cpu" else dtype


def _scales_queries(inputs: Inputs) -> bool:
    # Scaling the queries is cheaper than scaling the logits, but rounds them in half precision.
    return _working_dtype(inputs).itemsize >= 4


def _prepare(inputs: Inputs, layout: Layout) -> tuple[Inputs, jax.Array, jax.Array, jax.Array]:
    """Inputs with a padded bias, and query, key and value split into chunks."""
    work = _working_dtype(inputs)
    query, key, value = (x.astype(work) for x in (inputs.query, inputs.key, inputs.value))
    if _scales_queries(inputs):
        query = query * inputs.scale.astype(work)
    if inputs.bias is not None:
        inputs = dataclasses.replace(inputs, bias=pad_bias(inputs.bias, layout))
    return inputs, layout.split_queries(query), layout.split_keys(key), layout.split_keys(value)


def _rows(x: jax.Array, index: jax.Array, block: int) -> jax.Array:
    """Block ``index`` of the queries of a chunk, the query heads of a key head stacked: [b, h, groups * block, d]."""
    tile = jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=3)
    return tile.reshape(*tile.shape[:2], -1, tile.shape[4])


def _columns(x: jax.Array, index: jax.Array, block: int) -> jax.Array:
    """The transpose of `_rows` from transposed queries [b, h, d, groups, length]: [b, h, d, groups * block]."""
    tile = jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=4)
    return tile.reshape(*tile.shape[:3], -1)


def forward(options: Options, inputs: Inputs, fixed: Fixed) -> tuple[jax.Array, jax.Array]:
    """Output [batch, q_len, heads, value_dim] and logsumexp [batch, q_len, heads]."""
    layout = _layout(inputs, fixed)
    block_q, block_kv = layout.block_q, layout.block_kv
    value_dim = inputs.value.shape[-1]
    precise = jnp.promote_types(inputs.query.dtype, jnp.float32)
    query, key, value = layout.pad_queries(inputs.query), layout.pad_keys(inputs.key), layout.pad_keys(inputs.value)
    if inputs.bias is not None:
        inputs = dataclasses.replace(inputs, bias=pad_bias(inputs.bias, layout))

    def chunk_pass(results, index):
        chunk = _Chunk(options, layout, inputs, fixed, index)
        shape = (chunk.batches.size, chunk.heads.size, block_q)
        partial_count, partial_index = chunk.lists("partial")
        full_count, full_index = chunk.lists("full")

        def row_pass(results, row):
            q_tile = chunk.query_tile(query, row)

            def visit(column, carry, masked: bool):
                top, total, output = carry
                k_tile, v_tile = chunk.key_tile(key, column), chunk.key_tile(value, column)
                places = chunk.places(row, column)
                scores = chunk.products(q_tile, k_tile)
                scores = chunk.transform(scores, chunk.bias(row, column), inputs.captured, places)
                if masked:
                    scores = jnp.where(chunk.visible(places, column), scores, -jnp.inf)
                new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
                # While a row has seen nothing its maximum is -inf, which must not meet itself in a difference.
                finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
                weights = jnp.exp(scores - finite[..., None])
                shrink = jnp.exp(top - finite)
                total = total * shrink + jnp.sum(weights, axis=-1)
                if fixed.seed is not None:
                    weights = jnp.where(chunk.keep(places), weights, 0.0)
                weights = weights.astype(q_tile.dtype).reshape(*q_tile.shape[:3], block_kv)
                added = _dot(weights, v_tile, (3, 2)).reshape(*shape, value_dim)
                return new_top, total, output * shrink[..., None] + added

            carry = (
                jnp.full(shape, -jnp.inf, precise),
                jnp.zeros(shape, precise),
                jnp.zeros((*shape, value_dim), precise),
            )
            carry = jax.lax.fori_loop(
                0, full_count[row], lambda i, c: visit(full_index[row, i], c, masked=False), carry
            )
            carry = jax.lax.fori_loop(
                0, partial_count[row], lambda i, c: visit(partial_index[row, i], c, masked=True), carry
            )
            output, residual = _finish(chunk, *carry)
            new = output, residual[..., None]
            return tuple(chunk.put(old, tile, row) for old, tile in zip(results, new, strict=True)), None

        return jax.lax.scan(row_pass, results, jnp.arange(layout.q_blocks))[0], None

    # Written where they belong, tile by tile: stacking them would cost a transposed copy.
    results = jnp.zeros((*query.shape[:3], value_dim), inputs.query.dtype), jnp.zeros((*query.shape[:3], 1), precise)
    (output, residual), _ = jax.lax.scan(chunk_pass, results, jnp.arange(layout.chunks))
    return output[:, : layout.q_len], residual[:, : layout.q_len, :, 0]


def _finish(chunk: _Chunk, top: jax.Array, total: jax.Array, output: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds the sinks to the denominator, divides, and takes the logarithm."""
    empty = top == -jnp.inf
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
    inputs, fixed = residuals.inputs, residuals.fixed
    layout = _layout(inputs, fixed)
    block_q, block_kv = layout.block_q, layout.block_kv
    dtype = inputs.query.dtype
    precise = jnp.promote_types(dtype, jnp.float32)
    original = inputs
    inputs, queries, keys, values = _prepare(inputs, layout)

    # d logits = p * (dp - delta), with delta = rowsum(dO * O) - d logsumexp.
    delta = jnp.sum(d_output.astype(precise) * residuals.output.astype(precise), axis=-1)
    if d_residual is not None:
        # An empty row's logsumexp is the constant -inf.
        delta = delta - jnp.where(residuals.residual == -jnp.inf, 0.0, d_residual)
    # exp(logit - inf) = 0: empty rows, and the padding below, weigh nothing.
    log_total = jnp.where(residuals.residual == -jnp.inf, jnp.inf, residuals.residual)
    d_sinks = None
    if inputs.sinks is not None and wanted.sinks:
        d_sinks = -jnp.sum(jnp.exp(inputs.sinks.astype(precise) - log_total) * delta, axis=(0, 1))
        d_sinks = d_sinks.astype(inputs.sinks.dtype)
    d_outputs = layout.split_queries(d_output.astype(queries.dtype))
    # dK = dS^T Q and dV = P^T dO as (Q^T dS)^T and (dO^T P)^T: transposing the narrow operand once is free, while a
    # product that reads a tile of logits by columns runs at a quarter of the speed on a CPU.
    turned = tuple(jnp.moveaxis(x, 5, 3) for x in (queries, d_outputs))
    rows = layout.split_queries(jnp.stack([log_total, delta], axis=-1))
    rows = rows.at[..., layout.q_len :, 0].set(jnp.inf)

    want_bias = inputs.bias is not None and wanted.bias
    captured_wanted = [i for i, flag in enumerate(wanted.captured) if flag]
    d_bias = jnp.zeros(inputs.bias.shape, precise) if want_bias and inputs.bias is not None else None
    d_captured = [jnp.zeros(inputs.captured[i].shape, precise) for i in captured_wanted]

    def chunk_pass(carry, xs):
        index, query, key, value, d_out, turned, row_numbers = xs
        chunk = _Chunk(options, layout, inputs, fixed, index)
        partial_count, partial_index = chunk.lists("partial_t")
        full_count, full_index = chunk.lists("full_t")

        def column_pass(carry, column):
            k_tile = jax.lax.dynamic_slice_in_dim(key, column * block_kv, block_kv, axis=2)
            v_tile = jax.lax.dynamic_slice_in_dim(value, column * block_kv, block_kv, axis=2)

            def visit(row, carry, masked: bool):
                d_key, d_value, (d_query, d_bias, d_captured) = carry
                q_tile, do_tile = _rows(query, row, block_q), _rows(d_out, row, block_q)
                q_turned, do_turned = (_columns(x, row, block_q) for x in turned)
                numbers = _rows(row_numbers, row, block_q).reshape(chunk.batches.size, chunk.heads.size, block_q, 2)
                places = chunk.places(row, column)

                def transform(scores, bias, wanted_captured):
                    captured = list(inputs.captured)
                    for i, array in zip(captured_wanted, wanted_captured, strict=True):
                        captured[i] = array
                    return chunk.transform(scores, bias, tuple(captured), places)

                arguments = (
                    chunk.products(q_tile, k_tile),
                    chunk.bias(row, column),
                    [inputs.captured[i] for i in captured_wanted],
                )
                scores, pull_back = jax.vjp(transform, *arguments)
                weights = jnp.exp(scores - numbers[..., :1])
                if masked:
                    weights = jnp.where(chunk.visible(places, column), weights, 0.0)
                flat = (*q_tile.shape[:3], block_kv)
                d_weights = _dot(do_tile, v_tile, (3, 3)).reshape(weights.shape)
                dropped = weights
                if fixed.seed is not None:
                    grown = jnp.where(chunk.keep(places), 1.0 / (1.0 - options.dropout_rate), 0.0)
                    dropped, d_weights = weights * grown, d_weights * grown
                d_value = d_value + _dot(do_turned, dropped.astype(q_tile.dtype).reshape(flat), (3, 2))
                d_logits = weights * (d_weights - numbers[..., 1:])
                d_scores, d_bias_tile, d_captured_tile = pull_back(d_logits)
                if want_bias:
                    d_bias = add_cut(d_bias, d_bias_tile, chunk.bias_corner(row, column))
                d_captured = [old + new for old, new in zip(d_captured, d_captured_tile, strict=True)]
                d_scores = d_scores.astype(q_tile.dtype).reshape(flat)
                d_key = d_key + _dot(q_turned, d_scores, (3, 2))
                added = _dot(d_scores, k_tile, (3, 2)).reshape(*d_query.shape[:3], block_q, -1)
                old = jax.lax.dynamic_slice_in_dim(d_query, row * block_q, block_q, axis=3)
                d_query = jax.lax.dynamic_update_slice_in_dim(d_query, old + added, row * block_q, axis=3)
                return d_key, d_value, (d_query, d_bias, d_captured)

            carry = (*(jnp.zeros(x.swapaxes(2, 3).shape, precise) for x in (k_tile, v_tile)), carry)
            carry = jax.lax.fori_loop(
                0, full_count[column], lambda i, c: visit(full_index[column, i], c, masked=False), carry
            )
            carry = jax.lax.fori_loop(
                0, partial_count[column], lambda i, c: visit(partial_index[column, i], c, masked=True), carry
            )
            d_key, d_value, carry = carry
            return carry, (d_key, d_value)

        carry = (jnp.zeros(query.shape, precise), *carry)
        (d_query, *carry), (d_key, d_value) = jax.lax.scan(column_pass, carry, jnp.arange(layout.kv_blocks))
        return tuple(carry), (d_query, _stack_columns(d_key), _stack_columns(d_value))

    xs = (jnp.arange(layout.chunks), queries, keys, values, d_outputs, turned, rows)
    (d_bias, d_captured), (d_query, d_key, d_value) = jax.lax.scan(chunk_pass, (d_bias, d_captured), xs)
    d_query, d_key, d_value = layout.join_queries(d_query), layout.join_keys(d_key), layout.join_keys(d_value)

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


def _stack_columns(x: jax.Array) -> jax.Array:
    """[kv_blocks, b, h, d, block_kv] -> [b, h, kv_blocks * block_kv, d]."""
    x = x.transpose(1, 2, 0, 4, 3)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
