"""Stateless dropout from a counter-based hash: no random bits are stored, none are generated twice.

A keep-mask is a pure function of ``(seed, row, column)``, so the backward pass recomputes it, a tiled kernel
computes only its own tile of it, and every sharding of the same array sees the same mask. It is a handful of
elementwise integer operations that XLA fuses into the consumer, where threefry costs more than the attention
it would drop from on a CPU.

It is a hash for regularisation, not for cryptography.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import shown

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: consecutive counters land far apart
# Multipliers of Chris Wellons' "lowbias32", found by search for the lowest avalanche bias.
_MULTIPLY_1 = 0x7FEB352D
_MULTIPLY_2 = 0x846CA68B


def _hash(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit flips every output bit with probability near 1/2."""
    x = (x ^ (x >> 16)) * jnp.uint32(_MULTIPLY_1)
    x = (x ^ (x >> 15)) * jnp.uint32(_MULTIPLY_2)
    return x ^ (x >> 16)


def seed_words(key: jax.Array | int) -> jax.Array:
    """Two uint32 words from a typed key, a raw ``uint32`` key of any implementation, or an integer.

    The integer ``n`` is the key ``jax.random.key(n)`` of JAX's default generator.

    Raises:
      ValueError: for a batch of keys; split them with ``jax.vmap``.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.ndim:
            raise ValueError(f"dropout key: expected one key, got a batch of shape {key.shape}; vmap over it")
        key = jax.random.key_data(key)
    if isinstance(key, (int, np.integer)):
        key = int(key)
        key = np.array([key >> 32 & 0xFFFFFFFF, key & 0xFFFFFFFF], np.uint32)
    words = jnp.asarray(key)
    if not jnp.issubdtype(words.dtype, jnp.integer):
        raise ValueError(f"dropout key: expected a PRNG key or an integer, got {words.dtype}")
    words = words.astype(jnp.uint32)
    if words.ndim == 0:
        words = jnp.stack([jnp.zeros_like(words), words])
    if words.ndim != 1:
        raise ValueError(f"dropout key: expected one key, got an array of shape {words.shape}; vmap over it")
    first, second = jnp.uint32(0), jnp.uint32(_GOLDEN)
    for i in range(words.shape[0]):
        # 0 is the hash's fixed point: without the addend, keys that begin with zeros would share the first word.
        first = _hash((first ^ words[i]) + jnp.uint32(_GOLDEN))
        second = _hash(second + words[i] + first)
    return jnp.stack([first, second])


def row_state(seed: jax.Array, *counters: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Folds integer counters (batch, head, query position ...) into two words per row.

    Args:
      seed: uint32 [2] from `seed_words`.
      *counters: integer arrays that broadcast against each other.

    Returns:
      Two uint32 arrays of the counters' broadcast shape.
    """
    first, second = seed[0], seed[1]
    for counter in counters:
        counter = jnp.asarray(counter).astype(jnp.uint32)
        first = _hash(first ^ counter)
        second = _hash(second + counter * jnp.uint32(_GOLDEN) + first)
    return first, second


def keep(state: tuple[jax.Array, jax.Array], column: jax.Array, rate: float) -> jax.Array:
    """Whether each element survives: True with probability ``1 - rate``.

    Args:
      state: from `row_state`.
      column: integer array that broadcasts against the rows.
      rate: probability of dropping, ``0 <= rate < 1``.

    Returns:
      bool array of the broadcast shape.
    """
    first, second = state
    x = (column.astype(jnp.uint32) * jnp.uint32(_GOLDEN)) ^ first
    x = (x ^ (x >> 16)) * jnp.uint32(_MULTIPLY_1)
    x = ((x ^ (x >> 15)) + second) * jnp.uint32(_MULTIPLY_2)
    # The comparison reads the high bits, which the last multiply has already mixed.
    return x >= jnp.uint32(threshold(rate))


def threshold(rate: float) -> int:
    """The uint32 below which a hash means "drop".

    Raises:
      ValueError: if ``rate`` is outside [0, 1).
    """
    return min(round(static_rate(rate) * 2**32), 2**32 - 1)


def static_rate(rate: float) -> float:
    """The rate as a Python number.

    Raises:
      ValueError: if it is traced, no number, or outside [0, 1).
    """
    try:
        number = float(rate)
    except (TypeError, ValueError):
        number = -1.0
    if not 0.0 <= number < 1.0:
        raise ValueError(f"dropout rate: expected 0 <= rate < 1, known while tracing; got {shown(rate)}") from None
    return number


def keep_mask(
    key: jax.Array | int, shape: Sequence[int], rate: float, rows: jax.Array | None = None
) -> jax.Array:
    """A keep-mask for an array: True (keep) with probability ``1 - rate``.

    Args:
      key: one PRNG key (typed or raw) or an integer.
      shape: shape of the mask; the last axis is the column, the others are folded into the row.
      rate: probability of dropping, in [0, 1).
      rows: int ``[shape[0]]``, where the entries of the first axis stand in the whole array; None for their own order.

    Returns:
      bool array of ``shape``; the same for any sharding, device count and backend.

    Raises:
      ValueError: if ``rate`` is outside [0, 1) or ``key`` is a batch of keys.

    >>> mask = keep_mask(jax.random.key(0), (64, 1000), rate=0.25)
    >>> bool(abs(mask.mean() - 0.75) < 0.01)
    True
    """
    shape = tuple(shape)
    if not shape:
        return keep_mask(key, (1,), rate)[0]
    places = (*shape[:-1], 1)
    counters = [jax.lax.broadcasted_iota(jnp.uint32, places, axis) for axis in range(len(shape) - 1)]
    if rows is not None:
        counters[0] = jnp.broadcast_to(rows.astype(jnp.uint32).reshape(-1, *(1,) * (len(shape) - 1)), places)
    # One linear row index costs one hash per row; only rows past 2^32 would repeat.
    row = jnp.zeros(places, jnp.uint32)
    for axis, counter in enumerate(counters):
        row = row + counter * jnp.uint32(int(np.prod(shape[axis + 1 : -1], dtype=np.int64)) % 2**32)
    column = jax.lax.broadcasted_iota(jnp.uint32, (*(1,) * (len(shape) - 1), shape[-1]), len(shape) - 1)
    return keep(row_state(seed_words(key), row), column, rate)


def dropout(key: jax.Array | int | None, x: jax.Array, rate: float, rows: jax.Array | None = None) -> jax.Array:
    """Inverted dropout: zeroes elements with probability ``rate``, divides the others by ``1 - rate``.

    Args:
      key: one PRNG key, or None for the identity (evaluation).
      x: array of any shape.
      rate: probability of dropping, in [0, 1).
      rows: of a part of an array, as in `keep_mask`.

    Returns:
      Array like ``x``.

    >>> dropout(None, jnp.ones(3), 0.5)
    Array([1., 1., 1.], dtype=float32)
    """
    threshold(rate)
    if key is None or rate == 0.0:
        return x
    return jnp.where(keep_mask(key, x.shape, rate, rows), x * (1.0 / (1.0 - rate)), jnp.zeros((), x.dtype))
