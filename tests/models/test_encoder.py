"""What must hold of the encoder whatever its options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from maskformer import masks, models
from maskformer.models import electra, layers

TINY = models.EncoderConfig(
    vocab_size=23, max_length=12, layers=3, width=16, heads=4, hidden_dropout=0.0, attention_dropout=0.0
)
TOKENS = jax.random.randint(jax.random.key(7), (2, 12), 0, 23)
SEGMENTS = jnp.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])


@functools.cache
def build(**changes):
    """The model of TINY with changes, and larger weights than at initialisation so that every part matters."""
    model = models.create(dataclasses.replace(TINY, **changes))
    params = model.init(jax.random.key(0))
    noise = iter(jax.random.split(jax.random.key(1), 100))
    return model, jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(noise), leaf.shape), params)


def value_and_gradients(model, params, **inputs):
    def loss(params):
        logits = model.apply(params, TOKENS, **inputs)
        return jnp.sum(jnp.sin(3 * logits)), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    return logits, gradients


def assert_close(ours, theirs, tolerance=1e-4):
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_scanned_and_unrolled_layers_compute_the_same():
    # Two masks over three layers: one scanned group of two, and one layer left over.
    changes = dict(mask=("causal & window(2)", "segments"), hidden_dropout=0.3, attention_dropout=0.3)
    inputs = dict(dropout_key=jax.random.key(3), segment_ids=SEGMENTS)
    (scanned, params), (unrolled, _) = build(**changes), build(**changes, scan_layers=False)
    assert_close(value_and_gradients(scanned, params, **inputs), value_and_gradients(unrolled, params, **inputs))


@pytest.mark.parametrize("remat", ["elementwise", "dots", "dots_no_batch", "full"])
def test_rematerialisation_changes_neither_values_nor_gradients(remat):
    inputs = dict(dropout_key=jax.random.key(3))
    (kept, params), (recomputed, _) = (
        build(remat=name, hidden_dropout=0.3, attention_dropout=0.3) for name in ("none", remat)
    )
    assert_close(value_and_gradients(recomputed, params, **inputs), value_and_gradients(kept, params, **inputs))


def test_each_layer_of_a_pattern_has_its_own_mask():
    pattern = ("causal & window(2)", "segments")
    model, params = build(mask=pattern, layers=2)
    segments = SEGMENTS[:1]

    # Token j reaches output i through two layers if the masks' matrices, multiplied in order, have a path.
    def from_table(table):
        changed = {**params, "embeddings": {**params["embeddings"], "tokens": {"embedding": table}}}
        return model.encode(changed, jnp.arange(12)[None], segment_ids=segments)[0]

    jacobian = jax.jit(jax.jacrev(from_table))(params["embeddings"]["tokens"]["embedding"])
    reached = np.abs(jacobian).max(axis=(1, 3))[:, :12] > 1e-9
    first, second = (
        np.asarray(masks.parse(text).bind(segment_ids=segments[0]).dense(12, 12)).astype(int) for text in pattern
    )
    np.testing.assert_array_equal(reached, second @ first > 0)
    assert (second @ first > 0).tolist() != (first @ second > 0).tolist()


def test_a_model_says_what_each_of_its_layers_attends_under():
    model = models.create(dataclasses.replace(TINY, mask=("causal", "everything"), layers=3))
    called = masks.sliding_window(2)
    assert model.layer_masks(called, None) == (called & masks.causal(), called, called & masks.causal())
    assert model.layer_masks(None, None) == (masks.causal(), None, masks.causal())
    config = electra.ElectraConfig(model.config, dataclasses.replace(model.config, mask="causal", layers=1))
    assert models.create(config).layer_masks(None, None) == (masks.causal(),)


def test_the_masks_of_config_and_call_are_both_obeyed():
    (windowed, params), (plain, _) = build(mask="window(2, 2) & segments"), build()
    both = masks.segments(SEGMENTS) & masks.sliding_window(2, 2)
    expected = plain.apply(params, TOKENS, mask=both)
    ours = windowed.apply(params, TOKENS, mask=masks.segments(SEGMENTS), segment_ids=SEGMENTS)
    assert_close(ours, expected, 1e-5)
    assert np.abs(ours - plain.apply(params, TOKENS, mask=masks.segments(SEGMENTS))).max() > 1e-2


def test_what_config_and_objective_both_say_is_evaluated_once(monkeypatch):
    seen = []

    def spy(query, key, value, *, mask, **options):
        seen.append(repr(mask))
        return query

    monkeypatch.setattr(layers, "dot_product_attention", spy)
    model, params = build(mask="causal & window(2) & segments")

    def apply(segment_ids):
        mask = masks.causal() & masks.documents(segment_ids)  # what a causal objective says of packed rows
        return model.apply(params, TOKENS, mask=mask, segment_ids=segment_ids)

    jax.eval_shape(apply, SEGMENTS)
    assert set(seen) == {"causal & documents(segment_ids) & sliding_window(2)"}


def array_shapes(jaxpr):
    """The shape of every array that a jaxpr computes, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from array_shapes(inner)


