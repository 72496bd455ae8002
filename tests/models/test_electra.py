"""ELECTRA's pair: sizes as published, tables that exist once and learn from both networks, factorised embeddings."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskformer import masks, models
from maskformer.models.electra import ElectraConfig

STILL = dict(hidden_dropout=0.0, attention_dropout=0.0)
TINY = models.EncoderConfig(vocab_size=23, max_length=12, layers=2, width=32, heads=2, embedding_width=12, **STILL)
TOKENS = jax.random.randint(jax.random.key(7), (2, 12), 0, 23)


def pair_config(discriminator=TINY, **generator):
    shape = models.GeneratorConfig(**generator)
    return ElectraConfig(discriminator, shape.encoder(discriminator), shape.share_embeddings)


@functools.cache
def build(**generator):
    model = models.create(pair_config(**generator))
    return model, model.init(jax.random.key(0))


def gradients_of(call, params):
    return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(call(params, TOKENS)))))(params)


@pytest.mark.parametrize(
    "layers, width, heads, embedding, fraction, generator",
    # Clark et al. 2020, table 6: small, base, large. The generator's heads are those of its width at 64 each.
    [(12, 256, 4, 128, 1 / 4, (64, 1)), (12, 768, 12, 768, 1 / 3, (256, 4)), (24, 1024, 16, 1024, 1 / 4, (256, 4))],
)
def test_published_sizes(layers, width, heads, embedding, fraction, generator):
    discriminator = models.EncoderConfig(
        vocab_size=30522, layers=layers, width=width, heads=heads, embedding_width=embedding, token_types=2
    )
    config = pair_config(discriminator, width=fraction)
    assert (config.generator.width, config.generator.heads) == generator
    assert config.generator.layers == layers and config.generator.embedding_width == embedding
    model = models.create(config)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.param_shapes()["discriminator"]))
    tables = (30522 + 512 + 2) * embedding + 2 * embedding + (embedding != width) * (embedding + 1) * width
    layer = 4 * width * (width + 1) + width * 4 * width * 2 + 5 * width + 4 * width
    assert count == tables + layers * layer + width * (width + 1) + width + 1
    if width == 256:
        assert count == 13_549_057  # "14M parameters" of ELECTRA-small


def test_shared_tables_exist_once_and_learn_from_both_networks():
    model, params = build()
    assert set(params["generator"]["embeddings"]) == {"project"}
    assert jax.tree.structure(params) == jax.tree.structure(model.param_shapes())
    names = jax.tree.leaves(model.logical_axes(), is_leaf=lambda node: isinstance(node, tuple))
    assert [len(axes) for axes in names] == [leaf.ndim for leaf in jax.tree.leaves(params)]
    through = {call: gradients_of(call, params)["discriminator"] for call in (model.apply, model.discriminate)}
    for gradients in through.values():
        for table in ("tokens", "positions"):
            assert np.abs(gradients["embeddings"][table]["embedding"]).sum() > 0
    assert np.abs(through[model.apply]["layers"]["mlp"]["up"]["kernel"]).sum() == 0


def test_without_sharing_neither_network_moves_the_other():
    model, params = build(share_embeddings=False)
    assert params["generator"]["embeddings"]["tokens"]["embedding"].shape == (23, 8)
    for call, other in ((model.apply, "discriminator"), (model.discriminate, "generator")):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients_of(call, params)[other]))


def test_each_network_is_an_ordinary_model_of_its_part():
    model, params = build()
    alone = models.create(model.config.generator)
    tree = model.generator_params(params)
    assert jax.tree.structure(tree) == jax.tree.structure(alone.param_shapes())
    places = jnp.array([[1, 5], [0, 11]])
    np.testing.assert_array_equal(
        model.apply(params, TOKENS, predict_positions=places), alone.apply(tree, TOKENS, predict_positions=places)
    )
    hidden = model.encode(params, TOKENS, mask=masks.causal())
    head = params["discriminator"]["head"]
    inner = np.asarray(hidden, np.float64) @ head["transform"]["kernel"] + head["transform"]["bias"]
    inner = inner * np.vectorize(math.erfc)(-inner / math.sqrt(2)) / 2
    expected = inner @ np.asarray(head["answer"]["kernel"])[:, 0] + head["answer"]["bias"][0]
    np.testing.assert_allclose(
        model.discriminate(params, TOKENS, mask=masks.causal()), expected, rtol=1e-4, atol=1e-6
    )
    assert model.flops_per_token(12, 0.25) == alone.flops_per_token(12, 0.25) + model.discriminator.flops_per_token(12)


def test_factorised_embeddings_are_the_product_of_table_and_projection():
    factorised = models.create(dataclasses.replace(TINY, embedding_norm=False))
    params = jax.tree.map(lambda leaf: leaf + 0.1, factorised.init(jax.random.key(0)))
    whole = models.create(dataclasses.replace(TINY, embedding_norm=False, embedding_width=None))
    tables, project = params["embeddings"], params["embeddings"]["project"]
    product = {
        "tokens": {"embedding": tables["tokens"]["embedding"] @ project["kernel"] + project["bias"]},
        "positions": {"embedding": tables["positions"]["embedding"] @ project["kernel"]},
    }
    head = whole.init(jax.random.key(1))["head"]
    np.testing.assert_allclose(
        factorised.encode(params, TOKENS),
        whole.encode({**params, "embeddings": product, "head": head}, TOKENS),
        rtol=2e-4, atol=2e-5,
    )
    # The multiply-adds: less table in the head, and one projection more at each end.
    saved = whole.flops_per_token(12, 0.5, training=False) - factorised.flops_per_token(12, 0.5, training=False)
    assert saved == 2 * (0.5 * (23 * (32 - 12) + 32 * (32 - 12)) - 12 * 32)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: models.GeneratorConfig(width=2.0), r"model.generator.width=2.0: expected a share .* \(0, 1\]"),
        (lambda: pair_config(heads=3), "model.generator: model.heads=3: does not divide"),
        (lambda: ElectraConfig(TINY, dataclasses.replace(TINY, vocab_size=9)), "generator.vocab_size=9: both"),
        (lambda: ElectraConfig(TINY, dataclasses.replace(TINY, embedding_width=None)), "embedding_width=32"),
        (lambda: ElectraConfig(TINY, dataclasses.replace(TINY, positions="rotary")), "positions='rotary'"),
        (lambda: dataclasses.replace(TINY, head_transform=False), "model.embedding_width=12: tied embeddings need"),
    ],
)
def test_a_pair_that_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
