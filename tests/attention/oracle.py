"""Dense attention and its gradients in float64 NumPy, written from the definition and sharing no code with ours."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Result:
    """Output [b, q, h, d], logsumexp [b, q, h] and, for the cotangents given, the gradients.

    ``sink_size`` is the root of the sum of the squares of the terms that cancel in the gradient of the sink_logits.
    """

    output: np.ndarray
    residual: np.ndarray
    gradients: dict
    sink_size: float = 0.0


def attention(
    query,
    key,
    value,
    attends=None,
    *,
    scale=None,
    bias=None,
    sink_logits=None,
    soft_cap=None,
    keep=None,
    rate=0.0,
    d_output=None,
    d_residual=None,
):
    """``attends`` bool, ``bias`` float and ``keep`` bool broadcast to [b, h, q, k]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, q_len, heads, dim = query.shape
    kv_len, kv_heads = key.shape[1:3]
    groups = heads // kv_heads
    scale = dim**-0.5 if scale is None else scale
    wide_key, wide_value = np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)
    shape = (batch, heads, q_len, kv_len)
    attends = np.broadcast_to(True if attends is None else np.asarray(attends), shape)

    raw = np.einsum("bqhd,bkhd->bhqk", query, wide_key) * scale
    if bias is not None:
        raw = raw + np.asarray(bias, np.float64)
    logits = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    weights = np.where(attends, np.exp(logits), 0.0)
    total = weights.sum(-1)
    empty = ~attends.any(-1)
    if sink_logits is not None:
        total = total + np.exp(np.asarray(sink_logits, np.float64))[None, :, None]
    total = np.where(empty, 1.0, total)
    weights = weights / total[..., None]
    grown = np.ones(shape) if keep is None else np.broadcast_to(keep, shape) / (1.0 - rate)
    output = np.einsum("bhqk,bkhd->bqhd", weights * grown, wide_value)
    residual = np.where(empty, -np.inf, np.log(total)).transpose(0, 2, 1)
    result = Result(output, residual, {})
    if d_output is None:
        return result

    d_output = np.asarray(d_output, np.float64)
    d_weights = np.einsum("bqhd,bkhd->bhqk", d_output, wide_value) * grown
    inner = (weights * d_weights).sum(-1)
    if d_residual is not None:
        inner = inner - np.where(empty, 0.0, np.asarray(d_residual, np.float64).transpose(0, 2, 1))
    d_logits = weights * (d_weights - inner[..., None])
    d_raw = d_logits if soft_cap is None else d_logits * (1.0 - np.tanh(raw / soft_cap) ** 2)

    def to_key_heads(x):
        return x.reshape(batch, kv_len, kv_heads, groups, -1).sum(3)

    result.gradients = {
        "query": np.einsum("bhqk,bkhd->bqhd", d_raw, wide_key) * scale,
        "key": to_key_heads(np.einsum("bhqk,bqhd->bkhd", d_raw, query) * scale),
        "value": to_key_heads(np.einsum("bhqk,bqhd->bkhd", weights * grown, d_output)),
        "logits": d_raw,
    }
    if bias is not None:
        padded = (1,) * (4 - np.ndim(bias)) + np.shape(bias)
        axes = tuple(axis for axis, size in enumerate(padded) if size == 1)
        result.gradients["bias"] = d_raw.sum(axes, keepdims=True).reshape(np.shape(bias))
    if sink_logits is not None:
        share = np.exp(np.asarray(sink_logits, np.float64))[None, :, None] / total
        terms = np.where(empty, 0.0, share * inner)
        result.gradients["sink_logits"] = -terms.sum((0, 2))
        result.sink_size = float(np.sqrt(np.mean((terms**2).sum((0, 2)))))
    return result


def error(actual, golden):
    """Root mean square difference; infinities must agree exactly."""
    actual, golden = np.asarray(actual, np.float64), np.asarray(golden, np.float64)
    assert actual.shape == golden.shape
    infinite = np.isinf(golden)
    assert (actual[infinite] == golden[infinite]).all()
    assert np.isfinite(actual[~infinite]).all()
    return float(np.sqrt(np.mean((actual[~infinite] - golden[~infinite]) ** 2))) if (~infinite).any() else 0.0


def assert_as_good(actual, dense, golden, dtype=np.float32, what="", size=None):
    """The tolerance rule: error against float64 at most 10x (float32) or 1.1x (half) the dense reference's own.

    ``size`` is of what is rounded, where that is not the result: a sum whose terms cancel.
    """
    factor = 10.0 if np.dtype(dtype).itemsize >= 4 else 1.1
    # Where the dense reference happens to be exact, one rounding is what it could have had.
    finite = np.asarray(golden)[np.isfinite(golden)]
    if size is None:
        size = float(np.sqrt(np.mean(np.square(finite)))) if finite.size else 0.0
    floor = size * 2.0**-24 if factor == 10.0 else 0.0
    found, allowed = error(actual, golden), factor * max(error(dense, golden), floor)
    assert found <= allowed, f"{what}: error {found:.3g}, allowed {allowed:.3g}"
