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
from maskformer.models.experts import Experts, Routing
from maskformer.models.layers import FeedForward, Layer, LayerInputs, Norm, Projection, activate, initial_weights
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
    """Embeddings, layers whose parameters are stacked on a leading `layers` axis, and a head.

    Layers with experts are a stack of their own, `expert_layers`, wherever they stand among the others.
    """

    def __init__(self, config: EncoderConfig, head: type[PredictionHead | DetectionHead], *, rngs: nnx.Rngs):
        def stack(layers: int, feed_forward: Callable[..., Any]) -> Any:
            @nnx.split_rngs(splits=layers)
            @nnx.vmap
            def make(rngs: nnx.Rngs) -> Layer:
                return Layer(config, feed_forward, rngs=rngs)

            return nnx.data(make(rngs)) if layers else None

        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = stack(config.layers - config.expert_layers, FeedForward)
        self.expert_layers = stack(config.expert_layers, Experts)
        self.final_norm = Norm(config) if config.norm_position == "pre" else None
        self.head = head(config, rngs=rngs)

    def encode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        masks: Sequence[Mask | None],
        token_types: jax.Array | None,
        dropout_key: jax.Array | None,
        real: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """Hidden states after the last layer, [batch, length, width], and what the routers of its experts did (None
        without experts). `masks` repeat over the layers; `real` is False at padding, None where nothing is."""
        config = self.config
        if (over := pipeline.current()) is not None:
            over.cut(tokens.shape[0])  # what does not divide is said before its embeddings are to lie somewhere
        embedding_key, layer_keys = None, None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, 1 + config.layers * DROPOUTS_PER_LAYER)
            embedding_key, layer_keys = keys[0], keys[1:].reshape(config.layers, DROPOUTS_PER_LAYER)
        x = self.embeddings(tokens, positions, token_types, embedding_key)
        run = self._run_layers if pipeline.current() is None else self._run_stages
        x, routing = run(x, masks, positions, layer_keys, real if config.experts else None)
        return (x if self.final_norm is None else self.final_norm(x)), routing

    def logits(self, hidden: jax.Array) -> jax.Array:
        """What the head makes of hidden states."""
        return self.head(hidden, self.embeddings.tokens.whole_rows())

    def _layer_inputs(
        self,
        positions: jax.Array,
        score_mod: ScoreMod | Lifted | None,
        real: jax.Array | None,
        rows: jax.Array | None = None,
    ) -> LayerInputs:
        config, rotary = self.config, None
        if config.positions == "rotary":
            rotary = rotary_tables(positions, config.resolved_head_dim, config.rotary_base)
        return LayerInputs(rotary, score_mod, real, rows)

    def _score_mod(self, positions: jax.Array) -> ScoreMod | None:
        return alibi(positions, self.config.heads) if self.config.positions == "alibi" else None

    def _remat(self, layer: Callable[..., Any], policies: Mapping[str, Any] = _REMAT_POLICIES) -> Callable[..., Any]:
        """The layer, whose first argument is the name of its stack, with the config's choice of what the backward pass
        recomputes."""
        policy = policies.get(self.config.remat)
        if policy is None:
            return layer
        # Inside a scan nothing can be merged across the boundary, so the costly barrier is not needed.
        scanned = self.config.scan_layers or pipeline.current() is not None
        return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned, static_argnums=0)

    def _stacks(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Structure and parameters of each stack of layers that there is."""
        graphs, parameters = {}, {}
        for name, stack in (("layers", self.layers), ("expert_layers", self.expert_layers)):
            if stack is not None:
                graphs[name], state = nnx.split(stack)
                parameters[name] = nnx.as_pure(state)
        return graphs, parameters

    def _run_layers(
        self,
        x: jax.Array,
        masks: Sequence[Mask | None],
        positions: jax.Array,
        keys: jax.Array | None,
        real: jax.Array | None,
    ) -> tuple[jax.Array, Routing | None]:
        """All layers, in order."""
        graphs, parameters = self._stacks()
        inputs = self._layer_inputs(positions, self._score_mod(positions), real)

        def layer(
            name: str, x: jax.Array, parameters: Any, keys: jax.Array | None, mask: Mask | None
        ) -> tuple[jax.Array, Routing | None]:
            return nnx.merge(graphs[name], parameters)(x, mask, inputs, keys)

        return self._run_stack(self._remat(layer), x, (parameters, keys), masks, self.config.layers)

    def _run_stack(
        self,
        layer: Callable[..., tuple[jax.Array, Routing | None]],
        x: jax.Array,
        stacked: Any,
        masks: Sequence[Any],
        layers: int,
    ) -> tuple[jax.Array, Routing | None]:
        """`layers` layers: groups of one period of masks and experts, scanned or unrolled, then the layers left over.

        Args:
          layer: `(name, x, parameters, keys, mask) -> x, routing` runs one layer of the stack `name`.
          stacked: the parameters of each stack, and the keys of all layers.
        """
        config = self.config
        parameters, keys = stacked

        def run(x: jax.Array, stacked: Any, indices: range) -> tuple[jax.Array, list[Routing]]:
            """The layers `indices`, of parameters and keys that begin with the first layer of a group."""
            parameters, keys = stacked
            routings = []
            for index in indices:
                name, place = config.stack_of(index)
                here, here_keys = jax.tree.map(lambda leaf, i=place: leaf[i], parameters[name]), None
                if keys is not None:
                    here_keys = keys[index]
                x, routing = layer(name, x, here, here_keys, masks[index % len(masks)])
                routings += [] if routing is None else [routing]
            return x, routings

        period = config.period(len(masks))
        groups, routings = layers // period if config.scan_layers else 0, []
        if groups:
            with_experts = period // config.moe_period if config.experts else 0

            def grouped(tree: Any, each: int) -> Any:
                return jax.tree.map(lambda leaf: leaf[: groups * each].reshape(groups, each, *leaf.shape[1:]), tree)

            each = {"layers": period - with_experts, "expert_layers": with_experts}
            whole = {name: grouped(tree, each[name]) for name, tree in parameters.items()}, grouped(keys, period)
            x, scanned = jax.lax.scan(lambda x, stacked: run(x, stacked, range(period)), x, whole)
            # From one array for each layer of a group, which leads with the groups, to one that leads with the layers.
            flat = lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])
            routings = [jax.tree.map(flat, *scanned)] if scanned else []
        x, rest = run(x, stacked, range(groups * period, layers))
        routings += [jax.tree.map(lambda leaf: leaf[None], routing) for routing in rest]
        return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routings) if routings else None

    def _run_stages(
        self,
        x: jax.Array,
        masks: Sequence[Mask | None],
        positions: jax.Array,
        keys: jax.Array | None,
        real: jax.Array | None,
    ) -> tuple[jax.Array, Routing | None]:
        """All layers, in stages that microbatches pass through; same values, and the same dropout, as in order."""
        config, over = self.config, pipeline.current()
        assert over is not None
        over.check_layers(config.layers)
        over.check_pattern(config.layers, len(masks), f"model.mask: a pattern of {len(masks)} masks")
        if config.experts:
            over.check_pattern(config.layers, config.moe_period, f"model.moe_period={config.moe_period}:")
        graphs, parameters = self._stacks()
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
            None if real is None else cut(real, True),
        )

        def layer(
            name: str, x: jax.Array, parameters: Any, keys: Any, mask: stages.Rows, shared: Any, place: stages.Place
        ) -> tuple[jax.Array, Routing | None]:
            parameters, keys = stages.of_round((parameters, keys), place)
            positions, score_mod, _, real = shared
            here = None if real is None else real.at(place.microbatch)
            inputs = self._layer_inputs(positions.at(place.microbatch), score_mod, here, place.rows)
            with stages.attending(place):
                return nnx.merge(graphs[name], parameters)(x, mask.at(place.microbatch), inputs, keys)

        layer = self._remat(layer, _STAGE_REMAT_POLICIES)

        depth = config.layers // (over.stages * over.rounds)

        def block(
            layers: Any, keys: Any, x: jax.Array, shared: Any, place: stages.Place
        ) -> tuple[jax.Array, Routing | None]:
            def placed(name: str, x: jax.Array, parameters: Any, keys: Any, mask: stages.Rows) -> Any:
                return layer(name, x, parameters, keys, mask, shared, place)

            return self._run_stack(placed, x, (layers, keys), shared[2], depth)

        return stages.run(over, block, parameters, keys, x, shared)
