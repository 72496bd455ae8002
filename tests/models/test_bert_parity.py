"""The encoder in BERT's shape against Hugging Face's BERT, from weights and outputs stored in tests/golden."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskformer import masks, models

GOLDEN = Path(__file__).parents[1] / "golden" / "bert_tiny.npz"
LAYERS, WIDTH, HEADS = 3, 32, 4


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def bert_params(golden):
    """The stored weights in our tree. PyTorch keeps a linear layer as [output, input]."""

    def weight(name):
        return golden[f"weight/{name}"]

    def norm(name):
        return {"scale": weight(f"{name}.weight"), "bias": weight(f"{name}.bias")}

    def layer(i):
        def dense(name, kernel_shape, bias_shape):
            path = f"bert.encoder.layer.{i}.{name}"
            return {
                "kernel": weight(f"{path}.weight").T.reshape(kernel_shape),
                "bias": weight(f"{path}.bias").reshape(bias_shape),
            }

        head_dim = WIDTH // HEADS
        to_heads = ((WIDTH, HEADS, head_dim), (HEADS, head_dim))
        return {
            "attention": {
                "query": dense("attention.self.query", *to_heads),
                "key": dense("attention.self.key", *to_heads),
                "value": dense("attention.self.value", *to_heads),
                "out": dense("attention.output.dense", (HEADS, head_dim, WIDTH), (WIDTH,)),
            },
            "attention_norm": norm(f"bert.encoder.layer.{i}.attention.output.LayerNorm"),
            "mlp": {
                "up": dense("intermediate.dense", (WIDTH, 64), (64,)),
                "down": dense("output.dense", (64, WIDTH), (WIDTH,)),
            },
            "mlp_norm": norm(f"bert.encoder.layer.{i}.output.LayerNorm"),
        }

    return {
        "embeddings": {
            "tokens": {"embedding": weight("bert.embeddings.word_embeddings.weight")},
            "positions": {"embedding": weight("bert.embeddings.position_embeddings.weight")},
            "token_types": {"embedding": weight("bert.embeddings.token_type_embeddings.weight")},
            "norm": norm("bert.embeddings.LayerNorm"),
        },
        "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *[layer(i) for i in range(LAYERS)]),
        "head": {
            "transform": {
                "kernel": weight("cls.predictions.transform.dense.weight").T,
                "bias": weight("cls.predictions.transform.dense.bias"),
            },
            "norm": norm("cls.predictions.transform.LayerNorm"),
            "bias": weight("cls.predictions.bias"),
        },
    }


def bert():
    return models.create(
        models.EncoderConfig(
            vocab_size=67, max_length=20, layers=LAYERS, width=WIDTH, heads=HEADS, mlp_width=64, token_types=2
        )
    )


def assert_as_exact_as_pytorch(ours, golden, name):
    """Error against float64 at most 10 times that of PyTorch's own float32."""
    exact, reference = golden[f"float64/{name}"], golden[f"float32/{name}"]
    allowed = 10 * np.abs(reference - exact).max()
    assert np.abs(np.asarray(ours, np.float64) - exact).max() <= allowed


def test_the_parameter_tree_is_that_of_bert(golden):
    ours = jax.tree.map(lambda leaf: leaf.shape, bert().param_shapes())
    assert ours == jax.tree.map(np.shape, bert_params(golden))
    assert bert().num_params() == sum(value.size for name, value in golden.items() if name.startswith("weight/"))


def test_hidden_states_and_logits_equal_those_of_hugging_face_bert(golden):
    model, params = bert(), jax.tree.map(jnp.asarray, bert_params(golden))
    inputs = {
        "mask": masks.key_padding(jnp.asarray(golden["input/valid"])),
        "token_types": jnp.asarray(golden["input/token_types"]),
    }
    tokens = jnp.asarray(golden["input/tokens"])
    assert_as_exact_as_pytorch(jax.jit(model.encode)(params, tokens, **inputs), golden, "hidden")
    assert_as_exact_as_pytorch(jax.jit(model.apply)(params, tokens, **inputs), golden, "logits")


def test_predicted_positions_have_the_logits_of_the_full_computation(golden):
    model, params = bert(), jax.tree.map(jnp.asarray, bert_params(golden))
    places = np.array([[0, 5, 13], [2, 8, 0], [0, 0, 0]])
    logits = jax.jit(model.apply)(
        params,
        jnp.asarray(golden["input/tokens"]),
        mask=masks.key_padding(jnp.asarray(golden["input/valid"])),
        token_types=jnp.asarray(golden["input/token_types"]),
        predict_positions=jnp.asarray(places),
    )
    expected = np.take_along_axis(golden["float64/logits"], places[..., None], axis=1)
    # Fewer positions are fewer places for PyTorch's float32 to err; the yardstick stays that of the whole batch.
    allowed = 10 * np.abs(golden["float32/logits"] - golden["float64/logits"]).max()
    assert np.abs(np.asarray(logits, np.float64) - expected).max() <= allowed
