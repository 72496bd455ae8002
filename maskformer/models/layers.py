"""The modules of an encoder layer: projections, norms, attention, feed-forward.

Flax NNX modules hold parameters and nothing else; dropout keys, masks and position tables are arguments, so a
module is a pure function of its inputs. Every parameter carries its logical axis names as metadata
(`logical_axes`), which `Model.logical_axes` collects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maskformer.attention import dot_product_attention
from maskformer.attention.dropout import dropout
from maskformer.attention.score_mods import Lifted, ScoreMod
from maskformer.masks import Mask
from maskformer.models.encoder_config import EncoderConfig
from maskformer.models.partitioning import constrain
from maskformer.models.positions import apply_rotary


class LayerInputs(NamedTuple):
    """What every layer reads besides the hidden state; the same for all layers."""

    rotary: tuple[jax.Array, jax.Array] | None
    score_mod: ScoreMod | Lifted | None
    # bool [batch, length], False at padding; None where nobody asks, or nothing is padding.
    real: jax.Array | None = None
    # int32 [batch], where the rows stand in the whole batch, of which dropout is a function; None for their own order.
    rows: jax.Array | None = None


def initial_weights(rngs: nnx.Rngs, shape: Sequence[int], config: EncoderConfig) -> jax.Array:
    """Truncated normal, cut at two standard deviations, as in BERT's reference implementation."""
    initializer = jax.nn.initializers.truncated_normal(config.initializer_range)
    return initializer(rngs.params(), tuple(shape), config.dtype("param"))


class Projection(nnx.Module):
    """A linear map from the `inputs` axes to the `outputs` axes, computed as one matrix product.

    Args:
        inputs, outputs: (logical name, size) of each axis, e.g. `[("embed", 256)]` to
            `[("heads", 4), ("head_dim", 64)]`.
    """

    def __init__(
        self,
        inputs: Sequence[tuple[str, int]],
        outputs: Sequence[tuple[str, int]],
        config: EncoderConfig,
        *,
        rngs: nnx.Rngs,
    ):
        names, sizes = zip(*inputs, *outputs, strict=True)
        self.input_shape = tuple(size for _, size in inputs)
        self.output_shape = tuple(size for _, size in outputs)
        self.dtype = config.dtype("compute")
        self.kernel = nnx.Param(initial_weights(rngs, sizes, config), logical_axes=names)
        self.bias = None
        if config.use_bias:
            zeros = jnp.zeros(self.output_shape, config.dtype("param"))
            self.bias = nnx.data(nnx.Param(zeros, logical_axes=names[len(inputs) :]))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [..., *inputs] -> [..., *outputs] in the compute dtype."""
        batch = x.shape[: x.ndim - len(self.input_shape)]
        kernel = self.kernel[...].astype(self.dtype).reshape(math.prod(self.input_shape), -1)
        y = x.astype(self.dtype).reshape(*batch, -1) @ kernel
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype).reshape(-1)
        return y.reshape(*batch, *self.output_shape)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last axis, statistics in float32."""

    def __init__(self, config: EncoderConfig, width: int | None = None):
        self.epsilon = config.norm_epsilon
        self.centred = config.norm == "layernorm"
        width, dtype = width or config.width, config.dtype("param")
        self.scale = nnx.Param(jnp.ones(width, dtype), logical_axes=("norm",))
        self.bias = None
        if self.centred and config.norm_bias:
            self.bias = nnx.data(nnx.Param(jnp.zeros(width, dtype), logical_axes=("norm",)))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.centred:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        y = wide * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...].astype(wide.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(wide.dtype)
        return y.astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """`x Phi(x)` by erf (Hendrycks & Gimpel 2016), as in BERT and PyTorch.

    `jax.nn.gelu` goes through erfc, which keeps relative accuracy far in the tail, where the value is nothing
    beside its neighbours, and costs three times as much on a CPU.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * np.asarray(math.sqrt(0.5), x.dtype)))


def activate(name: str, x: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    """The activation `name` of `x`; gated ones return `act(gate) * x` (Shazeer 2020)."""
    if name == "relu":
        return jax.nn.relu(x)
    if name == "silu":
        return jax.nn.silu(x)
    if name == "swiglu":
        return jax.nn.silu(gate) * x
    if name == "geglu":
        return gelu(gate) * x
    return gelu(x) if name == "gelu" else jax.nn.gelu(x, approximate=True)


class SelfAttention(nnx.Module):
    """Multi-head (or grouped-query) self-attention with its four projections."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        embed = [("embed", config.width)]
        heads = [("heads", config.heads), ("head_dim", config.resolved_head_dim)]
        kv_heads = [("kv_heads", config.resolved_kv_heads), ("head_dim", config.resolved_head_dim)]
        self.config = config
        self.query = Projection(embed, heads, config, rngs=rngs)
        self.key = Projection(embed, kv_heads, config, rngs=rngs)
        self.value = Projection(embed, kv_heads, config, rngs=rngs)
        self.out = Projection(heads, embed, config, rngs=rngs)

    def __call__(
        self, x: jax.Array, mask: Mask | None, inputs: LayerInputs, dropout_key: jax.Array | None
    ) -> jax.Array:
        """`x` [batch, length, width] -> the same shape."""
        config = self.config
        query = constrain(self.query(x), "batch", "length", "activation_heads", None)
        key = constrain(self.key(x), "batch", "length", "activation_kv_heads", None)
        value = constrain(self.value(x), "batch", "length", "activation_kv_heads", None)
        if inputs.rotary is not None:
            query, key = apply_rotary(query, inputs.rotary), apply_rotary(key, inputs.rotary)
        attended = dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            score_mod=inputs.score_mod,
            logits_soft_cap=config.logits_soft_cap,
            dropout_rate=config.attention_dropout if dropout_key is not None else 0.0,
            dropout_key=dropout_key if config.attention_dropout else None,
            implementation=config.attention_implementation,
        )
        attended = checkpoint_name(attended, "attended")
        return self.out(constrain(attended, "batch", "length", "activation_heads", None))


