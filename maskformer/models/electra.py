"""ELECTRA's two networks as one model: a small generator that fills masks, and a discriminator that finds the fills."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from maskformer.checks import integer, number, typed_fields
from maskformer.masks import Mask
from maskformer.models.encoder import DetectionHead
from maskformer.models.encoder_config import EncoderConfig
from maskformer.models.model import Model, Params


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """The generator's size, relative to the discriminator's (Clark et al. 2020, section 3.2 and table 6).

    Attributes:
      width: share of the discriminator's width and feed-forward width. The paper finds 1/4 to 1/2 best; it uses 1/4
        (small, large) and 1/3 (base).
      layers: share of its layers.
      heads: attention heads; None keeps the discriminator's head size as nearly as the width divides.
      share_embeddings: read the discriminator's token, position and token-type tables (and their norm), projected to
        the generator's width; False gives the generator tables of its own.
    """

    width: float = 0.25
    layers: float = 1.0
    heads: int | None = None
    share_embeddings: bool = True

    def __post_init__(self) -> None:
        typed_fields(self, "model.generator")
        for field in ("width", "layers"):
            number(
                f"model.generator.{field}", getattr(self, field), "a share of the whole in (0, 1]", 0.0, 1.0,
                open_low=True, closed=True,
            )
        if self.heads is not None:
            integer("model.generator.heads", self.heads, 1)

    def encoder(self, discriminator: EncoderConfig) -> EncoderConfig:
        """The generator beside `discriminator`.

        >>> generator = GeneratorConfig(width=1 / 3).encoder(EncoderConfig(vocab_size=100))
        >>> generator.width, generator.heads, generator.layers, generator.embedding_width
        (256, 4, 12, 768)
        """
        width = max(1, round(discriminator.width * self.width))
        heads, kv_heads, mlp_width = self.heads, discriminator.kv_heads, discriminator.mlp_width
        if heads is None:
            wanted = max(1, width // discriminator.resolved_head_dim)
            heads = max(count for count in range(1, wanted + 1) if width % count == 0)
        try:
            return dataclasses.replace(
                discriminator,
                width=width,
                layers=max(1, round(discriminator.layers * self.layers)),
                heads=heads,
                kv_heads=None if kv_heads is None else math.gcd(heads, kv_heads),
                head_dim=None,
                mlp_width=None if mlp_width is None else max(1, round(mlp_width * self.width)),
                embedding_width=discriminator.resolved_embedding_width if self.share_embeddings else None,
            )
        except ValueError as error:
            raise ValueError(f"model.generator: {error}") from error


@dataclasses.dataclass(frozen=True)
class ElectraConfig:
    """A discriminator, and the generator beside it.

    Attributes:
      discriminator: the network that is kept; its `tied_embeddings`, `head_transform` and `head_bias` say nothing, as
        it predicts no tokens, and stand for the generator's.
      generator: made by `GeneratorConfig.encoder`, or any encoder over the same tokens and positions.
      share_embeddings: one set of tables for both; their widths must then agree.

    >>> discriminator = EncoderConfig(vocab_size=100, layers=2, width=64, heads=4)
    >>> ElectraConfig(discriminator, dataclasses.replace(discriminator, width=32))
    Traceback (most recent call last):
        ...
    ValueError: generator.embedding_width=32: shared embeddings are 64 wide; set it to 64, or share_embeddings=False
    """

    discriminator: EncoderConfig
    generator: EncoderConfig
    share_embeddings: bool = True

    def __post_init__(self) -> None:
        ours, theirs = self.generator, self.discriminator
        if ours.experts or theirs.experts:
            raise ValueError(
                f"model.experts={ours.experts or theirs.experts}: two networks are trained without a router's losses; "
                "set model.experts=0"
            )
        for field in ("vocab_size", "max_length"):
            if getattr(ours, field) != getattr(theirs, field):
                raise ValueError(
                    f"generator.{field}={getattr(ours, field)}: both networks read the same rows, and the "
                    f"discriminator's is {getattr(theirs, field)}"
                )
        if not self.share_embeddings:
            return
        width = theirs.resolved_embedding_width
        if ours.resolved_embedding_width != width:
            raise ValueError(
                f"generator.embedding_width={ours.resolved_embedding_width}: shared embeddings are {width} wide; "
                f"set it to {width}, or share_embeddings=False"
            )
        for field in ("positions", "token_types", "embedding_norm", "norm", "norm_bias", "vocab_multiple"):
            if getattr(ours, field) != getattr(theirs, field):
                raise ValueError(
                    f"generator.{field}={getattr(ours, field)!r}: shared embeddings have the discriminator's "
                    f"{getattr(theirs, field)!r}; set the same, or share_embeddings=False"
                )

    @property
    def max_length(self) -> int:
        return self.discriminator.max_length

    @property
    def layers(self) -> int:
        """Of the generator: the stack that `ElectraModel.apply` runs."""
        return self.generator.layers

    @property
    def experts(self) -> int:
        """None of either network."""
        return 0

    @property
    def mask_pattern(self) -> tuple[str, ...]:
        """Of the generator: the stack that `ElectraModel.apply` runs."""
        return self.generator.mask_pattern

    @property
    def axis_sizes(self) -> dict[str, int]:
        """What divides both networks' sizes of each logical axis."""
        ours, theirs = self.generator.axis_sizes, self.discriminator.axis_sizes
        return {axis: math.gcd(size, theirs[axis]) for axis, size in ours.items()}


