"""What both passes of blockwise attention read: their operands, and a chunk of heads with its tiles."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maskformer import masks
from maskformer.attention import logits, platform
from maskformer.attention.arguments import Call, Inputs
from maskformer.attention.blockwise_layout import Layout, cut, plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """What has no gradient.

    Attributes:
      rest: of the call, its inputs taken out; with a mask, and int32 arrays for numbers.
      block_map: of the mask.
      kv_offset: int32 [], the position of the first key.
    """

    rest: Call
    block_map: masks.BlockMap
    kv_offset: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward pass needs: the inputs, the output (as precise as it may be) and one number per row."""

    inputs: Inputs
    fixed: Fixed
    output: jax.Array
    residual: jax.Array
    wanted: Any


def positions(stop: int) -> jax.Array:
    """0, 1, ... in the int32 of all positions, under jax_enable_x64 too."""
    return jnp.arange(stop, dtype=jnp.int32)


def full(inputs: Inputs, shape: tuple[int, ...], value: Any, dtype: Any) -> jax.Array:
    """A constant that varies over the same manual mesh axes as the inputs: a loop inside `jax.shard_map` keeps them."""
    return vary(jnp.full(shape, value, dtype), varying(inputs.query))


def varying(x: Any) -> frozenset[str]:
    """The manual mesh axes over which an array varies inside `jax.shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


def vary(x: Any, axes: frozenset[str]) -> Any:
    """``x`` as an array that varies over these too."""
    missing = axes - varying(x)
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product per (batch, head) of the chunk, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    accumulate = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulate)


class Chunk:
    """One chunk of heads: its mask and its visits, and the logits of any of them.

    A visit is ``q_size`` queries by ``kv_size`` keys: one tile, or one in each row and its whole band in each column
    (or the other way about). It is named by its first query and first key.
    """

    def __init__(self, layout: Layout, inputs: Inputs, fixed: Fixed, index: jax.Array):
        self.layout, self.inputs, self.fixed, self.rest = layout, inputs, fixed, fixed.rest
        self.q_size, self.kv_size = layout.visit
        self.batch_start, self.head_start = layout.origin(index)
        self.batches = self.batch_start + positions(layout.batch_chunk)
        self.heads = self.head_start + positions(layout.head_chunk * layout.groups)
        shape = fixed.block_map.shape
        self.entry = (self.batch_start if shape[0] > 1 else 0, self.head_start if shape[1] > 1 else 0)
        mask = self.rest.mask
        assert mask is not None
        self.mask = mask.select(*self.entry)

    def of_width(self, blocks: int) -> Chunk:
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
        rest = self.rest
        q = rest.q_offset + q_start + positions(self.q_size)
        k = self.fixed.kv_offset + kv_start + positions(self.kv_size)
        return rest.batch_start + self.batches, rest.head_start + self.heads, q, k

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
        return queries * self.inputs.scale.astype(queries.dtype) if scales_queries(self.inputs) else queries

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
        scores = dot(queries, keys, (3, 3))
        if not scales_queries(self.inputs):
            scores = scores * self.inputs.scale
        return scores.reshape(self.batches.size, self.heads.size, self.q_size, self.kv_size)

    def transform(self, scores, bias, captured, places) -> jax.Array:
        return logits.transform(
            scores,
            bias=bias,
            score_mod=self.rest.score_mod,
            captured=captured,
            soft_cap=self.rest.logits_soft_cap,
            places=places,
        )

    def visible(self, places, kv_start: jax.Array, then: Callable[[jax.Array], Any] = lambda attends: attends) -> Any:
        """``then`` of the mask of a visit, bool [q_size, kv_size]; keys past the end are not there."""
        _, _, q, k = places
        inside = kv_start + positions(self.kv_size) < self.layout.kv_len
        # XLA would merge the mask into every use of the logits and evaluate it anew for each head. It does not look
        # into a conditional, whose condition it cannot know.
        return jax.lax.cond(
            kv_start >= 0,
            lambda: then(self.mask(q[:, None], k[None, :]) & inside),
            lambda: then(full(self.inputs, (q.size, k.size), False, bool)),
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
        assert self.rest.seed is not None
        return logits.keep(self.rest.seed, self.rest.dropout_rate, places)


def working_dtype(inputs: Inputs) -> jnp.dtype:
    """The dtype of products. A CPU multiplies float32 as fast as half precision, and need not round the weights."""
    dtype = inputs.query.dtype
    return jnp.promote_types(dtype, jnp.float32) if platform.current() == "cpu" else dtype


def precise_dtype(inputs: Inputs) -> jnp.dtype:
    """The dtype of sums, of logsumexps and of gradients until they are done."""
    return jnp.promote_types(inputs.query.dtype, jnp.float32)


def scales_queries(inputs: Inputs) -> bool:
    """Whether the scale goes into the queries."""
    # Scaling the queries is cheaper than scaling the logits, but rounds them in half precision.
    return working_dtype(inputs).itemsize >= 4


def layout_of(inputs: Inputs, fixed: Fixed, *, transposed: bool) -> Layout:
    """How a pass over the rows of tiles cuts the call; over the columns, if transposed."""
    batch, q_len, heads, _ = inputs.query.shape
    kv_len, kv_heads = inputs.key.shape[1:3]
    return plan(batch, kv_heads, heads // kv_heads, (q_len, kv_len), fixed.block_map, transposed=transposed)


def padded(inputs: Inputs, layout: Layout) -> Inputs:
    """Lengths of whole tiles. Kept in their own layout and dtype: each visit copies its part anyway."""
    return dataclasses.replace(
        inputs,
        query=layout.pad_queries(inputs.query),
        key=layout.pad_keys(inputs.key),
        value=layout.pad_keys(inputs.value),
        bias=None if inputs.bias is None else layout.pad_bias(inputs.bias),
    )
