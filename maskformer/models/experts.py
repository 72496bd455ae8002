"""A mixture of experts in the place of a feed-forward layer: a router picks a few of many for every token.

The router's probabilities, choices and statistics are plain array code over the whole batch, which the compiler splits
like any other; what the experts compute, and where, is in `expert_dispatch`.

Sources: Shazeer et al. 2017 (top-k routing), Fedus et al. 2022 (Switch; balance), Zoph et al. 2022 (ST-MoE; z-loss),
Gale et al. 2023 (MegaBlocks; no token dropped), Jiang et al. 2024 (Mixtral), Dai et al. 2024 (shared experts).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maskformer.models import expert_dispatch
from maskformer.models.encoder_config import EncoderConfig
from maskformer.models.layers import FeedForward, initial_weights


class Routing(NamedTuple):
    """What the routers did with the tokens that are not padding: float32 sums, which add up over the parts of a batch.

    Attributes:
      assigned: [layers, experts], how many tokens chose each expert.
      probability: [layers, experts], the sum of the tokens' probabilities of each; over all experts that is the number
        of tokens.
      z: [layers], the sum of the squared logarithms of the router's partition function.
      dropped: [layers], choices that found no place.
    """

    assigned: jax.Array
    probability: jax.Array
    z: jax.Array
    dropped: jax.Array


def balance_sum(routing: Routing, assigned: jax.Array) -> jax.Array:
    """The load-balancing loss, summed over tokens and layers; divided by both it is 1 where all experts get the same.

    For each layer `experts * sum_i f_i P_i` (Fedus et al. 2022, equations 4 to 6), with `f_i` the share of the choices
    that fell on expert i and `P_i` its mean probability. A choice has no gradient, so that given the shares it is a sum
    over tokens: parts of a batch add up to the whole if all take the `f` of the whole batch.

    Args:
      routing: of the tokens of a part of the batch, or of all of it.
      assigned: [layers, experts] of all of it.
    """
    share = assigned / jnp.maximum(jnp.sum(assigned, axis=-1, keepdims=True), 1.0)
    return assigned.shape[-1] * jnp.sum(jax.lax.stop_gradient(share) * routing.probability)


def load(assigned: Any) -> Any:
    """Tokens of the fullest expert over the mean of all, mean over layers; `assigned` [layers, experts].

    1 is even; `experts / experts_per_token` is the worst, where the same few get every token. 0 without tokens.
    """
    mean = assigned.mean(-1)
    return (assigned.max(-1) / (mean + (mean == 0))).mean()


def choose_experts(logits: jax.Array, config: EncoderConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Experts of each token from the router's logits [..., experts].

    Returns:
      int32 [..., experts_per_token], most probable first and of equals the first; their weights, of the same shape; and
      the probabilities [..., experts].
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    top, chosen = jax.lax.top_k(logits, config.experts_per_token)
    if config.router_softmax == "chosen":
        return chosen, jax.nn.softmax(top, axis=-1), probabilities
    return chosen, jnp.take_along_axis(probabilities, chosen, axis=-1), probabilities


class ExpertProjection(nnx.Module):
    """A linear map of its own for each expert: kernel [experts, inputs, outputs]."""

    def __init__(self, inputs: tuple[str, int], outputs: tuple[str, int], config: EncoderConfig, *, rngs: nnx.Rngs):
        (from_axis, from_size), (to_axis, to_size), experts = inputs, outputs, config.experts
        kernel = initial_weights(rngs, (experts, from_size, to_size), config)
        self.kernel = nnx.Param(kernel, logical_axes=("experts", from_axis, to_axis))
        self.bias = None
        if config.use_bias:
            zeros = jnp.zeros((experts, to_size), config.dtype("param"))
            self.bias = nnx.data(nnx.Param(zeros, logical_axes=("experts", to_axis)))

    def weights(self, dtype: Any) -> dict[str, jax.Array]:
        bias = {} if self.bias is None else {"bias": self.bias[...].astype(dtype)}
        return {"kernel": self.kernel[...].astype(dtype), **bias}


class Experts(nnx.Module):
    """Experts, their router, and a feed-forward layer that all tokens share where the config asks for one.

    The router computes in float32 whatever the compute dtype. Padding is sent to no expert, takes no place, and counts
    in no statistic: only the shared layer sees it.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        embed, mlp = ("embed", config.width), ("mlp", config.resolved_expert_width)
        self.config = config
        kernel = initial_weights(rngs, (config.width, config.experts), config)
        self.router = nnx.Param(kernel, logical_axes=("embed", "router"))
        self.up = ExpertProjection(embed, mlp, config, rngs=rngs)
        self.gate = ExpertProjection(embed, mlp, config, rngs=rngs) if config.gated else None
        self.down = ExpertProjection(mlp, embed, config, rngs=rngs)
        width = config.shared_expert_width
        self.shared = FeedForward(config, width=width, rngs=rngs) if width else None
        self.shared_gate = None
        if config.shared_expert_gate:
            kernel = initial_weights(rngs, (config.width, 1), config)
            self.shared_gate = nnx.data(nnx.Param(kernel, logical_axes=("embed", "router")))

    def __call__(self, x: jax.Array, real: jax.Array | None) -> tuple[jax.Array, Routing]:
        """`x` [batch, length, width] and `real`, bool [batch, length], False at padding (None: no padding) -> the same
        shape, and what the router did, without the leading axis of layers."""
        config = self.config
        wide = jnp.promote_types(jnp.float32, x.dtype)
        logits = self._wide_product(x, self.router, wide)
        chosen, gates, probabilities = choose_experts(logits, config)
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        # No expert has this number.
        chosen = jnp.where(real[..., None], chosen, config.experts)
        assigned = _per_expert(chosen, config.experts)
        place, dropped = None, jnp.zeros((), jnp.float32)
        if config.expert_capacity is not None:
            capacity = places(config, x.shape[1])
            place = places_in_row(chosen, config.experts)
            fits = place < capacity
            dropped = jnp.sum(~fits & real[..., None], dtype=jnp.int32).astype(jnp.float32)
            place = jnp.where(fits & real[..., None], chosen * capacity + place, config.experts * capacity)
        counted = real.astype(wide)
        z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        routing = Routing(
            assigned=jnp.sum(assigned, axis=0).astype(jnp.float32),
            probability=jnp.sum(probabilities * counted[..., None], axis=(0, 1)).astype(jnp.float32),
            z=jnp.sum(z * counted).astype(jnp.float32),
            dropped=dropped,
        )
        y = self._compute(x, chosen, gates, place)
        if self.shared is not None:
            beside, _ = self.shared(x, real)
            if self.shared_gate is not None:
                beside = jax.nn.sigmoid(self._wide_product(x, self.shared_gate, wide)) * beside
            y = y + beside
        return y.astype(config.dtype("compute")), routing

    @staticmethod
    def _wide_product(x: jax.Array, kernel: nnx.Param, wide: Any) -> jax.Array:
        # An accelerator's default product of float32 is one of bfloat16, which turns near choices round.
        return jnp.matmul(x.astype(wide), kernel[...].astype(wide), precision=jax.lax.Precision.HIGHEST)

    def _compute(self, x: jax.Array, chosen: jax.Array, gates: jax.Array, place: jax.Array | None) -> jax.Array:
        """The weighted sum of the chosen experts, [batch, length, width], on one device or over the mesh."""
        config = self.config
        dtype = config.dtype("compute")
        named = {"up": self.up, "gate": self.gate, "down": self.down}
        weights = {name: module.weights(dtype) for name, module in named.items() if module is not None}
        x = x.astype(dtype)
        if place is None:
            return expert_dispatch.on_mesh(expert_dispatch.dropless, x, chosen, gates, weights, config.activation)
        run = functools.partial(expert_dispatch.with_places, capacity=places(config, x.shape[1]))
        return expert_dispatch.on_mesh(run, x, place, gates, weights, config.activation)