class ElectraModel:
    """Generator and discriminator over one parameter tree `{"generator": ..., "discriminator": ...}`.

    Made by `models.create(ElectraConfig(...))`. As a masked language model (`apply`) it is the generator, so that
    whatever fills, evaluates or checks one works on it; what is used downstream is the discriminator
    (`encode`, `discriminate`, and `params["discriminator"]` with `model.discriminator`). Shared tables exist once, in
    the discriminator's part, and get the gradients of both.

    Attributes:
        config: the `ElectraConfig`.
        generator, discriminator: the two `Model`s.
    """

    def __init__(self, config: ElectraConfig):
        self.config = config
        self.generator = Model(config.generator)
        self.discriminator = Model(config.discriminator, head=DetectionHead)

    def init(self, key: jax.Array) -> Params:
        """New parameters of both networks, shared ones once."""
        keys = jax.random.split(key)
        return self._join(self.generator.init(keys[0]), self.discriminator.init(keys[1]))

    def param_shapes(self) -> Params:
        """The tree of `init`, with `jax.ShapeDtypeStruct` leaves; computes nothing."""
        return self._join(self.generator.param_shapes(), self.discriminator.param_shapes())

    def logical_axes(self) -> Params:
        """The tree of `init`, with a tuple of axis names in the place of each array."""
        return self._join(self.generator.logical_axes(), self.discriminator.logical_axes())

    def num_params(self) -> int:
        """Number of parameters of both networks, shared ones counted once."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.param_shapes()))

    def apply(self, params: Params, tokens: jax.Array, **options: Any) -> jax.Array:
        """The generator's logits over the vocabulary; arguments as in `Model.apply`."""
        return self.generator.apply(self.generator_params(params), tokens, **options)

    def discriminate(self, params: Params, tokens: jax.Array, **options: Any) -> jax.Array:
        """The discriminator's logits [batch, length], above 0 where it takes a token for a replacement.

        Arguments as in `Model.apply`.
        """
        return self.discriminator.apply(params["discriminator"], tokens, **options)

    def encode(self, params: Params, tokens: jax.Array, **options: Any) -> jax.Array:
        """The discriminator's hidden states [batch, length, width]; arguments as in `Model.encode`."""
        return self.discriminator.encode(params["discriminator"], tokens, **options)

    def layer_masks(self, mask: Mask | None, segment_ids: jax.Array | None) -> tuple[Mask | None, ...]:
        """Of the generator; arguments as in `Model.layer_masks`."""
        return self.generator.layer_masks(mask, segment_ids)

    def flops_per_token(self, length: int, predict_fraction: float = 1.0, **options: Any) -> float:
        """Of both networks; the discriminator answers at every position. Arguments as in `Model.flops_per_token`."""
        generator = self.generator.flops_per_token(length, predict_fraction, **options)
        return generator + self.discriminator.flops_per_token(length, 1.0, **options)

    def generator_params(self, params: Params) -> Params:
        """The generator's own tree, shared tables included: parameters of `model.generator`."""
        generator = params["generator"]
        if not self.config.share_embeddings:
            return generator
        shared = {name: tree for name, tree in params["discriminator"]["embeddings"].items() if name != "project"}
        return {**generator, "embeddings": {**generator.get("embeddings", {}), **shared}}

    def _join(self, generator: Params, discriminator: Params) -> Params:
        if self.config.share_embeddings:
            own = {name: tree for name, tree in generator["embeddings"].items() if name == "project"}
            generator = {name: tree for name, tree in generator.items() if name != "embeddings"}
            if own:
                generator["embeddings"] = own
        return {"generator": generator, "discriminator": discriminator}
