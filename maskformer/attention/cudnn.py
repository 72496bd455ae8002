"""cuDNN's fused attention through `jax.nn.dot_product_attention`, for the masks that it represents exactly.

Those are: no mask, ``causal``, ``causal & sliding_window(left)``, and either of the first two with key lengths. Any
other mask would become a dense bias there, which is refused here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maskformer import masks
from maskformer.attention import batching, intervals, platform
from maskformer.attention.arguments import Call, fill
from maskformer.checks import shown

HEAD_DIM_LIMIT = 128
KERNEL = "cudnn"


def refuses(call: Call) -> str | None:
    """Why cuDNN cannot honour this call, or None."""
    reason = intervals.tensor_cores(call, 8.0) or intervals.plain_options(call, soft_cap=False)
    if reason is not None:
        return reason
    if call.query.shape[3] != call.value.shape[3]:
        return f"the kernel wants one head_dim, and query has {call.query.shape[3]}, value {call.value.shape[3]}"
    if call.query.shape[3] % 8 or call.query.shape[3] > HEAD_DIM_LIMIT:
        return f"the kernel takes head_dim up to {HEAD_DIM_LIMIT} in steps of 8, not {call.query.shape[3]}"
    if call.bias is not None:
        if call.bias.shape[2:] != (call.q_len, call.kv_len):
            return f"the kernel wants a bias with both lengths in full, not of shape {call.bias.shape}"
        if call.q_len % 2 or call.kv_len % 2:
            return f"the kernel's bias wants even lengths, not {call.q_len} and {call.kv_len}"
    parsed = _parse(call)
    return parsed if isinstance(parsed, str) else None


def prefers(call: Call) -> str | None:
    """Why cuDNN is not worth taking by itself, or None."""
    return None if platform.current() == "gpu" else f"it is a GPU kernel and the platform is {platform.current()}"


def attend(call: Call) -> tuple[jax.Array, None]:
    """Output [batch, q_len, heads, value_dim]; no logsumexp."""
    parsed = _parse(call)
    assert not isinstance(parsed, str), parsed  # `refuses` came first
    options, lengths = parsed
    odd_q, odd_kv = call.q_len % 2, call.kv_len % 2
    if lengths is None and odd_kv and not options["is_causal"]:
        lengths = jnp.full((1,), call.kv_len)
    if lengths is not None:
        lengths = jnp.broadcast_to(intervals.by_entry(jnp.asarray(lengths, jnp.int32), 0), (call.batch,))
    # JAX trains the kernel at even lengths only. A last query is cut off; a last key is hidden by its length or place.
    query = fill(call.query, 1, call.q_len + odd_q)
    key, value = (fill(x, 1, call.kv_len + odd_kv) for x in (call.key, call.value))
    # An entry without keys is given one, and its output set to 0: nothing undefined reaches a gradient.
    given = dict(query=query, key=key, value=value)
    if lengths is not None:
        given["query_seq_lengths"] = jnp.full_like(lengths, query.shape[1])
        given["key_value_seq_lengths"] = jnp.clip(lengths, 1, call.kv_len)
    bias = call.bias
    if bias is not None and bias.shape[:2] == (call.batch, call.heads):
        given["bias"], bias = bias, None  # any other is the same for the whole batch, mapped or not
    # JAX's batching rule of the kernel reads one leading axis off the queries, and takes it that all other operands,
    # and the cotangent of the output, have it too.
    given = batching.alike(given)
    if bias is not None:
        given["bias"] = bias
    output = jax.nn.dot_product_attention(**given, **options, scale=float(call.scale), implementation=KERNEL)
    output = batching.cotangent_like(output, given["query"])[:, : call.q_len]
    return output if lengths is None else jnp.where(lengths[:, None, None, None] > 0, output, 0), None


def _parse(call: Call) -> tuple[dict, jax.Array | None] | str:
    """jax.nn's options and the key lengths, or the reason why there are none."""
    causal, window, lengths = False, None, None
    for term in intervals.terms(call.mask):
        if isinstance(term, masks.Causal):
            causal = True
        elif isinstance(term, masks.SlidingWindow) and window is None:
            window = term
        elif isinstance(term, masks.KeyPadding) and term.valid is None and lengths is None:
            lengths = term.lengths
        else:
            return f"the kernel has no form of {shown(term)}, and would take it as a dense bias"
    if window is not None and window.right != 0:
        if not causal:
            return f"the kernel has left windows only, and {window!r} looks right"
    causal = causal or window is not None
    if causal and call.q_len != call.kv_len:
        return f"its causal mask wants equal lengths, not {call.q_len} and {call.kv_len}"
    if causal and not (isinstance(call.q_offset, int) and call.q_offset == 0):
        return "its causal mask wants q_offset 0"
    if window is not None and lengths is not None:
        return "the kernel takes a window or key lengths, not both"
    if lengths is not None and call.mask is not None and call.mask.shape[1] > 1:
        return "its key lengths differ between heads"
    options = {"is_causal": causal}
    if window is not None:
        options["local_window_size"] = (window.left, 0)
    return options, lengths
