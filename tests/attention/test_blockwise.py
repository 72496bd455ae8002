"""What blockwise attention does not do: visit excluded tiles, recompile for a packing, or grow with T^2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskformer as mf
from maskformer import masks
from tests.attention import cases, oracle


def test_excluded_tiles_are_never_read_in_either_pass(tiny_tiles):
    q, k, v, d_output = cases.arrays(q_len=32, kv_len=32)
    # The second half of the keys is out of the first queries' sight; NaN there would poison any tile that reads it.
    mask = masks.predicate(lambda q, k: (q < 16) & (k < 16))
    poisoned_k, poisoned_v = (x.at[:, 16:].set(jnp.nan) for x in (k, v))
    poisoned_q = q.at[:, 16:].set(jnp.nan)
    attend = jax.jit(lambda *a: mf.dot_product_attention(*a, mask=mask, implementation="blockwise"))
    output, pull_back = jax.vjp(attend, poisoned_q, poisoned_k, poisoned_v)
    gradients = pull_back(d_output)
    assert np.isfinite(np.asarray(output)).all()
    assert all(np.isfinite(np.asarray(gradient)).all() for gradient in gradients)
    assert (np.asarray(output)[:, 16:] == 0).all()


@pytest.mark.parametrize("mask", [masks.causal(), masks.sliding_window(5)], ids=str)
def test_what_a_bias_or_score_mod_makes_infinite_or_nan_is_as_in_the_reference(tiny_tiles, mask):
    q, k, v, d_output = cases.arrays()
    bias = jnp.zeros((cases.Q_LEN, cases.KV_LEN)).at[3].set(-jnp.inf).at[20, :18].set(-jnp.inf)
    # NaN above the diagonal, where nothing attends.
    decay = lambda score, b, h, q, k: score - jnp.log1p((q - k).astype(jnp.float32))

    def results(implementation, **options):
        attend = lambda *a: mf.dot_product_attention(*a, mask=mask, implementation=implementation, **options)
        output, pull_back = jax.vjp(jax.jit(attend), q, k, v)
        return output, *pull_back(d_output)

    for options in (dict(bias=bias), dict(score_mod=decay)):
        found, expected = results("blockwise", **options), results("reference", **options)
        assert np.isfinite(np.asarray(expected[0])).all()
        for what, actual, plain in zip(("output", "d query", "d key", "d value"), found, expected):
            np.testing.assert_allclose(actual, plain, atol=5e-6, err_msg=f"{what} {options.keys()}")
    assert (np.asarray(results("blockwise", bias=bias)[0][:, 3]) == 0).all()


def test_a_thousand_packings_share_one_compilation(tiny_tiles):
    q, k, v, d_output = cases.arrays(batch=1, q_len=32, kv_len=32, heads=1, kv_heads=1)
    traces = 0

    @jax.jit
    def step(q, k, v, ids):
        nonlocal traces
        traces += 1
        mask = masks.causal() & masks.segments(ids)
        loss = lambda *a: (mf.dot_product_attention(*a, mask=mask, implementation="blockwise") * d_output).sum()
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    random = np.random.default_rng(0)
    for round_number in range(1000):
        ids = np.sort(random.integers(0, random.integers(1, 9), (1, 32))).astype(np.int32)
        found = step(q, k, v, ids)
        if round_number % 250 == 0:
            causal = np.tril(np.ones((32, 32), bool))
            expected = oracle.attention(q, k, v, causal & (ids[0][:, None] == ids[0]), d_output=d_output)
            np.testing.assert_allclose(found[1][0], expected.gradients["query"], atol=5e-6)
    assert traces == 1


def test_sequences_decoded_together_may_each_stand_at_a_position_of_their_own(tiny_tiles):
    q, k, v, _ = cases.arrays(q_len=3, kv_len=45)
    mask = masks.causal() & masks.sliding_window(9)

    def loss(implementation, q, k, v, position):
        options = dict(mask=mask, q_offset=position, implementation=implementation)
        output = mf.dot_product_attention(q[None], k[None], v[None], **options)[0]
        return (output**2).sum(), output

    def mapped(implementation, position, axis):
        step = jax.grad(functools.partial(loss, implementation), argnums=(0, 1, 2), has_aux=True)
        return jax.jit(jax.vmap(step, in_axes=(0, 0, 0, axis)))(q, k, v, position)

    for position, axis in ((jnp.array([4, 41]), 0), (jnp.int32(17), None)):
        found, dense = mapped("blockwise", position, axis), mapped("reference", position, axis)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), found, dense)


def test_temporary_memory_grows_with_the_length_not_its_square():
    def temporary(length):
        shapes = [jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)] * 3
        mask = masks.causal() & masks.sliding_window(64)
        loss = lambda *a: mf.dot_product_attention(*a, mask=mask, implementation="blockwise").sum()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(4096), temporary(16384)
    assert long < 5 * short
    assert long < 16384**2  # not even one byte per logit


def test_a_bias_that_nobody_differentiates_costs_no_gradient():
    q, k, v, _ = cases.arrays()
    bias = jnp.zeros((1, 1, cases.Q_LEN, cases.KV_LEN))

    def jaxpr(wanted):
        loss = lambda q, bias: mf.dot_product_attention(q, k, v, bias=bias, implementation="blockwise").sum()
        return str(jax.make_jaxpr(jax.grad(loss, argnums=wanted))(q, bias))

    # The gradient is accumulated tile by tile into an array like the bias; without it, no loop carries one.
    updates = [jaxpr(wanted).count("dynamic_update_slice") for wanted in ((0,), (0, 1))]
    assert updates[0] < updates[1]


def test_dropout_drops_the_same_entries_in_both_passes(tiny_tiles):
    q, k, v, d_output = cases.arrays()
    attend = lambda v: mf.dot_product_attention(
        q, k, v, mask=masks.causal(), dropout_rate=0.4, dropout_key=jax.random.key(5), implementation="blockwise"
    )
    # The output is linear in the values: output = A v, so <g, A v> = <A^T g, v> only if A is the same both ways.
    output, pull_back = jax.vjp(jax.jit(attend), v)
    (d_value,) = pull_back(d_output)
    np.testing.assert_allclose((output * d_output).sum(), (d_value * v).sum(), rtol=1e-5)


def test_dropout_does_not_depend_on_tiles_chunks_or_backend(tiny_tiles, monkeypatch):
    from maskformer.attention import blocks

    q, k, v, _ = cases.arrays()
    options = dict(mask=masks.causal(), dropout_rate=0.4, dropout_key=jax.random.key(5))

    def attend(implementation, q=q, start=0):
        run = lambda q: mf.dot_product_attention(q, k, v, q_offset=start, implementation=implementation, **options)
        return jax.jit(run)(q)

    small = attend("blockwise")
    chunks = [attend("blockwise", q[:, :20]), attend("blockwise", q[:, 20:], 20)]
    monkeypatch.setattr(blocks, "LIST_COST", {24: 1.0})
    monkeypatch.setattr(blocks, "BAND_COST", {24: 1.0})
    large, dense = attend("blockwise"), attend("reference")
    for other in (large, dense, jnp.concatenate(chunks, axis=1)):
        np.testing.assert_allclose(small, other, atol=2e-6)


def test_a_traced_offset_serves_every_decoding_step_with_one_compilation(tiny_tiles):
    q, k, v, _ = cases.arrays(q_len=24, kv_len=24)
    traces = 0

    @jax.jit
    def decode(one, position):
        nonlocal traces
        traces += 1
        return mf.dot_product_attention(one, k, v, mask=masks.causal(), q_offset=position, implementation="blockwise")

    steps = [decode(q[:, i : i + 1], jnp.int32(i)) for i in range(24)]
    whole = mf.dot_product_attention(q, k, v, mask=masks.causal(), implementation="reference")
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, atol=2e-6)
    assert traces == 1
