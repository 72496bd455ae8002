"""The arguments of one attention call, checked once and handed to every backend in the same form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer import masks
from maskformer.attention import dropout, score_mods
from maskformer.checks import shown
from maskformer.masks.arbitrary import open_closures
from maskformer.masks.builder_arguments import offset

DTYPES = tuple(map(jnp.dtype, (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What of a call may have a gradient, or that gradient. Shapes as in `Call`; ``scale`` is []."""

    query: Any
    key: Any
    value: Any
    bias: Any
    captured: tuple[Any, ...]
    sink_logits: Any
    scale: Any


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Call:
    """One checked attention call. Arrays have a batch axis; optional ones are None when absent.

    A pytree of its arrays. Numbers that are known when it is made are part of its structure, and so stay known under
    any transformation.
    """

    query: jax.Array  # [batch, q_len, heads, head_dim]
    key: jax.Array  # [batch, kv_len, kv_heads, head_dim]
    value: jax.Array  # [batch, kv_len, kv_heads, value_dim]
    mask: masks.Mask | None
    bias: jax.Array | None  # [batch|1, heads|1, q_len|1, kv_len|1]
    score_mod: score_mods.Lifted | None
    sink_logits: jax.Array | None  # [heads]
    seed: jax.Array | None  # uint32 [2]; None without dropout
    dropout_rate: float
    scale: float | jax.Array
    logits_soft_cap: float | None
    q_offset: int | jax.Array
    return_residual: bool = False
    # Where a shard's batch entries and heads lie in the whole call: score_mod and dropout go by the whole.
    batch_start: int | jax.Array = 0
    head_start: int | jax.Array = 0
    known: tuple[str, ...] = dataclasses.field(init=False, repr=False)  # which numbers are

    def __post_init__(self) -> None:
        known = tuple(name for name in NUMBERS if isinstance(getattr(self, name), (int, float)))
        object.__setattr__(self, "known", known)

    def tree_flatten(self) -> tuple[Any, Any]:
        fixed = (*OPTIONS, *self.known)
        arrays = tuple(getattr(self, name) for name in ARRAYS if name not in self.known)
        return arrays, (self.known, tuple(getattr(self, name) for name in fixed))

    @classmethod
    def tree_unflatten(cls, structure: Any, arrays: Any) -> Call:
        # What stands for an array here may be a number, or anything else.
        known, fixed = structure
        call = object.__new__(cls)
        names = (*OPTIONS, *known, *(name for name in ARRAYS if name not in known), "known")
        for name, value in zip(names, (*fixed, *arrays, known), strict=True):
            object.__setattr__(call, name, value)
        return call

    def split(self) -> tuple[Inputs, Call]:
        """What may have a gradient, and the rest: the call with None in its place."""
        score_mod = self.score_mod
        inputs = Inputs(
            query=self.query,
            key=self.key,
            value=self.value,
            bias=self.bias,
            captured=score_mod.captured if score_mod else (),
            sink_logits=self.sink_logits,
            scale=jnp.asarray(self.scale, jnp.promote_types(self.query.dtype, jnp.float32)),
        )
        nothing = Inputs(query=None, key=None, value=None, bias=None, captured=(), sink_logits=None, scale=None)
        return inputs, self.join(nothing)

    def join(self, inputs: Inputs) -> Call:
        """The call with other inputs: `split` the other way."""
        given = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
        captured = given.pop("captured")
        return dataclasses.replace(
            self, **given, score_mod=self.score_mod and dataclasses.replace(self.score_mod, captured=captured)
        )

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def q_len(self) -> int:
        return self.query.shape[1]

    @property
    def kv_len(self) -> int:
        return self.key.shape[1]

    @property
    def heads(self) -> int:
        return self.query.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[2]

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads


NUMBERS = ("scale", "q_offset", "batch_start", "head_start")
OPTIONS = ("dropout_rate", "logits_soft_cap", "return_residual")
ARRAYS = ("query", "key", "value", "mask", "bias", "score_mod", "sink_logits", "seed", *NUMBERS)


