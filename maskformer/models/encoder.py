"""The encoder: embeddings, a stack of layers, and the prediction head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maskformer.attention.dropout import dropout
from maskformer.attention.score_mods import Lifted, ScoreMod, lift
from maskformer.masks import Mask
from maskformer.masks.arbitrary import open_closures
from maskformer.models import pipeline, stages
from maskformer.models.encoder_config import EncoderConfig
from maskformer.models.layers import Layer, LayerInputs, Norm, Projection, activate, initial_weights
from maskformer.models.partitioning import constrain
from maskformer.models.positions import alibi, rotary_tables

DROPOUTS_PER_LAYER = 3  # attention probabilities, after attention, after the feed-forward layer

# Outputs that the "elementwise" policy keeps: loops and kernels (of attention backends) and what a layer names.
_COSTLY = frozenset({"scan", "while", "cond", "pallas_call", "custom_call", "ffi_call", "shard_map", "name"})
_TAKEN = frozenset({"dynamic_slice", "squeeze", "reshape", "convert_element_type"})


def _keep_costly(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Keep products with weights, loops, kernels and named values; recompute norms, activations, dropout, softmax."""
    return primitive.name in _COSTLY or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *avals, **params
    )


def _keep_computed(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Keep everything but what a layer takes out of larger arrays, which are there again."""
    return primitive.name not in _TAKEN


_REMAT_POLICIES = {
    "elementwise": _keep_costly,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# A layer of a pipeline takes its weights and masks out of those of all rounds and microbatches, at every tick.
_STAGE_REMAT_POLICIES = {**_REMAT_POLICIES, "none": _keep_computed}


def embedding_axis(config: EncoderConfig) -> tuple[str, int]:
    """Logical name and size of the embedding vectors' axis."""
    width = config.resolved_embedding_width
    return ("embed" if width == config.width else "embed_factor"), width


class Table(nnx.Module):
    """A table of vectors looked up by index: [rows, embedding width]."""

    def __init__(self, rows: int, name: str, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.name, self.dtype = name, config.dtype("compute")
        axis, width = embedding_axis(config)
        self.embedding = nnx.Param(initial_weights(rngs, (rows, width), config), logical_axes=(name, axis))

    def whole_rows(self) -> jax.Array:
        """The table in the compute dtype with its rows gathered: lookups then stay with the device of their batch."""
        return constrain(self.embedding[...].astype(self.dtype), self.name, None)

    def __call__(self, index: jax.Array) -> jax.Array:
        # A gather, whose transpose is a scatter-add: on a CPU both cost well under a millisecond for 4,096
        # tokens, where the one-hot product that replaces them on some accelerators takes 135 ms.
        return self.whole_rows()[index]


class Embeddings(nnx.Module):
    """Token, position and token-type vectors, summed, normalised, dropped out, and projected where they are narrower
    (or wider) than the layers."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tokens = Table(config.padded_vocab_size, "vocab", config, rngs=rngs)
        learned = config.positions == "learned"
        types = config.token_types
        self.positions = Table(config.max_length, "positions", config, rngs=rngs) if learned else None
        self.token_types = Table(types, "token_types", config, rngs=rngs) if types else None
        axis, width = embedding_axis(config)
        self.norm = Norm(config, width) if config.embedding_norm else None
        sides = [(axis, width)], [("embed", config.width)]
        self.project = Projection(*sides, config, rngs=rngs) if width != config.width else None

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        token_types: jax.Array | None,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.token_types is not None:
            # As in BERT, a row that says nothing about its sentences is all sentence A.
            x = x + self.token_types(jnp.zeros_like(tokens) if token_types is None else token_types)
        if self.norm is not None:
            x = self.norm(x)
        x = dropout(dropout_key, x, self.config.hidden_dropout)
        if self.project is not None:
            x = self.project(x)
        return constrain(x, "batch", "length", "activation_embed")


class PredictionHead(nnx.Module):
    """Hidden states to logits over the vocabulary."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        rows = config.padded_vocab_size
        axis, width = embedding_axis(config) if config.head_transform else ("embed", config.width)
        sides = [("embed", config.width)], [("embed_out", width)]
        self.transform = Projection(*sides, config, rngs=rngs) if config.head_transform else None
        self.norm = Norm(config, width) if config.head_transform else None
        self.kernel, self.bias = None, None
        if not config.tied_embeddings:
            kernel = initial_weights(rngs, (rows, width), config)
            self.kernel = nnx.data(nnx.Param(kernel, logical_axes=("vocab", axis)))
        if config.head_bias:
            self.bias = nnx.data(nnx.Param(jnp.zeros(rows, config.dtype("param")), logical_axes=("vocab",)))

    @staticmethod
    def products(config: EncoderConfig) -> int:
        """Multiply-adds of the head at one position."""
        width = config.resolved_embedding_width if config.head_transform else config.width
        return width * config.padded_vocab_size + (config.width * width if config.head_transform else 0)

    def __call__(self, hidden: jax.Array, token_table: jax.Array) -> jax.Array:
        """`hidden` [batch, predicted, width] -> logits [batch, predicted, vocab_size] in the output dtype."""
        config = self.config
        compute, output = config.dtype("compute"), config.dtype("output")
        if self.transform is not None:
            hidden = self.norm(activate(_head_activation(config), self.transform(hidden)))
        kernel = token_table if self.kernel is None else self.kernel[...]
        logits = jax.lax.dot_general(
            hidden.astype(compute),
            kernel.astype(compute),
            (((hidden.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=output,
        )
        if self.bias is not None:
            logits = logits + self.bias[...].astype(output)
        logits = constrain(logits, "batch", None, "activation_vocab")
        # Entries that only pad the table to a multiple must not take part in a softmax.
        return logits[..., : config.vocab_size]


class DetectionHead(nnx.Module):
    """Hidden states to one logit for each position: was this token replaced? (Clark et al. 2020)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed = [("embed", config.width)]
        self.transform = Projection(embed, [("embed_out", config.width)], config, rngs=rngs)
        self.answer = Projection(embed, [("label", 1)], config, rngs=rngs)

    @staticmethod
    def products(config: EncoderConfig) -> int:
        """Multiply-adds of the head at one position."""
        return config.width**2 + config.width

    def __call__(self, hidden: jax.Array, token_table: jax.Array) -> jax.Array:
        """`hidden` [batch, length, width] -> logits [batch, length] in the output dtype; tokens are not looked up."""
        hidden = activate(_head_activation(self.config), self.transform(hidden))
        return self.answer(hidden)[..., 0].astype(self.config.dtype("output"))


def _head_activation(config: EncoderConfig) -> str:
    # A gated activation needs two inputs; the head uses its ungated function.
    return {"swiglu": "silu", "geglu": "gelu"}.get(config.activation, config.activation)


class Encoder(nnx.Module):
    """Embeddings, layers whose parameters are stacked on a leading `layers` axis, and a head."""

    def __init__(self, config: EncoderConfig, head: type[PredictionHead | DetectionHead], *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs=rngs)

        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = stack(rngs)
        self.final_norm = Norm(config) if config.norm_position == "pre" else None
        self.head = head(config, rngs=rngs)

    def encode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        masks: Sequence[Mask | None],
        token_types: jax.Array | None,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Hidden states after the last layer, [batch, length, width]. `masks` repeat over the layers."""
        config = self.config
        if (over := pipeline.current()) is not None:
            over.cut(tokens.shape[0])  # what does not divide is said before its embeddings are to lie somewhere
        embedding_key, layer_keys = None, None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, 1 + config.layers * DROPOUTS_PER_LAYER)
            embedding_key, layer_keys = keys[0], keys[1:].reshape(config.layers, DROPOUTS_PER_LAYER)
        x = self.embeddings(tokens, positions, token_types, embedding_key)
        run = self._run_layers if pipeline.current() is None else self._run_stages
        x = run(x, masks, positions, layer_keys)
        return x if self.final_norm is None else self.final_norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """What the head makes of hidden states."""
        return self.head(hidden, self.embeddings.tokens.whole_rows())

    def _layer_inputs(
        self, positions: jax.Array, score_mod: ScoreMod | Lifted | None, rows: jax.Array | None = None
    ) -> LayerInputs:
        config, rotary = self.config, None
        if config.positions == "rotary":
            rotary = rotary_tables(positions, config.resolved_head_dim, config.rotary_base)
        return LayerInputs(rotary, score_mod, rows)

    def _score_mod(self, positions: jax.Array) -> ScoreMod | None:
        return alibi(positions, self.config.heads) if self.config.positions == "alibi" else None

    def _remat(self, layer: Callable[..., Any], policies: Mapping[str, Any] = _REMAT_POLICIES) -> Callable[..., Any]:
        """The layer with the config's choice of what the backward pass recomputes."""
        policy = policies.get(self.config.remat)
        if policy is None:
            return layer
        # Inside a scan nothing can be merged across the boundary, so the costly barrier is not needed.
        scanned = self.config.scan_layers or pipeline.current() is not None
        return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)

    def _run_layers(
        self, x: jax.Array, masks: Sequence[Mask | None], positions: jax.Array, keys: jax.Array | None
    ) -> jax.Array:
        """All layers, in order."""
        graph, parameters = nnx.split(self.layers)
        inputs = self._layer_inputs(positions, self._score_mod(positions))

        def layer(x: jax.Array, parameters: Any, keys: jax.Array | None, mask: Mask | None) -> jax.Array:
            return nnx.merge(graph, parameters)(x, mask, inputs, keys)

        return self._run_stack(self._remat(layer), x, (nnx.as_pure(parameters), keys), masks)

    def _run_stack(
        self, layer: Callable[..., jax.Array], x: jax.Array, stacked: Any, masks: Sequence[Any]
    ) -> jax.Array:
        """The layers of `stacked`: groups of one mask pattern each, scanned or unrolled, then the layers left over."""

        def group(x: jax.Array, stacked: Any) -> tuple[jax.Array, None]:
            for index, mask in enumerate(masks):
                x = layer(x, *jax.tree.map(lambda leaf, i=index: leaf[i], stacked), mask)
            return x, None

        layers, period = jax.tree.leaves(stacked)[0].shape[0], len(masks)
        groups = layers // period
        if self.config.scan_layers:
            whole = jax.tree.map(lambda leaf: leaf[: groups * period].reshape(groups, period, *leaf.shape[1:]), stacked)
            x, _ = jax.lax.scan(group, x, whole)
            first = groups * period
        else:
            first = 0
        for index in range(first, layers):
            x = layer(x, *jax.tree.map(lambda leaf, i=index: leaf[i], stacked), masks[index % period])
        return x

    def _run_stages(
        self, x: jax.Array, masks: Sequence[Mask | None], positions: jax.Array, keys: jax.Array | None
    ) -> jax.Array:
        """All layers, in stages that microbatches pass through; same values, and the same dropout, as in order."""
        config, over = self.config, pipeline.current()
        assert over is not None
        over.check_layers(config.layers)
        over.check_pattern(config.layers, len(masks))
        graph, parameters = nnx.split(self.layers)
        microbatches = over.cut(x.shape[0])
        cut = functools.partial(stages.Rows.of, shards=over.shards, microbatches=microbatches)
        opened = [mask if mask is None else open_closures(mask) for mask in masks]
        leads = stages.lead_with_rows(opened, x.shape[0])
        # A score_mod counts the rows of the whole batch.
        score_mod = self._score_mod(positions)
        shared = (
            cut(positions, True),
            None if score_mod is None else lift(score_mod, jnp.promote_types(x.dtype, jnp.float32)),
            [cut(mask, lead) for mask, lead in zip(opened, leads, strict=True)],
        )

        def layer(
            x: jax.Array, parameters: Any, keys: Any, mask: stages.Rows, shared: Any, place: stages.Place
        ) -> jax.Array:
            parameters, keys = stages.of_round((parameters, keys), place)
            positions, score_mod, _ = shared
            inputs = self._layer_inputs(positions.at(place.microbatch), score_mod, place.rows)
            with stages.attending(place):
                return nnx.merge(graph, parameters)(x, mask.at(place.microbatch), inputs, keys)

        layer = self._remat(layer, _STAGE_REMAT_POLICIES)

        def block(layers: Any, keys: Any, x: jax.Array, shared: Any, place: stages.Place) -> tuple[jax.Array, None]:
            def placed(x: jax.Array, parameters: Any, keys: Any, mask: stages.Rows) -> jax.Array:
                return layer(x, parameters, keys, mask, shared, place)

            return self._run_stack(placed, x, (layers, keys), shared[2]), None

        return stages.run(over, block, nnx.as_pure(parameters), keys, x, shared)[0]
