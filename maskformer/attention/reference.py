"""Dense attention in plain JAX: the oracle of the other backends, and the fastest one for short sequences.

It is differentiable any number of times, in both modes. Operands are transposed to heads-first once: XLA's CPU matmul
wants the batch dimensions leading, and one copy is cheaper than the strided products (at batch 32, 4 heads, 128
tokens, forward and backward run at the speed of the bare matmuls).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskformer.attention import logits, platform
from maskformer.attention.arguments import Call


def refuses(call: Call) -> str | None:
    """Nothing: the reference honours every option."""
    return None


# Logits per batch entry and head up to which one dense product beats a loop over tiles: measured on CPU; on GPU and TPU
# a loop of small kernels costs more, and the figure is an estimate.
SMALL = {"cpu": 128 * 128, "gpu": 1024 * 1024, "tpu": 1024 * 1024}


def prefers(call: Call) -> str | None:
    """Why the reference is not worth taking by itself, or None."""
    limit = SMALL.get(platform.current(), SMALL["gpu"])
    if call.q_len * call.kv_len <= limit:
        return None
    return f"it is dense, and {call.q_len} x {call.kv_len} logits are more than {limit}"


def attend(call: Call) -> tuple[jax.Array, jax.Array]:
    """Output [batch, q_len, heads, value_dim] and logsumexp, float32 [batch, q_len, heads]."""
    batch, q_len, heads, head_dim = call.query.shape
    kv_len, kv_heads, value_dim = call.kv_len, call.kv_heads, call.value.shape[3]
    precise = jnp.promote_types(call.query.dtype, jnp.float32)
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (call.query, call.key, call.value))
    # The query heads that share a key head are rows of one product: GQA repeats nothing.
    query = query.reshape(batch, kv_heads, call.groups * q_len, head_dim)
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=precise) * call.scale
    scores = scores.reshape(batch, heads, q_len, kv_len)
    places = (
        call.batch_start + jnp.arange(batch),
        call.head_start + jnp.arange(heads),
        call.q_offset + jnp.arange(q_len),
        jnp.arange(kv_len),
    )
    scores = logits.transform(
        scores,
        bias=call.bias,
        score_mod=call.score_mod,
        captured=call.score_mod.captured if call.score_mod else (),
        soft_cap=call.logits_soft_cap,
        places=places,
    )
    if call.mask is not None:
        attends = call.mask.dense(q_len, kv_len, q_offset=call.q_offset)
        if attends.ndim == 3:
            attends = attends[:, None]
        scores = jnp.where(attends, scores, -jnp.inf)

    # A row that attends to nothing has maximum -inf; 0 in its place makes every exponential 0 and every gradient 0.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf))
    if call.sink_logits is not None:
        sink = call.sink_logits.astype(precise)[:, None, None]
        top = jnp.where(top == -jnp.inf, top, jnp.maximum(top, jax.lax.stop_gradient(sink)))
    empty = top == -jnp.inf
    top = jnp.where(empty, 0.0, top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if call.sink_logits is not None:
        total = total + jnp.exp(jnp.where(empty, -jnp.inf, sink - top))
    total = jnp.where(empty, 1.0, total)
    residual = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
    weights = weights / total
    if call.seed is not None:
        kept = logits.keep(call.seed, call.dropout_rate, places)
        weights = jnp.where(kept, weights * (1.0 / (1.0 - call.dropout_rate)), 0.0)
    weights = weights.astype(value.dtype).reshape(batch, kv_heads, call.groups * q_len, kv_len)
    output = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=precise)
    output = output.reshape(batch, heads, q_len, value_dim).transpose(0, 2, 1, 3)
    return output.astype(call.query.dtype), residual.transpose(0, 2, 1)
