"""Context parallelism: attention whose sequence lies along a mesh axis. Runs inside `jax.shard_map`.

Every local part of the queries gets the block map of the mask at its offset (in a ring, at that of the keys too), so
what the mask excludes is skipped between devices as within one. For an even load under causal masks the sequence is
dealt out in ``2 n`` parts, device ``d`` taking parts ``d`` and ``2 n - 1 - d`` (zigzag, as in Brandon et al. 2023,
arXiv:2311.09431, and Llama 3); the exchange is two permutations of half shards, so callers keep their natural order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maskformer import masks
from maskformer.attention import blocks, blockwise
from maskformer.attention.arguments import Call, Inputs
from maskformer.attention.blockwise_backward import backward
from maskformer.attention.blockwise_chunk import Residuals
from maskformer.attention.blockwise_forward import forward


@dataclasses.dataclass(frozen=True)
class Dealing:
    """Which parts of the sequence this device computes.

    Attributes:
      axis: mesh axis of the sequence.
      devices: its size.
      parts: parts per device; 2 when balanced.
    """

    axis: str
    devices: int
    parts: int

    def starts(self, device: Any, part_len: int) -> list[Any]:
        """Position of the first element of each part of a device."""
        if self.parts == 1:
            return [device * part_len]
        return [device * part_len, (2 * self.devices - 1 - device) * part_len]

    def deal(self, x: jax.Array, axis: int) -> list[jax.Array]:
        """A local shard in natural order -> the parts of this device."""
        if self.parts == 1:
            return [x]
        even, odd = jnp.split(x, 2, axis=axis)
        even = jax.lax.ppermute(even, self.axis, self._routes(0))
        odd = jax.lax.ppermute(odd, self.axis, self._routes(1))
        swap = jax.lax.axis_index(self.axis) % 2 == 1
        return [jnp.where(swap, odd, even), jnp.where(swap, even, odd)]

    def collect(self, parts: list[jax.Array], axis: int) -> jax.Array:
        """The inverse of `deal`."""
        if self.parts == 1:
            return parts[0]
        early, late = parts
        swap = jax.lax.axis_index(self.axis) % 2 == 1
        even, odd = jnp.where(swap, late, early), jnp.where(swap, early, late)
        back = [[(to, source) for source, to in self._routes(slot)] for slot in (0, 1)]
        even, odd = (jax.lax.ppermute(x, self.axis, route) for x, route in zip((even, odd), back))
        return jnp.concatenate([even, odd], axis=axis)

    def turn(self, tree: Any) -> Any:
        """Everything one device onward."""
        route = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, route), tree)

    def _routes(self, slot: int) -> list[tuple[int, int]]:
        """Part ``2 i + slot`` lies on device i; early parts go to the device of their number, late ones count back."""
        parts = [2 * i + slot for i in range(self.devices)]
        return [(i, part if part < self.devices else 2 * self.devices - 1 - part) for i, part in enumerate(parts)]


def all_gather(
    call: Call, axis: str, devices: int, *, balanced: bool, local: Callable[[Call], Any]
) -> tuple[jax.Array, jax.Array]:
    """One device's output and logsumexp for its shard of the queries, in natural order: every device has all keys.

    Args:
      call: this device's shard: queries, keys and values are ``1 / devices`` of the sequence, a bias has all of its
        key axis, mask arrays are whole.
      axis, devices: the mesh axis of the sequence and its size.
      balanced: zigzag dealing, where the shards are even.
      local: computes a call on one device: some of the queries, from a traced ``q_offset`` on, against all keys.
    """
    dealing, parts = _deal(call, axis, devices, balanced)
    key, value = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (call.key, call.value))
    results = [local(dataclasses.replace(part, key=key, value=value)) for part in parts]
    return _collect(dealing, results)


def ring(call: Call, axis: str, devices: int, *, balanced: bool) -> tuple[jax.Array, jax.Array]:
    """As `all_gather`, but keys and values travel from device to device: memory falls with the axis. By blockwise."""
    dealing, parts = _deal(call, axis, devices, balanced)
    return _collect(dealing, _ring(parts, dealing))


def _deal(call: Call, axis: str, devices: int, balanced: bool) -> tuple[Dealing, list[Call]]:
    """The parts of the queries that this device computes, each with the keys that it holds."""
    halves = balanced and call.q_len % 2 == 0 and call.kv_len % 2 == 0
    dealing = Dealing(axis, devices, 2 if halves else 1)
    queries = dealing.deal(call.query, 1)
    starts = dealing.starts(jax.lax.axis_index(axis), queries[0].shape[1])
    biases = [call.bias] * len(queries)
    if call.bias is not None and call.bias.shape[2] > 1:
        biases = dealing.deal(call.bias, 2)
    return dealing, [
        dataclasses.replace(call, query=query, bias=bias, q_offset=call.q_offset + start)
        for query, bias, start in zip(queries, biases, starts)
    ]


def _collect(dealing: Dealing, results: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    outputs, residuals = zip(*results)
    return dealing.collect(list(outputs), 1), dealing.collect(list(residuals), 1)


def _operands(call: Call, kv_offset: Any):
    """Blockwise operands of a query part against keys that start at ``kv_offset``."""
    mask = masks.everything() if call.mask is None else call.mask
    block = blocks.choose(call)
    moved = masks.Shift.of(mask, call.q_offset, kv_offset)
    block_map = moved.block_map(call.q_len, call.kv_len, block)
    return blockwise.operands(call, mask, block_map, kv_offset=kv_offset)


def _ring(parts: list[Call], dealing: Dealing):
    keys, values = (dealing.deal(x, 1) for x in (parts[0].key, parts[0].value))
    # Sinks belong to the whole row: they join its logsumexp once, after the ring.
    sink_logits = parts[0].sink_logits
    split = [dataclasses.replace(part, sink_logits=None).split() for part in parts]
    # The keys of an input travel, and are put in their place where they arrive.
    inputs = [dataclasses.replace(own, key=None, value=None) for own, _ in split]
    results = _ring_attend(dealing, (inputs, list(zip(keys, values))), [rest for _, rest in split])
    return results if sink_logits is None else [add_sinks(*result, sink_logits) for result in results]


def add_sinks(output: jax.Array, residual: jax.Array, sink_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds learned sinks to the denominators of finished rows."""
    empty = residual == -jnp.inf
    known = jnp.where(empty, 0.0, residual)
    total = jnp.logaddexp(known, sink_logits.astype(residual.dtype))
    share = jnp.where(empty, 0.0, jnp.exp(known - total))
    return (output * share[..., None]).astype(output.dtype), jnp.where(empty, -jnp.inf, total)


