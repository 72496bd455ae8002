"""From tokens to their experts and back, on one device or over a mesh.

Under rules (`partitioning.logical_rules`) this runs under `jax.shard_map`: each device holds the experts of its place
along the mesh axis of "experts", its part of each expert's hidden channels along that of "mlp", and its own rows of
tokens, which are exchanged along the first of these axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from maskformer.models.grouped import grouped_product
from maskformer.models.layers import activate
from maskformer.models.partitioning import Rules, active_rules

Weights = Mapping[str, Mapping[str, jax.Array]]  # up, gate (of gated activations), down -> kernel, bias


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Devices along a mesh axis that hold different experts. Runs inside `jax.shard_map`."""

    axis: str
    devices: int

    def gather(self, x: jax.Array) -> jax.Array:
        """The rows of all of them, in their order."""
        return jax.lax.all_gather(x, self.axis, axis=0, tiled=True)

    def scatter(self, x: jax.Array) -> jax.Array:
        """The sum over all of them of each one's rows: to `gather` what a sum is to a copy."""
        return jax.lax.psum_scatter(x, self.axis, scatter_dimension=0, tiled=True)

    def to_experts(self, x: jax.Array) -> jax.Array:
        """[batch, all experts, ...] of this device's rows -> [batch of all devices, this device's experts, ...]."""
        return jax.lax.all_to_all(x, self.axis, split_axis=1, concat_axis=0, tiled=True)

    def to_rows(self, x: jax.Array) -> jax.Array:
        """The inverse of `to_experts`."""
        return jax.lax.all_to_all(x, self.axis, split_axis=0, concat_axis=1, tiled=True)

    def first(self, experts: int) -> jax.Array:
        """The number of this device's first expert, where each has `experts`."""
        return jax.lax.axis_index(self.axis) * experts


