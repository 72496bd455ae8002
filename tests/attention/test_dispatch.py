"""What runs, what is refused, and that `explain` says the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskformer as mf
from maskformer import masks
from maskformer.attention import dispatch, platform

SHORT = jnp.ones((2, 16, 4, 8))
LONG = jax.ShapeDtypeStruct((1, 8192, 4, 64), jnp.float32)


def x(*shape):
    return jnp.ones(shape)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((x(2, 16, 8), SHORT, SHORT), {}, r"query: expected \[batch, length, heads, head_dim\], got shape \(2, 1"),
        ((SHORT, x(3, 16, 4, 8), x(3, 16, 4, 8)), {}, "batch: query has 2, key 3"),
        ((SHORT, SHORT, x(2, 15, 4, 8)), {}, "value: expected key's length and heads"),
        ((SHORT, x(2, 16, 4, 6), SHORT), {}, "key: expected query's head_dim 8, got 6"),
        ((SHORT, x(2, 16, 3, 8), x(2, 16, 3, 8)), {}, "divides query's 4, got 3"),
        ((SHORT, SHORT, SHORT.astype(jnp.bfloat16)), {}, "expected one dtype"),
        ((SHORT.astype(int),) * 3, {}, "query: expected a floating dtype"),
        ((SHORT.astype(jnp.float8_e4m3fn),) * 3, {}, "got float8_e4m3fn"),
        ((x(2, 16, 4, 0),) * 3, {}, "query: expected a head_dim of at least 1"),
        ((SHORT,) * 3, dict(bias=x(3, 1, 1, 16)), "bias: expected a shape that broadcasts"),
        ((SHORT,) * 3, dict(bias=x(16, 16) > 0), r"bias: .* got bool; what may attend goes to mask=masks.dense"),
        ((SHORT,) * 3, dict(scale=x(4)), "scale: expected a number or a scalar array"),
        ((SHORT,) * 3, dict(scale=x(16)), "scale: expected a number or a scalar array"),
        ((SHORT,) * 3, dict(sink_logits=x(3)), r"sink_logits: expected one logit per query head, shape \(4,\)"),
        ((SHORT,) * 3, dict(logits_soft_cap=0.0), "logits_soft_cap: expected a positive number"),
        ((SHORT,) * 3, dict(dropout_rate=1.0), "dropout rate: expected 0 <= rate < 1"),
        ((SHORT,) * 3, dict(logits_soft_cap=float("inf")), "logits_soft_cap: expected a positive number"),
        ((SHORT,) * 3, dict(dropout_rate=0.1), "dropout_key is None"),
        ((SHORT,) * 3, dict(dropout_rate=0.1, dropout_key=0.5), "dropout key: expected a PRNG key or an integer"),
        ((SHORT,) * 3, dict(q_offset=1.5), "q_offset=1.5, expected an int or an integer scalar array"),
        ((SHORT,) * 3, dict(q_offset=2**31), "q_offset=2147483648, expected an int of at most 2147483647"),
        ((SHORT,) * 3, dict(q_offset=np.array(2**31)), "q_offset=.*2147483648.*, expected an int of at most"),
        ((SHORT,) * 3, dict(mask=lambda q, k: q >= k), "functions through masks.predicate"),
        ((SHORT,) * 3, dict(score_mod=lambda score, b, h, q, k: q >= k), "got a bool; who may attend"),
        ((SHORT,) * 3, dict(mask=x(16, 16) > 0), r"wrap it with masks.dense\(array\)"),
        ((SHORT,) * 3, dict(mask="causal"), "strings go through masks.parse"),
        ((SHORT,) * 3, dict(mask=masks.key_padding(lengths=jnp.ones(3, int))), "mask: its batch dimension is 3"),
        ((SHORT,) * 3, dict(implementation="flash"), "expected one of splash, cudnn, tokamax, reference, blockwise"),
    ],
)
def test_a_call_that_does_not_fit_names_the_argument_and_the_fix(arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mf.dot_product_attention(*arguments, **options)


@pytest.mark.parametrize("option", ["dropout_rate", "logits_soft_cap"])
def test_options_that_must_be_known_say_so_when_traced(option):
    call = lambda number: mf.dot_product_attention(SHORT, SHORT, SHORT, dropout_key=0, **{option: number})
    np.testing.assert_array_equal(call(jnp.float32(0.5)), call(0.5))
    with pytest.raises(ValueError, match="known while tracing"):
        jax.jit(call)(0.5)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_a_score_mod_may_give_a_constant(implementation):
    value = jnp.arange(2 * 16 * 4 * 8.0).reshape(2, 16, 4, 8)
    out = mf.dot_product_attention(
        SHORT, SHORT, value, score_mod=lambda score, b, h, q, k: 1.0, implementation=implementation
    )
    np.testing.assert_allclose(out, jnp.broadcast_to(value.mean(1, keepdims=True), out.shape), rtol=1e-6)


@pytest.mark.parametrize("implementation", ["splash", "cudnn", "tokamax"])
@pytest.mark.parametrize(
    "options",
    [
        dict(score_mod=lambda score, b, h, q, k: score),
        dict(dropout_rate=0.1, dropout_key=0),
        dict(mask=masks.predicate(lambda q, k: (q * k) % 7 == 0) & masks.dense(np.eye(16, dtype=bool))),
    ],
    ids=["score_mod", "dropout", "dense mask"],
)
def test_a_backend_that_cannot_honour_an_option_raises_or_explains_and_never_drops_it(implementation, options):
    half = SHORT.astype(jnp.bfloat16)
    if implementation == "splash" and "mask" in options:
        pytest.skip("splash stores the tiles of a small mask")
    with pytest.raises(ValueError, match="cannot honour this call") as error:
        mf.dot_product_attention(half, half, half, implementation=implementation, **options)
    explanation = mf.explain(options.get("mask"), half, half, half, implementation=implementation,
                             **{name: value for name, value in options.items() if name != "mask"})  # fmt: skip
    assert explanation.backend is None
    assert explanation.why == str(error.value)


@pytest.mark.parametrize("length", [16, 256, 257, 300])
@pytest.mark.parametrize("implementation", [None, "reference", "blockwise"])
def test_explain_names_the_backend_that_runs(length, implementation):
    q = jnp.ones((1, length, 1, 8))
    with dispatch.recorded() as choices:
        attend = lambda q: mf.dot_product_attention(q, q, q, mask=masks.causal(), implementation=implementation)
        jax.eval_shape(attend, q)
    explanation = mf.explain(masks.causal(), q, q, q, implementation=implementation)
    assert [choice.backend for choice in choices] == [explanation.backend]
    assert explanation.passed_over == choices[0].passed_over


def test_a_backend_named_on_another_platform_than_its_own_is_explained_as_such():
    explanation = mf.explain(masks.causal(), LONG, LONG, LONG, implementation="splash")
    assert explanation.why == "asked for by name; it is a TPU kernel and the platform is cpu"


def test_long_sequences_take_blockwise_and_the_figures_follow_the_mask():
    causal = mf.explain(masks.causal(), LONG, LONG, LONG)
    window = mf.explain(masks.causal() & masks.sliding_window(256), LONG, LONG, LONG)
    assert causal.backend == window.backend == "blockwise"
    assert 0.5 < causal.density < 0.55
    assert window.band == 3 and causal.band is None
    assert window.density == 3 * 128 / LONG.shape[1]
    assert window.active_flops < causal.active_flops < causal.dense_flops == 4 * 8192**2 * 4 * 64
    assert "dense, and 8192 x 8192 logits" in str(causal)


def test_a_traced_mask_is_explained_as_traced():
    found = []
    jax.eval_shape(
        lambda ids: found.append(mf.explain(masks.segments(ids), LONG, LONG, LONG)),
        jax.ShapeDtypeStruct((1, 8192), jnp.int32),
    )
    assert found[0].density is None
    assert "known at run time" in str(found[0])


def test_explain_takes_shapes_in_the_place_of_arrays():
    shape = jax.ShapeDtypeStruct
    options = dict(bias=shape((8192, 8192), jnp.float32), q_offset=shape((), jnp.int32))
    options["sink_logits"] = shape((4,), jnp.float32)
    options |= dict(dropout_rate=0.1, dropout_key=jax.eval_shape(lambda: jax.random.key(0)))
    mask = jax.eval_shape(lambda: masks.causal() & masks.segments(jnp.zeros((1, 16384), int)))
    found = mf.explain(mask, LONG, LONG, LONG, **options)
    assert found.backend == "blockwise" and found.density is None
    assert mf.explain(masks.sinks(512), LONG, LONG, LONG, sink_logits=options["sink_logits"]).density == 512 / 8192


def test_a_tpu_platform_takes_splash_and_falls_back_with_a_reason():
    with platform.assume("tpu"):
        plain = mf.explain(masks.causal(), LONG, LONG, LONG)
        biased = mf.explain(masks.causal(), LONG, LONG, LONG, dropout_rate=0.1, dropout_key=0)
    assert plain.backend == "splash"
    assert biased.backend == "blockwise"
    assert biased.passed_over["splash"] == "the kernel has no dropout"


def test_an_empty_axis_gives_empty_or_zero_output():
    q, k = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 0, 2, 8))
    assert mf.dot_product_attention(q, k, k).sum() == 0
    assert mf.dot_product_attention(k, q, q).shape == (1, 0, 2, 8)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_a_predicate_may_close_over_what_a_scan_or_a_gradient_traces(implementation):
    ids = jnp.arange(32).reshape(2, 16) // jnp.array([[3], [5]])
    query = jax.random.normal(jax.random.key(0), SHORT.shape)

    def loss(query, reach, close):
        def layer(carry, ids):
            mask = close(ids, reach) & masks.causal()
            return mf.dot_product_attention(carry, query, query, mask=mask, implementation=implementation), None

        return (jax.lax.scan(layer, query, ids)[0] ** 2).sum()

    closed = lambda ids, reach: masks.predicate(lambda q, k: (ids[q] == ids[k]) & (q - k < reach))
    given = lambda ids, reach: masks.segments(ids) & masks.sliding_window(3)
    gradients = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    actual, expected = gradients(query, 3.5, closed), gradients(query, 3.5, given)
    np.testing.assert_allclose(actual[0], expected[0], atol=1e-5)
    assert actual[1] == 0.0