def test_logits_exist_at_predicted_positions_only():
    model, params = build()
    places = jnp.array([[1, 4, 6], [0, 2, 3]])

    def shapes(places):
        def loss(params):
            return model.apply(params, TOKENS, predict_positions=places).sum()

        return set(array_shapes(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))

    # 2 rows x 12 places x 23 vocabulary entries.
    assert (2, 12, 23) in shapes(None)
    assert (2, 3, 23) in shapes(places)
    assert not [shape for shape in shapes(places) if int(np.prod(shape)) >= 2 * 12 * 23 and shape[-1] == 23]


OPTIONS = {
    "post-norm BERT with dropout": dict(token_types=2, hidden_dropout=0.1, attention_dropout=0.1),
    "pre-norm": dict(norm_position="pre"),
    "rmsnorm, swiglu, rotary, no biases": dict(
        norm_position="pre", norm="rmsnorm", activation="swiglu", positions="rotary", use_bias=False, head_bias=False
    ),
    "alibi, gelu_tanh, untied, no transform": dict(
        # Distances alone do not tell before from after.
        mask="causal",
        positions="alibi",
        activation="gelu_tanh",
        tied_embeddings=False,
        head_transform=False,
    ),
    "geglu, grouped heads, soft cap": dict(activation="geglu", kv_heads=2, logits_soft_cap=20.0, head_dim=6),
    "relu, no norm bias, padded vocabulary": dict(
        activation="relu", norm_bias=False, embedding_norm=False, vocab_multiple=16
    ),
    "bfloat16": dict(compute_dtype="bfloat16", output_dtype="bfloat16"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_learns_to_copy_the_token_before(name):
    model = models.create(dataclasses.replace(TINY, vocab_size=7, layers=2, initializer_range=0.1, **OPTIONS[name]))
    optimizer = optax.adam(5e-3)

    def step(carry, key):
        params, state = carry
        tokens = jax.random.randint(key, (16, 12), 0, 7)

        def loss(params):
            logits = model.apply(
                params, tokens, predict_positions=jnp.full((16, 11), jnp.arange(1, 12)), dropout_key=key
            ).astype(jnp.float32)
            assert logits.shape == (16, 11, 7)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, :-1]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), (value, gradients)

    params = model.init(jax.random.key(0))
    start = (params, optimizer.init(params))
    _, (losses, gradients) = jax.jit(lambda start: jax.lax.scan(step, start, jax.random.split(jax.random.key(1), 300)))(
        start
    )
    assert losses[0] > 1.7  # log 7 = 1.95: nothing is known at first
    assert np.mean(losses[-10:]) < 0.7, losses[::50]
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert jnp.abs(gradient).max() > 0, f"no gradient for {jax.tree_util.keystr(path)}"


def test_dropout_is_a_function_of_its_key():
    model, params = build(hidden_dropout=0.2, attention_dropout=0.2)
    run = jax.jit(lambda key: model.encode(params, TOKENS, dropout_key=key))
    first = run(jax.random.key(0))
    np.testing.assert_array_equal(first, run(jax.random.key(0)))
    assert np.abs(first - run(jax.random.key(1))).max() > 0.1
    assert np.abs(first - model.encode(params, TOKENS)).max() > 0.1


