"""The one public attention function, and the function that says how it would run."""

from __future__ import annotations

from typing import Any

import jax

from maskformer import masks
from maskformer.attention import arguments, dispatch
from maskformer.attention.explanation import Explanation, explain_call
from maskformer.attention.score_mods import Lifted, ScoreMod


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: masks.Mask | None = None,
    bias: jax.Array | None = None,
    score_mod: ScoreMod | Lifted | None = None,
    sink_logits: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | int | None = None,
    q_offset: int | jax.Array = 0,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Attention under a mask: ``softmax(soft_cap(score_mod(Q K^T * scale + bias)), masked) V``.

    Softmax and accumulation are float32, or float64 for float64. A query that may attend to nothing gives exactly 0,
    logsumexp -inf and zero gradients. The result does not depend on the backend beyond rounding; what a backend
    cannot honour it refuses, with the reason (see `explain`).

    Args:
      query: [batch, q_len, heads, head_dim].
      key: [batch, kv_len, kv_heads, head_dim]; ``heads`` must be a multiple of ``kv_heads`` (grouped-query attention:
        query head ``h`` reads key head ``h // (heads // kv_heads)``).
      value: [batch, kv_len, kv_heads, value_dim].
      mask: who may attend to whom, from `maskformer.masks`; None lets every query attend to every key.
      bias: added to the scaled logits; broadcasts to [batch, heads, q_len, kv_len]. Differentiable.
      score_mod: ``(score, batch, head, q_position, kv_position) -> score``, written for scalars, applied after the
        bias (see `maskformer.attention.score_mods`). Arrays that it captures are differentiable.
      sink_logits: [heads] logits that join the softmax's denominator and no output (as in gpt-oss). Differentiable.
      scale: multiplies ``Q K^T``; ``1 / sqrt(head_dim)`` by default.
      logits_soft_cap: ``cap * tanh(logits / cap)``, after bias and score_mod and before the mask.
      dropout_rate: probability of dropping an attention probability, in [0, 1).
      dropout_key: one PRNG key; needed if ``dropout_rate > 0``. The same key drops the same (batch, head, query
        position, key position) on every backend, tiling and sharding.
      q_offset: position of the first query, for chunked prefill and decoding; keys start at position 0.
      implementation: a backend by name, or None to let `maskformer.attention.dispatch` choose.
      return_residual: also return the logsumexp, the logarithm of the softmax's denominator (sink_logits included).

    Returns:
      [batch, q_len, heads, value_dim] in query's dtype; with ``return_residual`` a pair of it and the logsumexp,
      [batch, q_len, heads] in the dtype of the softmax.

    Raises:
      ValueError: for shapes that do not fit, an option out of range, or a backend that cannot honour the call.

    >>> import jax.numpy as jnp
    >>> from maskformer import masks
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> dot_product_attention(x, x, x, mask=masks.causal()).shape
    (1, 4, 2, 8)
    """
    call = arguments.check(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        score_mod=score_mod,
        sink_logits=sink_logits,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        q_offset=q_offset,
        return_residual=return_residual,
    )
    output, residual = dispatch.run(call, implementation)
    return (output, residual) if return_residual else output


def explain(
    mask: masks.Mask | None,
    query: Any,
    key: Any,
    value: Any,
    *,
    implementation: str | None = None,
    **options: Any,
) -> Explanation:
    """How `dot_product_attention` would run this call: the backend and why, what was passed over, and the work.

    Args:
      mask, query, key, value: as for `dot_product_attention`; arrays, those of options and of the mask too, may be
        `jax.ShapeDtypeStruct`.
      implementation: as for `dot_product_attention`; a refusal is part of the explanation and does not raise.
      **options: the other keyword arguments of `dot_product_attention`.

    Returns:
      An `Explanation`; print it.

    >>> import jax.numpy as jnp
    >>> from maskformer import masks
    >>> x = jnp.ones((1, 64, 2, 8))
    >>> print(explain(masks.causal(), x, x, x).backend)
    reference
    """
    return explain_call(mask, query, key, value, implementation, options)
