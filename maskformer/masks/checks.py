"""Checks of builder arguments: the errors name the builder, the argument, its value and what was expected."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def whole_number(builder: str, name: str, value: Any, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"{builder}: {name}={value!r}, expected an int of at least {minimum}")
    return int(value)


def whole_numbers(builder: str, name: str, value: Any, minimum: int) -> tuple[int, ...]:
    """``value`` as a tuple of ints, one per dimension."""
    if not isinstance(value, (tuple, list)) or not value:
        raise ValueError(f"{builder}: {name}={value!r}, expected one int per dimension, e.g. (16, 16)")
    return tuple(whole_number(builder, name, item, minimum) for item in value)


def array(builder: str, name: str, value: Any, rank: int, kind: str = "integer") -> Any:
    """``value`` as an array with ``rank`` dimensions, or up to two more in front for batch and heads."""
    if not isinstance(value, jax.Array):
        value = np.asarray(value)
        if value.dtype == np.int64 and value.size and np.abs(value).max() < 2**31:
            value = value.astype(np.int32)
    kinds = {"integer": (jnp.integer,), "bool": (jnp.bool_, jnp.integer)}[kind]
    if not any(jnp.issubdtype(value.dtype, allowed) for allowed in kinds):
        raise ValueError(f"{builder}: {name} has dtype {value.dtype}, expected {kind}")
    if not rank <= value.ndim <= rank + 2:
        raise ValueError(
            f"{builder}: {name} has shape {value.shape}, expected {rank} dimension{'s' * (rank != 1)}, "
            "with [batch] or [batch, heads] in front where it differs between them"
        )
    return value


def is_concrete(value: Any) -> bool:
    """Whether the values of an array can be looked at now."""
    return not isinstance(value, jax.core.Tracer)
