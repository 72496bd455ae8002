"""tokamax's Mosaic-GPU flash attention, for masks in which every query sees one run of keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maskformer.attention import intervals, platform
from maskformer.attention.arguments import Call, fill

KERNEL = "mosaic_gpu"

# Its kernels work on blocks of up to these sizes, attend to the keys with which they fill up a last one, and cannot
# lower row ranges of other lengths: we fill them up ourselves, and hide what we added.
BLOCK_Q, BLOCK_KV = 256, 128


def _library() -> Any | None:
    """tokamax's attention module with the ``Mask`` that carries row intervals, or None."""
    try:
        from tokamax._src.ops.attention import api, base
    except ImportError:
        return None
    if KERNEL not in getattr(api, "IMPLEMENTATIONS", {}) or not dataclasses.is_dataclass(getattr(base, "Mask", None)):
        return None
    return api.IMPLEMENTATIONS[KERNEL], base.Mask


def refuses(call: Call) -> str | None:
    """Why tokamax cannot honour this call, or None."""
    if _library() is None:
        return "tokamax is not installed with its Mosaic GPU kernels (pip install 'maskformer[gpu]')"
    reason = intervals.tensor_cores(call, 9.0) or intervals.plain_options(call, soft_cap=True)
    if reason is not None:
        return reason
    found = intervals.rows(call)
    return found if isinstance(found, str) else None


def prefers(call: Call) -> str | None:
    """Why tokamax is not worth taking by itself, or None."""
    return None if platform.current() == "gpu" else f"it is a GPU kernel and the platform is {platform.current()}"


def attend(call: Call) -> tuple[jax.Array, None]:
    """Output [batch, q_len, heads, value_dim]; no logsumexp."""
    kernel, mask_type = _library()
    rows = intervals.rows(call)
    assert isinstance(rows, intervals.Rows), rows  # `refuses` came first
    q_pad, kv_pad = -call.q_len % BLOCK_Q, -call.kv_len % BLOCK_KV
    starts, ends, empty = rows.starts, rows.ends, None
    if kv_pad and ends is None and not (rows.causal and call.q_len <= call.kv_len):
        ends = jnp.full((1, call.q_len), call.kv_len, jnp.int32)
    if starts is not None or ends is not None:
        first = jnp.zeros((1, call.q_len), jnp.int32) if starts is None else starts
        last = jnp.full((1, call.q_len), call.kv_len) if ends is None else ends
        if rows.causal:
            last = jnp.minimum(last, jnp.arange(call.q_len) + 1)
        empty = first >= last
        # A query without keys is given key 0 and its output set to 0: nothing undefined reaches a gradient.
        starts = None if starts is None else _range(jnp.where(empty, 0, first), q_pad)
        ends = None if ends is None else _range(jnp.where(empty, 1, ends), q_pad)
    bias = call.bias
    for axis, full, pad in ((2, call.q_len, q_pad), (3, call.kv_len, kv_pad)):
        if bias is not None and bias.shape[axis] == full:
            bias = fill(bias, axis, full + pad)
    output = kernel(
        *(fill(x, 1, x.shape[1] + pad) for x, pad in ((call.query, q_pad), (call.key, kv_pad), (call.value, kv_pad))),
        bias=bias,
        mask=mask_type(None, k_start=starts, k_end=ends, is_causal=rows.causal),
        logits_scale=float(call.scale),
        logits_soft_cap=call.logits_soft_cap,
    )[:, : call.q_len]
    return output if empty is None else jnp.where(empty[:, :, None, None], 0, output), None


def _range(bound: jax.Array, pad: int) -> jax.Array:
    """[batch | 1, q_len] -> [batch | 1, 1, q_len + pad]; queries that pad see what the last one sees."""
    return jnp.pad(bound, ((0, 0), (0, pad)), mode="edge")[:, None]
