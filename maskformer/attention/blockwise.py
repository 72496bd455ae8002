"""Block-sparse attention in plain JAX: work and memory follow the tiles that the mask leaves, in both passes.

The forward pass is FlashAttention's online softmax (Dao et al. 2022, arXiv:2205.14135) over the tiles that the
BlockMap lists: full tiles skip the mask, partial ones evaluate it, the others are never touched. A narrow band of
tiles is computed whole instead, masked. The backward pass recomputes the logits of the same tiles once and
accumulates dQ in place, so it does five products per tile where separate dQ and dK/dV passes do seven. Nothing of
size ``q_len * kv_len`` exists unless the caller's bias is that.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from maskformer import masks
from maskformer.attention import batching, blocks
from maskformer.attention.arguments import Call, Inputs
from maskformer.attention.blockwise_backward import backward
from maskformer.attention.blockwise_chunk import Fixed, Residuals, vary, varying
from maskformer.attention.blockwise_forward import forward


def refuses(call: Call) -> str | None:
    """Only what a block map cannot describe."""
    return blocks.refuses(call)


def prefers(call: Call) -> str | None:
    """None: it is worth taking wherever nothing better is."""
    return None


def attend(call: Call) -> tuple[jax.Array, jax.Array]:
    """Output [batch, q_len, heads, value_dim] and logsumexp, float32 [batch, q_len, heads]."""
    mask, block_map = blocks.block_map(call)
    return run(*operands(call, mask, block_map, kv_offset=0))


def operands(call: Call, mask: masks.Mask, block_map: masks.BlockMap, *, kv_offset: Any) -> tuple[Inputs, Fixed]:
    """What `run` takes: inputs that may have gradients, and the rest.

    Args:
      kv_offset: the position of the first key; an int, or traced (a device's shard).
    """
    inputs, rest = call.split()
    if block_map.shape[1] > 1 and call.groups > 1:
        # Heads with tile lists of their own share no tiles: each gets its key head.
        key, value = (jnp.repeat(x, call.groups, axis=2) for x in (call.key, call.value))
        inputs = dataclasses.replace(inputs, key=key, value=value)
    numbers = {name: jnp.asarray(getattr(rest, name), jnp.int32) for name in ("q_offset", "batch_start", "head_start")}
    fixed = Fixed(dataclasses.replace(rest, mask=mask, **numbers), block_map, jnp.asarray(kv_offset, jnp.int32))
    # Inside a caller's own `jax.shard_map` all vary over the same mesh axes. Out here, where JAX sums the gradients of
    # those that did not.
    axes = frozenset().union(*(varying(leaf) for leaf in jax.tree.leaves((inputs, fixed))))
    return jax.tree.map(lambda leaf: vary(leaf, axes), (inputs, fixed))


@jax.custom_vjp
def run(inputs: Inputs, fixed: Fixed):
    """Output [batch, q_len, heads, value_dim] and logsumexp [batch, q_len, heads]; differentiable in ``inputs``."""
    return _forward(inputs, fixed, inputs.query.dtype)


def _forward(inputs: Inputs, fixed: Fixed, dtype: Any):
    compute = functools.partial(forward, dtype=dtype)
    return batching.map_by_map(compute, lambda batched: batched[1].block_map)(inputs, fixed)


def _run_forward(inputs, fixed):
    # With symbolic zeros every leaf says whether anybody wants its gradient: a constant bias costs none.
    wanted = jax.tree.map(lambda leaf: leaf.perturbed, inputs)
    inputs, fixed = jax.tree.map(lambda leaf: leaf.value, (inputs, fixed))
    # A rounded output leaves an error in the sum of a row's gradients. In those of queries, keys and values it drowns
    # in their own rounding; these sum over rows, and have little else.
    summed = jax.tree.leaves((wanted.bias, wanted.captured, wanted.sink_logits, wanted.scale))
    dtype = inputs.query.dtype
    output, residual = _forward(inputs, fixed, jnp.promote_types(dtype, jnp.float32) if any(summed) else dtype)
    return (output.astype(dtype), residual), Residuals(inputs, fixed, output, residual, _Static.of(wanted))


def _run_backward(residuals, cotangents):
    d_output, d_residual = (
        None if isinstance(c, jax.custom_derivatives.SymbolicZero) else c for c in cotangents
    )
    if d_output is None:
        d_output = jnp.zeros_like(residuals.output)
    compute = functools.partial(backward, wanted=residuals.wanted.tree())
    compute = batching.map_by_map(compute, lambda batched: batched[0].fixed.block_map)
    return compute(residuals, d_output, d_residual), None


run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A pytree of Python values that rides along as structure."""

    leaves: tuple
    structure: Any

    @classmethod
    def of(cls, tree):
        leaves, structure = jax.tree.flatten(tree)
        return cls(tuple(leaves), structure)

    def tree(self):
        return jax.tree.unflatten(self.structure, self.leaves)