def _meetings(dealing: Dealing, step, inputs: list[Inputs], pairs, rests: list[Call]):
    """For each key part that is here at a step, and each query part: operands of blockwise and where they meet."""
    source = (jax.lax.axis_index(dealing.axis) - step) % dealing.devices
    starts = dealing.starts(source, pairs[0][0].shape[1])
    for j, ((key, value), start) in enumerate(zip(pairs, starts)):
        for i, (own, rest) in enumerate(zip(inputs, rests)):
            bias = own.bias
            if bias is not None and bias.shape[3] > 1:
                bias = jax.lax.dynamic_slice_in_dim(bias, start, key.shape[1], axis=3)
            call = rest.join(dataclasses.replace(own, key=key, value=value, bias=bias))
            yield i, j, start, _operands(call, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attend(dealing: Dealing, traced, rests):
    return _ring_forward(dealing, traced, rests)[0]


def _ring_forward(dealing: Dealing, traced, rests):
    inputs, pairs = traced

    def step(carry, index):
        pairs, rows = carry
        rows = list(rows)
        for i, _, _, (operands, fixed) in _meetings(dealing, index, inputs, pairs, rests):
            rows[i] = _merge(*rows[i], *forward(operands, fixed, rows[i][0].dtype))
        return (dealing.turn(pairs), rows), None

    rows = []
    for own in inputs:
        batch, length, heads, _ = own.query.shape
        precise = jnp.promote_types(own.query.dtype, jnp.float32)
        shape = (batch, length, heads)
        rows.append((jnp.zeros((*shape, pairs[0][1].shape[-1]), precise), jnp.full(shape, -jnp.inf, precise)))
    (_, rows), _ = jax.lax.scan(step, (pairs, rows), jnp.arange(dealing.devices))
    results = [(output.astype(own.query.dtype), residual) for (output, residual), own in zip(rows, inputs)]
    return results, (traced, rests, rows)


def _merge(output, residual, more_output, more_residual):
    """Joins two normalised results over disjoint keys."""
    total = jnp.logaddexp(residual, more_residual)
    finite = jnp.where(total == -jnp.inf, 0.0, total)
    output = output * jnp.exp(residual - finite)[..., None] + more_output * jnp.exp(more_residual - finite)[..., None]
    return output, total


def _ring_backward(dealing: Dealing, saved, cotangents):
    (inputs, pairs), rests, rows = saved

    def zeros(tree):
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32) if _floats(x) else jnp.float32), tree
        )

    def step(carry, index):
        pairs, d_pairs, d_inputs = carry
        d_pairs, d_inputs = [list(pair) for pair in d_pairs], list(d_inputs)
        for i, j, start, (operands, fixed) in _meetings(dealing, index, inputs, pairs, rests):
            wanted = jax.tree.map(_floats, operands)
            gradients = backward(Residuals(operands, fixed, *rows[i], None), *cotangents[i], wanted)
            key, value = _back_to_key_heads(gradients, pairs[j][0].shape[2])
            d_pairs[j] = [old + new for old, new in zip(d_pairs[j], (key, value))]
            d_inputs[i] = _add(d_inputs[i], gradients, start)
        d_pairs = [tuple(pair) for pair in d_pairs]
        return (*dealing.turn((pairs, d_pairs)), d_inputs), None

    # After a whole turn the keys' gradients are back where the keys came from.
    carry = (pairs, zeros(pairs), zeros(inputs))
    (_, d_pairs, d_inputs), _ = jax.lax.scan(step, carry, jnp.arange(dealing.devices))
    cast = lambda gradient, x: gradient.astype(x.dtype) if _floats(x) else None
    return jax.tree.map(cast, (d_inputs, d_pairs), (inputs, pairs)), None


def _add(sums: Inputs, gradients: Inputs, start: Any) -> Inputs:
    """The sums of a query part and what one part of the keys, from ``start`` on, adds to them."""
    captured = tuple(old if new is None else old + new for old, new in zip(sums.captured, gradients.captured))
    bias = sums.bias
    if bias is not None and gradients.bias is not None:
        at = start if bias.shape[3] > 1 else 0
        old = jax.lax.dynamic_slice_in_dim(bias, at, gradients.bias.shape[3], axis=3)
        bias = jax.lax.dynamic_update_slice_in_dim(bias, old + gradients.bias, at, axis=3)
    query, scale = sums.query + gradients.query, sums.scale + gradients.scale
    return dataclasses.replace(sums, query=query, bias=bias, captured=captured, scale=scale)


def _floats(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _back_to_key_heads(gradients: Inputs, kv_heads: int):
    """Sums over the query heads for which blockwise repeated a key head."""

    def fold(x):
        repeats = x.shape[2] // kv_heads
        return x if repeats == 1 else x.reshape(*x.shape[:2], kv_heads, repeats, x.shape[3]).sum(3)

    return fold(gradients.key), fold(gradients.value)


_ring_attend.defvjp(_ring_forward, _ring_backward)
