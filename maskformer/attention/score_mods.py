"""Functions of one logit and its place: ``score_mod(score, batch, head, q_position, kv_position) -> score``.

The signature is FlexAttention's. A score_mod is written for scalars and mapped over the tile that a backend holds,
so indexing a captured table costs a gather per tile and nothing of size T^2. Arrays that it captures are found by
tracing and passed to the backend as arguments: they may be traced, batched by ``vmap`` and differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import integer, require, shown

ScoreMod = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["captured"], meta_fields=["apply"])
@dataclasses.dataclass(frozen=True)
class Lifted:
    """A score_mod whose captured arrays are arguments: ``apply(captured, scores, batch, head, q, k)``."""

    apply: Callable[..., jax.Array]
    captured: tuple[jax.Array, ...]


def lift(score_mod: ScoreMod | Lifted, dtype: Any = jnp.float32) -> Lifted:
    """Traces ``score_mod`` on scalars and turns whatever arrays it captures into explicit arguments.

    Args:
      score_mod: one that is lifted already stays as it is: inside of a `jax.shard_map` over some axes of a mesh, around
        which it was lifted, JAX cannot evaluate under attention's own what was traced in between.
      dtype: of the scores.

    Raises:
      ValueError: if it is no function of these, or does not return one scalar.
    """
    if isinstance(score_mod, Lifted):
        return score_mod
    _check_function(score_mod)
    scalar = jax.ShapeDtypeStruct((), dtype)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    # A fresh function each time: make_jaxpr caches by identity and would keep the captured tracers alive.
    try:
        closed = jax.make_jaxpr(lambda *arguments: score_mod(*arguments))(scalar, index, index, index, index)
    except jax.errors.TracerBoolConversionError as error:
        raise ValueError(
            "score_mod: `and`, `or`, `not` and `if` ask for one answer, and its arguments stand for all places at "
            "once; use &, |, ~ and jnp.where"
        ) from error
    if len(closed.out_avals) != 1 or closed.out_avals[0].shape != ():
        shapes = [aval.shape for aval in closed.out_avals]
        raise ValueError(f"score_mod: expected one scalar score, got shapes {shapes}; it is written for one logit")
    if closed.out_avals[0].dtype == bool:
        raise ValueError("score_mod: expected a score, got a bool; who may attend goes to mask=masks.predicate(fn)")

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


@dataclasses.dataclass(frozen=True)
class OfHeads:
    """A score_mod that reads a table with an entry for each head.

    Attributes:
      function: the score_mod.
      heads: how many heads the table has.
    """

    function: ScoreMod
    heads: int

    def __call__(self, score, batch, head, q, k):
        return self.function(score, batch, head, q, k)


def check_heads(score_mod: ScoreMod, heads: int) -> None:
    """Raises ValueError for a table of other heads than the call's: JAX would read its last entry in silence."""
    if isinstance(score_mod, OfHeads) and score_mod.heads != heads:
        raise ValueError(f"score_mod: its table has {score_mod.heads} heads, but query has {heads}")


def _check_function(score_mod: Any) -> None:
    expected = "a function of (score, batch, head, q_position, kv_position)"
    require(callable(score_mod), "score_mod", score_mod, expected)
    try:
        signature = inspect.signature(score_mod)
    except (TypeError, ValueError):  # of a function that is not Python's
        return
    try:
        signature.bind(*[None] * 5)
    except TypeError as error:
        raise ValueError(f"score_mod: expected {expected}, got one of {shown(str(signature))[1:-1]}: {error}") from None


