"""A model as pure functions of a parameter tree."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from maskformer import masks
from maskformer.models.encoder import DetectionHead, Encoder, PredictionHead
from maskformer.models.encoder_config import EncoderConfig
from maskformer.models.experts import Routing

Params = dict[str, Any]


# A config is checked by making its model, which is then made again: tracing it once is enough.
@functools.lru_cache(maxsize=32)
def _structure(config: EncoderConfig, head: Any) -> tuple[Any, Any]:
    """(structure, abstract state) of the module tree; neither is ever changed."""
    return nnx.split(nnx.eval_shape(lambda: Encoder(config, head, rngs=nnx.Rngs(params=0))))


class Model:
    """An encoder with one head, whose parameters live outside it.

    Made by `models.create`, with the head that predicts tokens; `DetectionHead` gives one logit for each position.
    The NNX module tree is split once; what is kept is its structure, and every method is a pure function of
    `params`, safe under `jit`, `grad`, `vmap` and `shard_map`.

    Attributes:
        config: the `EncoderConfig`.
    """

    def __init__(self, config: EncoderConfig, head: type[PredictionHead | DetectionHead] = PredictionHead):
        self.config = config
        self._head = head
        self._graph, self._state = _structure(config, cast(Any, head))
        self._masks = tuple(masks.parse(text) for text in config.mask_pattern)

    def init(self, key: jax.Array) -> Params:
        """New parameters: a nested dict of arrays in the parameter dtype.

        Under `jit` with `out_shardings` every array is made directly where it will live.
        """
        return _plain(nnx.as_pure(nnx.state(Encoder(self.config, self._head, rngs=nnx.Rngs(params=key)))))

    def param_shapes(self) -> Params:
        """The tree of `init`, with `jax.ShapeDtypeStruct` leaves; computes nothing."""
        return _plain(nnx.as_pure(self._state))

    def logical_axes(self) -> Params:
        """The tree of `init`, with a tuple of axis names in the place of each array.

        Names are those of `partitioning.PARAMETER_AXES`. Parameters of the layers lead with "layers".
        """

        def names(path: tuple[Any, ...], variable: nnx.Variable) -> tuple[str, ...]:
            stacked = ("layers",) if path[0].key in ("layers", "expert_layers") else ()
            return stacked + tuple(variable.get_metadata("logical_axes"))

        return _plain(
            jax.tree_util.tree_map_with_path(names, self._state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        )

    def num_params(self) -> int:
        """Number of parameters, tied ones counted once and vocabulary padding included."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.param_shapes()))

    def encode(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: masks.Mask | None = None,
        segment_ids: jax.Array | None = None,
        token_types: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the last layer (and its norm), [batch, length, width] in the compute dtype.

        Args:
            params: from `init`.
            tokens: int [batch, length].
            positions: int [batch, length]; None counts from 0 along the row. Packed rows restart at every
                segment.
            mask: who may attend to whom (True = attend), and-ed with the config's mask of each layer; None
                leaves the config's alone.
            segment_ids: int [batch, length], 0 for padding: what `segments` and `key_padding` mean in the
                config's mask, and which tokens experts leave alone. Only needed where that mask names them; without
                them experts take every token for one of the text.
            token_types: int [batch, length] in `[0, config.token_types)`; None means all 0.
            dropout_key: a PRNG key turns dropout on; None is deterministic.

        Raises:
            ValueError: for wrong shapes, a row longer than the learned positions, token types that the
                config does not have, or a config mask whose arrays were not given.
        """
        module = self._bind(params)
        return self._encode(module, tokens, positions, mask, segment_ids, token_types, dropout_key)[0]

    def apply(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: masks.Mask | None = None,
        predict_positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_types: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [batch, predicted, vocab_size] in the output dtype; [batch, predicted] of a `DetectionHead`.

        Arguments as in `encode`, and:
            predict_positions: int [batch, predicted], indices into the row. The head runs on these positions
                only; logits of the others are never computed. None predicts at every position.
        """
        return self.apply_with_routing(
            params,
            tokens,
            positions=positions,
            mask=mask,
            predict_positions=predict_positions,
            segment_ids=segment_ids,
            token_types=token_types,
            dropout_key=dropout_key,
        )[0]

    def apply_with_routing(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: masks.Mask | None = None,
        predict_positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_types: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """As `apply`, and what the routers of the model's experts did; None of a model without experts."""
        module = self._bind(params)
        hidden, routing = self._encode(module, tokens, positions, mask, segment_ids, token_types, dropout_key)
        if predict_positions is not None:
            _check_shape("predict_positions", predict_positions, (tokens.shape[0], None))
            hidden = jnp.take_along_axis(hidden, predict_positions[..., None], axis=1)
        return module.logits(hidden), routing

    def flops_per_token(
        self,
        length: int,
        predict_fraction: float = 1.0,
        *,
        attended: float | None = None,
        training: bool = True,
    ) -> float:
        """Floating-point operations of the matrix products per input token (a multiply-add counts 2).

        Of experts, those that a token is sent to count, and the router.

        Args:
            length: row length.
            predict_fraction: share of positions that the head predicts.
            attended: keys that the mask lets a query see, on average; None means `length`, the convention of
                published MFU figures.
            training: include the backward pass, twice the forward; recomputation by remat is not counted.
        """
        config = self.config
        heads, kv_heads, head_dim = config.heads, config.resolved_kv_heads, config.resolved_head_dim
        projections = config.width * head_dim * (2 * heads + 2 * kv_heads)
        matrices = (3 if config.gated else 2) * config.width
        dense = matrices * config.resolved_mlp_width * (config.layers - config.expert_layers)
        chosen = config.experts_per_token * config.resolved_expert_width + config.shared_expert_width
        router = config.width * (config.experts + config.shared_expert_gate)
        feed_forward = dense + (matrices * chosen + router) * config.expert_layers
        attention = 2 * heads * head_dim * (length if attended is None else attended)
        factor = config.resolved_embedding_width
        embedding = factor * config.width if factor != config.width else 0
        head = predict_fraction * self._head.products(config)
        products = embedding + config.layers * (projections + attention) + feed_forward + head
        return 2.0 * products * (3 if training else 1)

    def _bind(self, params: Params) -> Encoder:
        return nnx.merge(self._graph, params)

    def _encode(
        self,
        module: Encoder,
        tokens: jax.Array,
        positions: jax.Array | None,
        mask: masks.Mask | None,
        segment_ids: jax.Array | None,
        token_types: jax.Array | None,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Routing | None]:
        config = self.config
        _check_shape("tokens", tokens, (None, None))
        for name, array in (("positions", positions), ("segment_ids", segment_ids), ("token_types", token_types)):
            if array is not None:
                _check_shape(name, array, tokens.shape)
        if config.positions == "learned" and tokens.shape[1] > config.max_length:
            raise ValueError(
                f"tokens of length {tokens.shape[1]}: longer than model.max_length={config.max_length} learned "
                "positions; raise max_length or use positions='rotary'"
            )
        if token_types is not None and not config.token_types:
            raise ValueError("token_types: given, but model.token_types=0; set model.token_types (BERT: 2)")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        # The layers are scanned in groups of one period.
        period = self.layer_masks(mask, segment_ids)[: len(self._masks)]
        real = None if segment_ids is None else segment_ids > 0
        return module.encode(tokens, positions, period, token_types, dropout_key, real)

    def layer_masks(self, mask: masks.Mask | None, segment_ids: jax.Array | None) -> tuple[masks.Mask | None, ...]:
        """What each layer attends under, the first one first: the config's mask of the layer, and-ed with the caller's.

        Args:
            mask, segment_ids: as in `encode`.

        Returns:
            `config.layers` masks, the same object for the layers that share one; None where neither says anything.

        Raises:
            ValueError: the config's mask names an array that was not given.
        """
        arrays: dict[str, jax.Array] = {}
        if segment_ids is not None:
            arrays = {"segment_ids": segment_ids, "valid": segment_ids > 0}
        combined = []
        for text, pattern in zip(self.config.mask_pattern, self._masks, strict=True):
            bound = pattern.bind(**arrays)
            if bound.unbound:
                raise ValueError(
                    f"model.mask={text!r}: names {', '.join(bound.unbound)}, which the call did not give; "
                    "pass segment_ids=[batch, length] to apply"
                )
            if isinstance(bound, masks.Everything):
                combined.append(mask)
            else:
                combined.append(bound if mask is None else mask & bound)
        return tuple(combined[layer % len(combined)] for layer in range(self.config.layers))


def _plain(tree: Any) -> Any:
    """Nested dicts in the place of NNX states, None entries left out."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(value) for key, value in tree.items()}
    return tree


def _check_shape(name: str, array: jax.Array, expected: tuple[int | None, ...]) -> None:
    shape = tuple(array.shape)
    if len(shape) != len(expected) or any(e is not None and s != e for s, e in zip(shape, expected, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(shape)}")
