"""Random numbers that depend on the example and on nothing else.

Every draw starts from `row_key(key, epoch, example_id)`. Row keys are Threefry whatever the caller's key is:
Threefry is a pure function of (key, counter), so a row draws the same numbers alone, in any batch, on any number
of devices. JAX's `rbg` generator gives up exactly that under `vmap`, and is therefore only used as a seed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def as_threefry(key: jax.Array) -> jax.Array:
    """A typed Threefry key from a typed key of any kind, or from raw uint32 key data."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if data.ndim != 1:
        raise ValueError(f"key: expected one key, got a batch of shape {data.shape[:-1]}; pass the run's single key")
    return jax.random.wrap_key_data(data[:2], impl="threefry2x32")


def row_keys(key: jax.Array, epoch: jax.Array, example_id: jax.Array, static_copies: int = 0) -> jax.Array:
    """Keys `[batch]`: `fold_in(fold_in(key, epoch), example_id)`.

    With `static_copies=k` the epoch counts modulo k, so every example has k maskings for good (BERT's ten
    duplicates); 0 draws anew every epoch (RoBERTa's dynamic masking).
    """
    if static_copies:
        epoch = epoch % static_copies
    root = as_threefry(key)
    return jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(root, e), i))(epoch, example_id)


def bits(key: jax.Array, stage: int, shape: tuple[int, ...] = ()) -> jax.Array:
    """uint32 of `shape`. Stages number the independent draws that one row makes."""
    return jax.random.bits(jax.random.fold_in(key, stage), shape, "uint32")


def uniform(key: jax.Array, stage: int, shape: tuple[int, ...] = ()) -> jax.Array:
    """float32 in [0, 1), 24 random bits."""
    return (bits(key, stage, shape) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def integers(key: jax.Array, stage: int, shape: tuple[int, ...], bound: jax.Array | int) -> jax.Array:
    """int32 in [0, bound); 0 where bound is 0. The modulo bias is below bound / 2**32."""
    bound = jnp.maximum(jnp.asarray(bound, jnp.uint32), 1)
    return (bits(key, stage, shape) % bound).astype(jnp.int32)


def below(random_bits: jax.Array, probability: jax.Array | float) -> jax.Array:
    """True with the given probability, from uint32 bits; exact at 0 and at 1.

    >>> below(jnp.array([0, 2**32 - 1], jnp.uint32), 1.0).tolist()
    [True, True]
    >>> below(jnp.array([0, 2**32 - 1], jnp.uint32), 0.0).tolist()
    [False, False]
    """
    return (random_bits >> 8).astype(jnp.float32) < jnp.asarray(probability, jnp.float32) * jnp.float32(2.0**24)


def sortable(random_bits: jax.Array) -> jax.Array:
    """uint32 -> positive float32 in the same order (30 bits kept).

    Top-k on floats is the fast path of every XLA backend. The bits are moved into the range of normal positive
    floats, whose order is that of their bit patterns, so nothing is rounded together as a conversion would.
    """
    return jax.lax.bitcast_convert_type((random_bits >> 2) + jnp.uint32(0x00800000), jnp.float32)
