"""Arguments of builders, checked: the errors name the builder, the argument, its value and what was expected."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import shown

LARGEST = 2**31 - 1
"""Positions are int32, and so is what they are compared with."""

MOST_DIMENSIONS = 8
"""Of a grid of points."""


def whole_number(builder: str, name: str, value: Any, minimum: int, maximum: int | None = LARGEST) -> int:
    """``value`` as an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"{builder}: {name}={shown(value)}, expected an int of at least {minimum}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{builder}: {name}={shown(value)}, expected an int of at most {maximum}")
    return int(value)


def identifier(builder: str, name: str, value: Any, *arrays: Any) -> int:
    """``value`` as an int that can stand among the ids of all ``arrays``."""
    value = whole_number(builder, name, value, -LARGEST - 1)
    for each in arrays:
        info = jnp.iinfo(each.dtype)
        if not info.min <= value <= info.max:
            raise ValueError(f"{builder}: {name}={value}, but the ids are {each.dtype}, {info.min} to {info.max}")
    return value


def offset(builder: str, name: str, value: Any) -> Any:
    """``value`` as a difference of positions: an int, or an integer scalar array, which may be traced."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return whole_number(builder, name, value, -LARGEST)
    if not hasattr(value, "dtype") or np.shape(value) != () or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{builder}: {name}={shown(value)}, expected an int or an integer scalar array")
    if isinstance(value, np.ndarray):
        return np.asarray(whole_number(builder, name, value[()], -LARGEST), np.int32)
    return value


def whole_numbers(builder: str, name: str, value: Any, minimum: int) -> tuple[int, ...]:
    """``value`` as a tuple of ints, one per dimension."""
    if not isinstance(value, (tuple, list)) or not value:
        raise ValueError(f"{builder}: {name}={shown(value)}, expected one int per dimension, e.g. (16, 16)")
    if len(value) > MOST_DIMENSIONS:
        raise ValueError(f"{builder}: {name}={shown(value)}, expected at most {MOST_DIMENSIONS} dimensions")
    return tuple(whole_number(builder, name, item, minimum) for item in value)


def array(builder: str, name: str, value: Any, rank: int, kind: str = "integer") -> Any:
    """``value`` as an array with ``rank`` dimensions, or up to two more in front for batch and heads."""
    if not isinstance(value, jax.Array):
        value = as_array(builder, name, value)
        if value.dtype == np.int64 and value.size and -LARGEST <= value.min() <= value.max() <= LARGEST:
            value = value.astype(np.int32)
    kinds = {"integer": (jnp.integer,), "bool": (jnp.bool_, jnp.integer)}[kind]
    if not any(jnp.issubdtype(value.dtype, allowed) for allowed in kinds):
        expected = "bool or integer" if kind == "bool" else kind
        raise ValueError(f"{builder}: {name} has dtype {value.dtype}, expected {expected}")
    if isinstance(value, np.ndarray):
        value = canonical(builder, name, value)
    if not rank <= value.ndim <= rank + 2:
        raise ValueError(
            f"{builder}: {name} has shape {value.shape}, expected {rank} dimension{'s' * (rank != 1)}, "
            "with [batch] or [batch, heads] in front where it differs between them"
        )
    return value


def as_array(builder: str, name: str, value: Any) -> np.ndarray:
    """``value`` as a NumPy array."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        raise ValueError(f"{builder}: {name}={shown(value)}, expected an array") from None


def canonical(builder: str, name: str, value: np.ndarray) -> np.ndarray:
    """A NumPy array in the dtype that JAX gives it, which has 32 bits by default; refuses what does not fit.

    JAX would cut off the upper bits in silence, and then two ids may be one.
    """
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)
    if dtype != value.dtype and np.issubdtype(dtype, np.integer) and value.size:
        info = np.iinfo(dtype)
        least, most = int(value.min()), int(value.max())
        if least < info.min or most > info.max:
            raise ValueError(
                f"{builder}: {name} has values from {least} to {most}, which JAX cuts off to {dtype}; number them "
                "anew, e.g. by np.unique(values, return_inverse=True)[1], or set jax_enable_x64"
            )
    return value.astype(dtype, copy=False)


def is_concrete(value: Any) -> bool:
    """Whether the values of an array can be looked at now."""
    return not isinstance(value, jax.core.Tracer)
