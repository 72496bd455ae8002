"""Functions of one logit and its place: ``score_mod(score, batch, head, q_position, kv_position) -> score``.

The signature is FlexAttention's. A score_mod is written for scalars and mapped over the tile that a backend holds,
so indexing a captured table costs a gather per tile and nothing of size T^2. Arrays that it captures are found by
tracing and passed to the backend as arguments: they may be traced, batched by ``vmap`` and differentiated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

ScoreMod = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Lifted:
    """A score_mod whose captured arrays are arguments: ``apply(captured, scores, batch, head, q, k)``."""

    apply: Callable[..., jax.Array]
    captured: tuple[jax.Array, ...]


def lift(score_mod: ScoreMod, dtype: Any = jnp.float32) -> Lifted:
    """Traces ``score_mod`` on scalars and turns whatever arrays it captures into explicit arguments.

    Args:
      dtype: of the scores.

    Raises:
      TypeError: if it does not return one scalar.
    """
    scalar = jax.ShapeDtypeStruct((), dtype)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    # A fresh function each time: make_jaxpr caches by identity and would keep the captured tracers alive.
    closed = jax.make_jaxpr(lambda *arguments: score_mod(*arguments))(scalar, index, index, index, index)
    if len(closed.out_avals) != 1 or closed.out_avals[0].shape != ():
        shapes = [aval.shape for aval in closed.out_avals]
        raise TypeError(f"score_mod: expected one scalar score, got shapes {shapes}; it is written for one logit")
    if closed.out_avals[0].dtype == bool:
        raise TypeError("score_mod: expected a score, got a bool; who may attend goes to mask=masks.predicate(fn)")

    def one(captured, score, *places):
        # Under jax_enable_x64 a backend may count in int64.
        places = [jnp.asarray(place).astype(jnp.int32) for place in places]
        (result,) = jax.core.eval_jaxpr(closed.jaxpr, captured, score.astype(dtype), *places)
        return jnp.asarray(result).astype(score.dtype)

    over_kv = jax.vmap(one, (None, 0, None, None, None, 0))
    over_q = jax.vmap(over_kv, (None, 0, None, None, 0, None))
    over_heads = jax.vmap(over_q, (None, 0, None, 0, None, None))
    over_batch = jax.vmap(over_heads, (None, 0, 0, None, None, None))
    return Lifted(over_batch, tuple(closed.consts))


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slope per head (Press et al. 2022, arXiv:2108.12409), as its authors' ``get_slopes``.

    A head count that is not a power of two takes the slopes of the power below, then every other slope of the power
    above.

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> len(alibi_slopes(6))
    6
    """
    if heads < 1:
        raise ValueError(f"heads: expected at least 1, got {heads}")
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-8.0 * (i + 1) / (2 * power)) for i in range(0, 2 * (heads - power), 2)]


def alibi(slopes: jax.Array | Sequence[float]) -> ScoreMod:
    """Attention with linear biases: ``score - slope[head] * |q - k|``.

    Under a causal mask this is Press et al.'s ``slope * (k - q)``; without one it is the symmetric form that encoders
    use.

    Args:
      slopes: [heads], from `alibi_slopes` or learned.

    >>> mod = alibi(alibi_slopes(4))
    >>> float(mod(jnp.float32(1.0), 0, 0, 6, 2))
    0.0
    """
    slopes = jnp.asarray(slopes, jnp.float32)

    def score_mod(score, batch, head, q, k):
        return score - slopes[head] * jnp.abs(q - k).astype(score.dtype)

    return score_mod


def relative_position_bucket(
    relative: jax.Array, *, bidirectional: bool = True, buckets: int = 32, max_distance: int = 128
) -> jax.Array:
    """T5's bucket of ``k - q`` (Raffel et al. 2020; mesh_tensorflow ``_relative_position_bucket``).

    Half of the buckets hold one offset each, the rest are spaced logarithmically up to ``max_distance``; when
    bidirectional, one half of all buckets is for keys after the query.

    >>> relative_position_bucket(jnp.array([-200, -9, -1, 0, 1, 9])).tolist()
    [15, 8, 1, 0, 17, 24]
    """
    offset = jnp.zeros_like(relative)
    distance = -relative
    if bidirectional:
        buckets //= 2
        offset = jnp.where(relative > 0, buckets, 0)
        distance = jnp.abs(relative)
    else:
        distance = jnp.maximum(distance, 0)
    exact = buckets // 2
    # Below `exact` the logarithm is unused; the floor keeps it finite.
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    spaced = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(spaced, buckets - 1))


def t5_bias(table: jax.Array, *, bidirectional: bool = True, max_distance: int = 128) -> ScoreMod:
    """T5's learned relative bias: ``score + table[bucket(k - q), head]``.

    Args:
      table: [buckets, heads], as T5 stores it.
      bidirectional: False for a decoder.
      max_distance: the distance from which all offsets share the last bucket.
    """

    def score_mod(score, batch, head, q, k):
        bucket = relative_position_bucket(
            k - q, bidirectional=bidirectional, buckets=table.shape[0], max_distance=max_distance
        )
        return score + table[bucket, head]

    return score_mod


def relative_bias(table: jax.Array) -> ScoreMod:
    """A learned bias per clipped offset (Shaw et al. 2018 in its scalar form): ``score + table[head, k - q + reach]``.

    Args:
      table: [heads, 2 * reach + 1]; offsets beyond ``reach`` use the end entries.
    """
    if table.ndim != 2 or table.shape[1] % 2 == 0:
        raise ValueError(f"table: expected shape [heads, 2 * reach + 1], got {table.shape}")
    reach = table.shape[1] // 2

    def score_mod(score, batch, head, q, k):
        return score + table[head, jnp.clip(k - q, -reach, reach) + reach]

    return score_mod


def chain(*score_mods: ScoreMod) -> ScoreMod:
    """Applies several score_mods, the first one first.

    >>> mod = chain(alibi([0.5]), lambda score, b, h, q, k: score * 2)
    >>> float(mod(jnp.float32(1.0), 0, 0, 4, 4))
    2.0
    """

    def score_mod(score, batch, head, q, k):
        for step in score_mods:
            score = step(score, batch, head, q, k)
        return score

    return score_mod