def check(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    score_mod=None,
    sink_logits=None,
    scale=None,
    logits_soft_cap=None,
    dropout_rate=0.0,
    dropout_key=None,
    q_offset=0,
    return_residual=False,
) -> Call:
    """Checks shapes and options; see `maskformer.attention.dot_product_attention` for what they mean.

    Raises:
      ValueError: naming the argument, its value and what was expected.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(f"{name}: expected [batch, length, heads, head_dim], got shape {array.shape}")
        if array.dtype not in DTYPES:
            raise ValueError(f"{name}: expected a floating dtype of {', '.join(map(str, DTYPES))}; got {array.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key, value: expected one dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    batch, q_len, heads, head_dim = query.shape
    if key.shape[0] != batch or value.shape[0] != batch:
        raise ValueError(f"batch: query has {batch}, key {key.shape[0]}, value {value.shape[0]}; they must agree")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"value: expected key's length and heads {key.shape[1:3]}, got {value.shape[1:3]}")
    if key.shape[3] != head_dim:
        raise ValueError(f"key: expected query's head_dim {head_dim}, got {key.shape[3]}")
    if head_dim == 0:
        raise ValueError("query: expected a head_dim of at least 1, got 0")
    kv_len, kv_heads = key.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"key: expected a head count that divides query's {heads}, got {kv_heads}")
    q_offset = offset("dot_product_attention", "q_offset", q_offset)
    # What NumPy holds is known now, and so is its block map.
    q_offset = jnp.asarray(q_offset, jnp.int32) if isinstance(q_offset, jax.Array) else int(q_offset)

    if bias is not None:
        bias = _logits("bias", bias)
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        full = (batch, heads, q_len, kv_len)
        if bias.ndim != 4 or any(size not in (1, want) for size, want in zip(bias.shape, full, strict=True)):
            raise ValueError(f"bias: expected a shape that broadcasts to [batch, heads, q_len, kv_len] = {full}, "
                             f"got {bias.shape}")
    if sink_logits is not None:
        sink_logits = _logits("sink_logits", sink_logits)
        if sink_logits.shape != (heads,):
            raise ValueError(
                f"sink_logits: expected one logit per query head, shape ({heads},), got {sink_logits.shape}"
            )
    if logits_soft_cap is not None:
        logits_soft_cap = _soft_cap(logits_soft_cap)
    dropout_rate = dropout.static_rate(dropout_rate)
    if dropout_rate > 0 and dropout_key is None:
        raise ValueError(f"dropout_rate is {dropout_rate} but dropout_key is None; pass a key, or rate 0 to evaluate")
    if score_mod is not None:
        score_mods.check_heads(score_mod, heads)
        score_mod = score_mods.lift(score_mod, jnp.promote_types(query.dtype, jnp.float32))
    return Call(
        query=query,
        key=key,
        value=value,
        mask=None if mask is None else _as_mask(mask, batch, heads),
        bias=bias,
        score_mod=score_mod,
        sink_logits=sink_logits,
        seed=dropout.seed_words(dropout_key) if dropout_rate > 0 else None,
        dropout_rate=dropout_rate,
        scale=1.0 / math.sqrt(head_dim) if scale is None else _scale(scale),
        logits_soft_cap=logits_soft_cap,
        q_offset=q_offset,
        return_residual=return_residual,
    )


def _logits(name: str, value) -> jax.Array:
    value = jnp.asarray(value)
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        hint = "; what may attend goes to mask=masks.dense(array)" if value.dtype == bool else ""
        raise ValueError(f"{name}: expected numbers to add to logits, got {value.dtype}{hint}")
    return value


def _soft_cap(value) -> float:
    try:
        cap = float(value)
    except (TypeError, ValueError):
        cap = math.nan
    if not 0 < cap < math.inf:
        raise ValueError(
            f"logits_soft_cap: expected a positive number known while tracing, or None, got {shown(value)}"
        ) from None
    return cap


def _scale(value) -> float | jax.Array:
    """A Python number where it is known, so that kernels with a static scale can have it."""
    if isinstance(value, (float, int, np.floating, np.integer)) and not isinstance(value, bool):
        return float(value)
    dtype = getattr(value, "dtype", None)
    real = dtype is not None and (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))
    if not real or value.shape != ():
        raise ValueError(
            f"scale: expected a number or a scalar array, got {shown(value)}; multiply the query by one per head"
        )
    return jnp.asarray(value)


def _as_mask(mask, batch: int, heads: int) -> masks.Mask:
    if isinstance(mask, (jax.Array, np.ndarray)):
        raise ValueError(f"mask: expected a maskformer Mask, got an array of shape {mask.shape}; "
                         "wrap it with masks.dense(array)")
    if not isinstance(mask, masks.Mask):
        raise ValueError(f"mask: expected a maskformer Mask, got {type(mask).__name__}; "
                         "strings go through masks.parse, functions through masks.predicate")
    for name, size, want in zip(("batch", "heads"), mask.shape, (batch, heads), strict=True):
        if size not in (1, want):
            raise ValueError(f"mask: its {name} dimension is {size}, but query has {want}")
    return open_closures(mask)


def fill(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros behind an axis up to ``size``, as kernels that work on whole blocks want it."""
    missing = size - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