class FeedForward(nnx.Module):
    """Two projections around an activation; a gated activation has a third, `gate`.

    What stands in its place (`experts.Experts`) takes the same arguments and has something to say of its routing.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, width: int | None = None):
        embed, mlp = [("embed", config.width)], [("mlp", width or config.resolved_mlp_width)]
        self.activation = config.activation
        self.up = Projection(embed, mlp, config, rngs=rngs)
        self.gate = Projection(embed, mlp, config, rngs=rngs) if config.gated else None
        self.down = Projection(mlp, embed, config, rngs=rngs)

    def __call__(self, x: jax.Array, real: jax.Array | None) -> tuple[jax.Array, None]:
        gate = None if self.gate is None else self.gate(x)
        hidden = activate(self.activation, self.up(x), gate)
        return self.down(constrain(hidden, "batch", "length", "activation_mlp")), None


class Layer(nnx.Module):
    """One encoder layer: attention and feed-forward, each with dropout, a residual and a norm.

    Args:
        feed_forward: makes the second of the two from `config` and `rngs`.
    """

    def __init__(self, config: EncoderConfig, feed_forward: Callable[..., Any] = FeedForward, *, rngs: nnx.Rngs):
        self.config = config
        self.attention = SelfAttention(config, rngs=rngs)
        self.attention_norm = Norm(config)
        self.mlp = feed_forward(config, rngs=rngs)
        self.mlp_norm = Norm(config)

    def __call__(
        self, x: jax.Array, mask: Mask | None, inputs: LayerInputs, dropout_keys: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """`x` [batch, length, width] -> the same shape, and what the feed-forward layer says of its routing (None of a
        dense one); `dropout_keys`: three keys, or None for no dropout."""
        probabilities, after_attention, after_mlp = (None,) * 3 if dropout_keys is None else dropout_keys
        rate = self.config.hidden_dropout
        pre = self.config.norm_position == "pre"
        branch = self.attention(self.attention_norm(x) if pre else x, mask, inputs, probabilities)
        x = constrain(x + dropout(after_attention, branch, rate, inputs.rows), "batch", "length", "activation_embed")
        x = x if pre else self.attention_norm(x)
        branch, routing = self.mlp(self.mlp_norm(x) if pre else x, inputs.real)
        x = constrain(x + dropout(after_mlp, branch, rate, inputs.rows), "batch", "length", "activation_embed")
        return (x if pre else self.mlp_norm(x)), routing
