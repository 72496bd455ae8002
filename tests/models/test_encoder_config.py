"""A wrong shape is refused in one line that names the field, its value and what to do."""

import dataclasses

import jax
import pytest

from maskformer import models

WRONG = {
    "heads does not divide": (dict(width=64, heads=5), "model.heads=5: does not divide model.width=64; use a divisor"),
    "kv_heads does not divide": (dict(kv_heads=3), "model.kv_heads=3: does not divide model.heads=4"),
    "odd rotary head": (dict(width=12, positions="rotary"), "model.head_dim=3: rotary positions turn pairs"),
    "negative": (dict(layers=-1), "model.layers=-1: expected an integer of at least 1"),
    "fraction": (dict(layers=2.0), "model.layers=2.0: expected an integer"),
    "boolean": (dict(layers=True), "model.layers=True: expected an integer"),
    "rate": (dict(hidden_dropout=1.3), "model.hidden_dropout=1.3: expected a rate in [0, 1)"),
    "flag": (dict(use_bias="no"), "model.use_bias='no': expected True or False"),
    "epsilon": (dict(norm_epsilon=0.0), "model.norm_epsilon=0.0: expected a number above 0"),
    "norm": (dict(norm="layer_norm"), "did you mean 'layernorm'?"),
    "norm_position": (dict(norm_position="prenorm"), "model.norm_position='prenorm': expected one of post, pre"),
    "activation": (dict(activation="swiglo"), "did you mean 'swiglu'?"),
    "positions": (dict(positions="rope"), "expected one of learned, rotary, alibi, none"),
    "remat": (dict(remat="ful"), "did you mean 'full'?"),
    "dtype": (dict(compute_dtype="bf16"), "did you mean 'bfloat16'?"),
    "mask": (dict(mask="causal & windw(4)"), "model.mask: mask 'causal & windw(4)': unknown mask 'windw' at column 9"),
    "mask array": (dict(mask="dense(table)"), "model.mask='dense(table)': no array named 'table'"),
    "no mask": (dict(mask=None), "model.mask=None: expected a mask such as 'causal & window(512)'"),
    "mask kind": (dict(mask=("causal", 3)), "model.mask=('causal', 3): expected a mask"),
    "vanishing epsilon": (dict(norm_epsilon=1e-40), "model.norm_epsilon=1e-40: expected a number above 0, from 1e-30"),
    "double": (dict(param_dtype="float64"), "model.param_dtype='float64': JAX makes it float32 unless jax_enable_x64"),
    "doubled output": (dict(output_dtype="float64"), "model.output_dtype='float64': JAX makes it float32"),
    "backend": (dict(attention_implementation="50%"), "model.attention_implementation='50%': expected one of None,"),
    "huge": (dict(width=2**40), "model.width=1099511627776: expected an integer of at most 1048576"),
    "long": (dict(norm="x" * 3000), "model.norm='xxx"),
    "mask pattern": (dict(layers=2, mask=("causal",) * 3), "a pattern of 3 masks is longer than model.layers=2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_refused_by_name(name):
    changes, message = WRONG[name]
    with pytest.raises(ValueError) as error:
        models.EncoderConfig(**{"vocab_size": 100, "layers": 4, "width": 16, "heads": 4, **changes})
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_double_precision_is_accepted_where_jax_has_it():
    with jax.enable_x64(True):
        config = models.EncoderConfig(vocab_size=20, layers=1, width=8, heads=2, param_dtype="float64")
        shapes = models.create(config).param_shapes()
    assert all(leaf.dtype == "float64" for leaf in jax.tree.leaves(shapes))


def test_every_choice_that_an_error_offers_is_accepted():
    config = models.EncoderConfig(vocab_size=100, layers=2, width=16, heads=4)
    with pytest.raises(ValueError) as error:
        dataclasses.replace(config, activation="?")
    for name in str(error.value).split("one of ")[1].split(", "):
        assert dataclasses.replace(config, activation=name).activation == name


def test_create_refuses_what_is_not_a_config():
    with pytest.raises(TypeError, match="models.create takes an EncoderConfig or an ElectraConfig; got dict"):
        models.create({"vocab_size": 10})