def dropless(
    x: jax.Array,
    chosen: jax.Array,
    gates: jax.Array,
    weights: Weights,
    activation: str,
    exchange: Exchange | None = None,
) -> jax.Array:
    """Every choice computed: rows sorted by expert, and one product of ragged groups (Gale et al. 2023).

    Args:
      x: [batch, length, width] in the compute dtype.
      chosen: int32 [batch, length, experts_per_token], the number of experts for none.
      gates: weights of the same shape.
      weights: of this device's experts.
      activation: see `layers.activate`.
      exchange: None where every device has all experts.

    Returns:
      [batch, length, width] in the dtype of the gates, 0 for tokens that chose none.
    """
    experts, width, most = weights["up"]["kernel"].shape[0], x.shape[-1], chosen.shape[-1]
    if exchange is not None:
        # A device may have to compute all tokens of all others. Shapes are known in advance, and an exchange that has
        # room for that moves no less than this, which gives every device along the axis the tokens of all.
        x, chosen, gates = (exchange.gather(array) for array in (x, chosen, gates))
        chosen = chosen - exchange.first(experts)
        chosen = jnp.where((chosen >= 0) & (chosen < experts), chosen, experts)
    tokens, flat = x.reshape(-1, width), chosen.reshape(-1)
    # Choices of other devices' experts come last, and of these experts a token has no more than there are.
    order = jnp.argsort(flat, stable=True)[: tokens.shape[0] * min(most, experts)]
    sizes = jnp.zeros(experts, jnp.int32).at[flat].add(1, mode="drop")
    expert = flat[order]
    here = (expert < experts)[:, None]
    rows = jnp.where(here, tokens[order // most], 0)

    def product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
        return grouped_product(rows, kernel, sizes)

    out = _feed_forward(weights, activation, rows, product, lambda bias: bias[jnp.minimum(expert, experts - 1)])
    # Nothing says what stands behind the last group.
    out = jnp.where(here, out, 0)
    place = jnp.zeros(flat.shape, jnp.int32).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    gates = jnp.where(flat < experts, gates.reshape(-1), 0)
    y = _weighted(gates.reshape(-1, most), out[place].reshape(-1, most, width)).reshape(x.shape)
    return y if exchange is None else exchange.scatter(y)


def with_places(
    x: jax.Array,
    place: jax.Array,
    gates: jax.Array,
    weights: Weights,
    activation: str,
    exchange: Exchange | None = None,
    *,
    capacity: int,
) -> jax.Array:
    """Every choice that has a place: each row brings `capacity` places for each expert (Lepikhin et al. 2021).

    Args:
      place: int32 [batch, length, experts_per_token], `expert * capacity` and the place there; beyond all for none.
      capacity: places of an expert in a row.

    The others, and what is returned, as of `dropless`; a choice without a place adds nothing.
    """
    (batch, length, width), most = x.shape, place.shape[-1]
    experts = weights["up"]["kernel"].shape[0] * (1 if exchange is None else exchange.devices)
    row, flat = jnp.arange(batch)[:, None], place.reshape(batch, -1)
    token = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[:, None], (length, most)).reshape(1, -1)
    # Every place has the token that stands on it, or none, which is read as zeros.
    source = jnp.full((batch, experts * capacity), length, jnp.int32).at[row, flat].set(token, mode="drop")
    taken = (source < length)[..., None]
    filled = jnp.where(taken, x[row, jnp.minimum(source, length - 1)], 0).reshape(batch, experts, capacity, width)
    if exchange is not None:
        filled = exchange.to_experts(filled)
    grouped = filled.swapaxes(0, 1)
    here, rows = grouped.shape[:2]

    def product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.einsum("eti,eio->eto", rows, kernel, preferred_element_type=kernel.dtype)

    out = _feed_forward(weights, activation, grouped.reshape(here, -1, width), product, lambda bias: bias[:, None])
    out = out.reshape(here, rows, capacity, width).swapaxes(0, 1)
    if exchange is not None:
        out = exchange.to_rows(out)
    out = out.reshape(batch, experts * capacity, width)
    placed = flat < experts * capacity
    chosen = out[row, jnp.where(placed, flat, 0)].reshape(batch * length, most, width)
    gates = jnp.where(placed.reshape(gates.shape), gates, 0)
    return _weighted(gates.reshape(-1, most), chosen).reshape(x.shape)


def on_mesh(
    run: Callable[..., jax.Array], x: jax.Array, chosen: jax.Array, gates: jax.Array, weights: Weights, activation: str
) -> jax.Array:
    """`run(x, chosen, gates, weights, activation, exchange)`: as it is, or over the mesh of the active rules."""
    active = active_rules()
    if active is None or active[0].size == 1:
        return run(x, chosen, gates, weights, activation)
    mesh, rules = active
    experts, mlp = _axis(mesh, rules, "experts"), _axis(mesh, rules, "mlp")
    exchange = None if experts is None else Exchange(experts, mesh.shape[experts])
    rows = PartitionSpec(rules["batch"], rules["length"], None)
    places = {
        "up": {"kernel": PartitionSpec(experts, None, mlp), "bias": PartitionSpec(experts, mlp)},
        "down": {"kernel": PartitionSpec(experts, mlp, None), "bias": PartitionSpec(experts, None)},
    }
    places["gate"] = places["up"]

    def local(x: jax.Array, chosen: jax.Array, gates: jax.Array, weights: Weights) -> jax.Array:
        if mlp is not None and "bias" in weights["down"]:
            # Each device adds up its own channels, and one of them the bias.
            first = jax.lax.axis_index(mlp) == 0
            down = {**weights["down"], "bias": jnp.where(first, weights["down"]["bias"], 0)}
            weights = {**weights, "down": down}
        y = run(x, chosen, gates, weights, activation, exchange)
        return y if mlp is None else jax.lax.psum(y, mlp)

    specs = {name: {part: places[name][part] for part in parts} for name, parts in weights.items()}
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        # Inside of a `jax.shard_map` over other axes, whose mesh the rules then have, those that are left.
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        in_specs=(rows, rows, rows, specs),
        out_specs=rows,
        check_vma=False,  # as attention inside of the same pipeline
    )
    return mapped(x, chosen, gates, weights)


def _axis(mesh: Any, rules: Rules, name: str) -> str | None:
    """The mesh axis that splits what is called `name`; None where nothing does."""
    axis = rules[name]
    assert axis is None or isinstance(axis, str)
    return axis if axis is not None and mesh.shape[axis] > 1 else None


def _feed_forward(
    weights: Weights,
    activation: str,
    rows: jax.Array,
    product: Callable[[jax.Array, jax.Array], jax.Array],
    of_row: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Each row through its expert: `product(rows, kernel)` by the expert's kernel, `of_row(bias)` the expert's bias."""

    def project(name: str, x: jax.Array) -> jax.Array:
        y = product(x, weights[name]["kernel"])
        # Named, so that rematerialisation keeps what it keeps of a dense layer.
        return checkpoint_name(y + of_row(weights[name]["bias"]) if "bias" in weights[name] else y, f"expert_{name}")

    gate = project("gate", rows) if "gate" in weights else None
    return project("down", activate(activation, project("up", rows), gate))


def _weighted(gates: jax.Array, out: jax.Array) -> jax.Array:
    """[tokens, choices] and [tokens, choices, width] -> [tokens, width], added up in the dtype of the gates."""
    return jnp.einsum("tk,tkd->td", gates, out.astype(gates.dtype), precision=jax.lax.Precision.HIGHEST)