def test_every_dropout_of_every_layer_draws_its_own_mask(monkeypatch):
    from maskformer.models import encoder, layers

    masks_seen = []

    def record(key, x, rate, rows=None):
        if key is not None:
            masks_seen.append(np.asarray(jax.random.bits(key, (8,))))
        return x

    monkeypatch.setattr(layers, "dropout", record)
    monkeypatch.setattr(encoder, "dropout", record)
    model, params = build(hidden_dropout=0.2, scan_layers=False, remat="none")
    model.encode(params, TOKENS, dropout_key=jax.random.key(0))
    assert len(masks_seen) == 1 + 2 * TINY.layers
    assert len({mask.tobytes() for mask in masks_seen}) == len(masks_seen)


def test_padding_the_vocabulary_changes_no_logit():
    (padded, params), (plain, _) = build(vocab_multiple=16), build()
    assert params["embeddings"]["tokens"]["embedding"].shape == (32, 16)
    cut = {
        **params,
        "embeddings": {
            **params["embeddings"],
            "tokens": {"embedding": params["embeddings"]["tokens"]["embedding"][:23]},
        },
        "head": {**params["head"], "bias": params["head"]["bias"][:23]},
    }
    assert_close(padded.apply(params, TOKENS), plain.apply(cut, TOKENS), 1e-6)


def test_every_parameter_names_each_of_its_axes():
    for changes in OPTIONS.values():
        model = models.create(dataclasses.replace(TINY, **changes))
        names = jax.tree.leaves_with_path(model.logical_axes(), is_leaf=lambda node: isinstance(node, tuple))
        shapes = jax.tree.leaves_with_path(model.param_shapes())
        for (path, axes), (shape_path, shape) in zip(names, shapes, strict=True):
            assert path == shape_path
            assert len(axes) == len(shape.shape) and set(axes) <= set(models.PARAMETER_AXES), path
        assert jax.tree.structure(model.param_shapes()) == jax.tree.structure(model.init(jax.random.key(0)))


def dot_flops(jaxpr, repeats=1):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += (
                2 * repeats * np.prod(equation.outvars[0].aval.shape) * np.prod([left[axis] for axis in contracted])
            )
        inner_repeats = repeats * equation.params["length"] if equation.primitive.name == "scan" else repeats
        total += sum(dot_flops(inner, inner_repeats) for inner in jaxprs_in_params(equation.params))
    return total


@pytest.mark.parametrize("changes", [{}, {"activation": "swiglu", "kv_heads": 2, "head_transform": False}])
def test_flops_per_token_count_the_matrix_products_of_the_program(changes):
    model, params = build(**changes, attention_implementation="reference", remat="none")
    places = jnp.zeros((2, 3), jnp.int32)
    forward = jax.make_jaxpr(lambda params: model.apply(params, TOKENS, predict_positions=places))(params)
    counted = dot_flops(forward.jaxpr) / TOKENS.size
    assert model.flops_per_token(12, 3 / 12, training=False) == pytest.approx(counted)
    assert model.flops_per_token(12, 3 / 12) == pytest.approx(3 * counted)
    assert model.flops_per_token(12, attended=6) < model.flops_per_token(12)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(positions=jnp.zeros((2, 5), jnp.int32)), r"positions: expected shape \[2, 12\], got \[2, 5\]"),
        (dict(token_types=TOKENS), "token_types: given, but model.token_types=0"),
        (dict(predict_positions=jnp.zeros((3, 4), jnp.int32)), r"predict_positions: expected shape \[2, any\]"),
    ],
)
def test_a_wrong_input_is_refused_by_name(inputs, message):
    model, params = build()
    with pytest.raises(ValueError, match=message):
        model.apply(params, TOKENS, **inputs)


def test_a_row_longer_than_the_learned_positions_is_refused_and_rotary_takes_it():
    long = jnp.zeros((1, 13), jnp.int32)
    model, params = build()
    with pytest.raises(ValueError, match="longer than model.max_length=12"):
        model.encode(params, long)
    model, params = build(positions="rotary")
    assert model.encode(params, long).shape == (1, 13, 16)


def test_a_config_mask_that_names_segments_asks_for_them():
    model, params = build(mask="segments")
    with pytest.raises(ValueError, match="names segment_ids, which the call did not give"):
        model.encode(params, TOKENS)
