"""From a config to its model."""

from __future__ import annotations

from typing import overload

from maskformer.models.config import EncoderConfig
from maskformer.models.electra import ElectraConfig, ElectraModel, GeneratorConfig
from maskformer.models.model import Model


@overload
def create(config: EncoderConfig) -> Model: ...
@overload
def create(config: ElectraConfig) -> ElectraModel: ...


def create(config: EncoderConfig | ElectraConfig) -> Model | ElectraModel:
    """The model of `config`; see `Model` and `ElectraModel`.

    >>> import jax, jax.numpy as jnp
    >>> from maskformer import models
    >>> model = models.create(models.EncoderConfig(vocab_size=50, layers=2, width=16, heads=2))
    >>> params = model.init(jax.random.key(0))
    >>> tokens = jnp.ones((3, 8), jnp.int32)
    >>> model.apply(params, tokens, predict_positions=jnp.array([[1, 5]] * 3)).shape
    (3, 2, 50)
    >>> model.logical_axes()["layers"]["attention"]["query"]["kernel"]
    ('layers', 'embed', 'heads', 'head_dim')
    """
    if isinstance(config, ElectraConfig):
        return ElectraModel(config)
    if not isinstance(config, EncoderConfig):
        raise TypeError(f"models.create takes an EncoderConfig or an ElectraConfig; got {type(config).__name__}")
    return Model(config)


def with_generator(config: EncoderConfig, generator: GeneratorConfig) -> ElectraConfig:
    """The pair of networks in which `config` is what is kept, and `generator` says how large the one beside it is.

    >>> pair = with_generator(EncoderConfig(vocab_size=50, layers=2, width=64, heads=4), GeneratorConfig(width=0.5))
    >>> pair.generator.width, pair.discriminator.width
    (32, 64)
    """
    return ElectraConfig(config, generator.encoder(config), generator.share_embeddings)