def places(config: EncoderConfig, length: int) -> int:
    """Places of an expert in a row of `length` tokens, at most as many as there are tokens.

    >>> places(EncoderConfig(vocab_size=9, experts=8, expert_capacity=1.25), 64)
    20
    """
    assert config.expert_capacity is not None
    # Without the rounding, 1.1 * 10 places would be 12.
    even = round(config.expert_capacity * config.experts_per_token * length / config.experts, 6)
    return min(length, math.ceil(even))


def places_in_row(chosen: jax.Array, experts: int) -> jax.Array:
    """How many earlier choices of its row fell on the same expert, for each choice: int32 like `chosen`.

    Tokens take their places in order, a token's own choices from the most probable on: whether one finds a place
    depends on no later token, so that a causal model stays causal, and on no other row, so that no mesh changes it.

    Args:
      chosen: int32 [batch, length, experts_per_token], `experts` for none.

    >>> places_in_row(jnp.array([[[0, 1], [0, 2], [1, 0]]]), 3).tolist()
    [[[0, 0], [1, 0], [1, 2]]]
    """
    rows = chosen.reshape(chosen.shape[0], -1)
    taken = jax.nn.one_hot(rows, experts, dtype=jnp.int32)
    before = jnp.cumsum(taken, axis=1) - taken
    return jnp.sum(before * taken, axis=-1).reshape(chosen.shape)


def _per_expert(chosen: jax.Array, experts: int) -> jax.Array:
    """int32 [batch, experts]: choices of each row that fell on each."""
    return jnp.sum(jax.nn.one_hot(chosen, experts, dtype=jnp.int32), axis=(1, 2))
