"""Names for array axes, and the hook that turns them into sharding constraints.

Parameters and activations name their axes ("embed", "heads", "batch", ...). What mesh axis a name maps to is
not the model's business: training owns one table of rules, and installs it around tracing with
`logical_rules`. Without it, `constrain` returns its argument untouched.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PARAMETER_AXES = (
    "vocab",  # rows of the token table, entries of the logits
    "embed",  # the residual width
    "embed_factor",  # the width of the embedding tables, where it is not the residual width
    "embed_out",  # the output side of the square dense layer in the prediction head
    "heads",  # query heads
    "kv_heads",  # key and value heads
    "head_dim",  # channels of one head
    "mlp",  # hidden width of the feed-forward layer
    "norm",  # scale and bias of a norm
    "positions",  # rows of the learned position table
    "token_types",  # rows of the token-type table
    "layers",  # the stacking axis of the scanned layers
    "experts",  # the experts of a mixture
    "label",  # the answers of a head that does not predict tokens
)
ACTIVATION_AXES = (
    "batch",
    "length",
    "activation_embed",
    "activation_heads",
    "activation_kv_heads",
    "activation_mlp",
    "activation_vocab",
)

Rules = Mapping[str, str | tuple[str, ...] | None]
_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("logical_rules", default=None)


def partition_spec(axes: tuple[str | None, ...], rules: Rules) -> PartitionSpec:
    """The `PartitionSpec` of an array whose axes have these logical names.

    Args:
        axes: one logical name per array axis; None for an axis that is never sharded.
        rules: logical name -> mesh axis, several mesh axes, or None.

    Raises:
        ValueError: a name that has no rule, or two axes of one array that map to the same mesh axis.

    >>> spec = partition_spec(("embed", "heads", "head_dim"), {"embed": "fsdp", "heads": "tensor", "head_dim": None})
    >>> tuple(spec)
    ('fsdp', 'tensor', None)
    """
    used: dict[str, str] = {}
    entries = []
    for name in axes:
        if name is not None and name not in rules:
            raise ValueError(f"logical axis {name!r}: no sharding rule; add {name!r} to the table of rules")
        target = None if name is None else rules[name]
        for mesh_axis in (target,) if isinstance(target, str) else target or ():
            if mesh_axis in used:
                raise ValueError(
                    f"logical axes {used[mesh_axis]!r} and {name!r} of one array both map to mesh axis "
                    f"{mesh_axis!r}; map one of them to None"
                )
            used[mesh_axis] = str(name)
        entries.append(target)
    return PartitionSpec(*entries)


@contextlib.contextmanager
def logical_rules(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """While a function is traced inside this context, activations are constrained by `rules` on `mesh`.

    Wrap the traced code, not the call of an already compiled function:

        def step(state, batch):
            with logical_rules(mesh, rules):
                logits = model.apply(...)
    """
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def active_rules() -> tuple[Mesh, Rules] | None:
    """The mesh and the rules in force; None outside of `logical_rules`."""
    return _active.get()


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain `array` to the sharding that the active rules give its axes; without rules, do nothing."""
    active = _active.get()
    if active is None:
        return array
    mesh, rules = active
    if len(axes) != array.ndim:
        raise ValueError(f"array of shape {array.shape}: expected {array.ndim} axis names, got {axes}")
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, partition_spec(axes, rules)))