def _table(name: str, value: Any, rank: int, expected: str) -> jax.Array:
    """``value`` as an array of numbers with ``rank`` dimensions, none of them empty."""
    try:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
        fits = array.ndim == rank and 0 not in array.shape and array.dtype != bool
        if fits and (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
            return jnp.asarray(array)
    except (TypeError, ValueError):
        pass
    shape = f" of shape {np.shape(value)}" if hasattr(value, "shape") else f"={shown(value)}"
    raise ValueError(f"{name}{shape}: expected {expected}")


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slope per head (Press et al. 2022, arXiv:2108.12409), as its authors' ``get_slopes``.

    A head count that is not a power of two takes the slopes of the power below, then every other slope of the power
    above.

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> len(alibi_slopes(6))
    6
    """
    heads = integer("alibi_slopes: heads", heads, 1)
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
    slopes = _table("alibi: slopes", slopes, 1, "one for each head, e.g. alibi_slopes(8)").astype(jnp.float32)

    def score_mod(score, batch, head, q, k):
        return score - slopes[head] * jnp.abs(q - k).astype(score.dtype)

    return OfHeads(score_mod, slopes.shape[0])


def relative_position_bucket(
    relative: jax.Array, *, bidirectional: bool = True, buckets: int = 32, max_distance: int = 128
) -> jax.Array:
    """T5's bucket of ``k - q`` (Raffel et al. 2020; mesh_tensorflow ``_relative_position_bucket``).

    Half of the buckets hold one offset each, the rest are spaced logarithmically up to ``max_distance``; when
    bidirectional, one half of all buckets is for keys after the query.

    >>> relative_position_bucket(jnp.array([-200, -9, -1, 0, 1, 9])).tolist()
    [15, 8, 1, 0, 17, 24]
    """
    _check_buckets("relative_position_bucket", bidirectional, buckets, max_distance)
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


def _check_buckets(name: str, bidirectional: Any, buckets: Any, max_distance: Any) -> None:
    require(isinstance(bidirectional, bool), f"{name}: bidirectional", bidirectional, "True or False")
    integer(f"{name}: buckets", buckets, 4 if bidirectional else 2)
    # Half of the buckets (of one direction) hold one offset each; the others reach further.
    integer(f"{name}: max_distance", max_distance, buckets // (4 if bidirectional else 2) + 1)


def t5_bias(table: jax.Array, *, bidirectional: bool = True, max_distance: int = 128) -> ScoreMod:
    """T5's learned relative bias: ``score + table[bucket(k - q), head]``.

    Args:
      table: [buckets, heads], as T5 stores it.
      bidirectional: False for a decoder.
      max_distance: the distance from which all offsets share the last bucket.
    """
    table = _table("t5_bias: table", table, 2, "shape [buckets, heads]")
    _check_buckets("t5_bias", bidirectional, table.shape[0], max_distance)

    def score_mod(score, batch, head, q, k):
        bucket = relative_position_bucket(
            k - q, bidirectional=bidirectional, buckets=table.shape[0], max_distance=max_distance
        )
        return score + table[bucket, head]

    return OfHeads(score_mod, table.shape[1])


def relative_bias(table: jax.Array) -> ScoreMod:
    """A learned bias per clipped offset (Shaw et al. 2018 in its scalar form): ``score + table[head, k - q + reach]``.

    Args:
      table: [heads, 2 * reach + 1]; offsets beyond ``reach`` use the end entries.
    """
    expected = "shape [heads, 2 * reach + 1]"
    table = _table("relative_bias: table", table, 2, expected)
    if table.shape[1] % 2 == 0:
        raise ValueError(f"relative_bias: table of shape {table.shape}: expected {expected}")
    reach = table.shape[1] // 2

    def score_mod(score, batch, head, q, k):
        return score + table[head, jnp.clip(k - q, -reach, reach) + reach]

    return OfHeads(score_mod, table.shape[0])


def chain(*score_mods: ScoreMod) -> ScoreMod:
    """Applies several score_mods, the first one first.

    >>> mod = chain(alibi([0.5]), lambda score, b, h, q, k: score * 2)
    >>> float(mod(jnp.float32(1.0), 0, 0, 4, 4))
    2.0
    """

    for step in score_mods:
        _check_function(step)
    heads = {step.heads for step in score_mods if isinstance(step, OfHeads)}
    require(len(heads) < 2, "chain: heads", tuple(sorted(heads)), "tables of the same number")

    def score_mod(score, batch, head, q, k):
        for step in score_mods:
            score = step(score, batch, head, q, k)
        return score

    return OfHeads(score_mod, heads.pop()) if heads else score_mod
