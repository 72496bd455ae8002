"""Every mask on every backend against the float64 oracle: values, gradients and transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskformer as mf
from maskformer import masks
from tests.attention import cases, oracle


def run(mask, implementation, dtype=jnp.float32, query=None, **options):
    """Output, logsumexp and the three gradients, of one jitted call."""
    q, k, v, d_output = cases.arrays(dtype)
    d_residual = jax.random.normal(jax.random.key(1), q.shape[:3])

    @jax.jit
    def step(q, k, v, mask):
        def attend(q, k, v):
            return mf.dot_product_attention(
                q, k, v, mask=mask, implementation=implementation, return_residual=True, **options
            )

        (output, residual), pull_back = jax.vjp(attend, q, k, v)
        return output, residual, *pull_back((d_output, d_residual))

    golden_arguments = (q, k, v), dict(d_output=d_output, d_residual=d_residual)
    return step(q, k, v, mask), golden_arguments


def golden(arguments, attends, **options):
    positional, keywords = arguments
    result = oracle.attention(
        *(np.asarray(x.astype(jnp.float32)) for x in positional),
        attends,
        **{name: np.asarray(x.astype(jnp.float32)) for name, x in keywords.items()},
        **options,
    )
    return [result.output, result.residual, *(result.gradients[name] for name in ("query", "key", "value"))]


NAMES = ("output", "logsumexp", "d query", "d key", "d value")


@pytest.mark.parametrize("name", cases.CASES)
def test_reference_equals_the_float64_oracle(name):
    build, attends = cases.CASES[name]
    found, arguments = run(build(), "reference")
    for what, actual, expected in zip(NAMES, found, golden(arguments, attends)):
        size = np.sqrt(np.mean(np.square(expected[np.isfinite(expected)]))) if np.isfinite(expected).any() else 0
        assert oracle.error(actual, expected) <= 4e-7 * max(size, 1e-3), what


@pytest.mark.parametrize("name", cases.CASES)
def test_blockwise_is_as_good_as_the_dense_reference(tiny_tiles, name):
    build, attends = cases.CASES[name]
    found, arguments = run(build(), "blockwise")
    dense, _ = run(build(), "reference")
    for what, actual, plain, expected in zip(NAMES, found, dense, golden(arguments, attends)):
        oracle.assert_as_good(actual, plain, expected, what=what)


@pytest.mark.parametrize("name", ["causal", "packed"])
def test_blockwise_in_half_precision_is_as_good_as_the_dense_reference(tiny_tiles, name):
    build, attends = cases.CASES[name]
    found, arguments = run(build(), "blockwise", jnp.bfloat16)
    dense, _ = run(build(), "reference", jnp.bfloat16)
    for what, actual, plain, expected in zip(NAMES, found, dense, golden(arguments, attends)):
        to_float = [np.asarray(x.astype(jnp.float32)) for x in (actual, plain)]
        oracle.assert_as_good(*to_float, expected, dtype=np.float32 if what == "logsumexp" else jnp.bfloat16, what=what)


@pytest.mark.parametrize("name", ["per head", "window with empty rows"])
def test_blockwise_in_double_precision_equals_the_float64_oracle(tiny_tiles, name):
    build, attends = cases.CASES[name]
    with jax.enable_x64(True):
        found, (arrays, given) = run(build(), "blockwise", jnp.float64)
        exact = oracle.attention(*arrays, attends, **given)
        expected = [exact.output, exact.residual, *(exact.gradients[name] for name in ("query", "key", "value"))]
        for what, actual, golden in zip(NAMES, found, expected):
            assert actual.dtype == jnp.float64, what
            np.testing.assert_allclose(actual, golden, rtol=1e-12, atol=1e-12, err_msg=what)


def test_half_precision_gradients_that_sum_over_rows_are_as_good_as_the_dense_reference(tiny_tiles):
    """Those of a bias, a score_mod's arrays, sink_logits and the scale: what is summed nearly cancels."""
    mask, attends = masks.causal(), cases.CASES["causal"][1]
    q, k, v, d_output = cases.arrays(jnp.bfloat16)
    bias, table = jnp.zeros((cases.HEADS, 1, 1), jnp.float32), jnp.zeros((cases.HEADS, 9), jnp.float32)

    def gradients(implementation):
        def loss(bias, table, scale):
            output = mf.dot_product_attention(
                q, k, v, mask=mask, bias=bias, scale=scale, implementation=implementation,
                score_mod=mf.attention.score_mods.relative_bias(table),
            )  # fmt: skip
            return (output.astype(jnp.float32) * d_output.astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(bias, table, jnp.float32(0.25))

    exact = oracle.attention(*(np.asarray(x, np.float32) for x in (q, k, v)), attends, scale=0.25,
                             d_output=np.asarray(d_output, np.float32))  # fmt: skip
    d_logits = exact.gradients["logits"]
    dots = np.einsum("bqhd,bkhd->bhqk", *(np.asarray(x, np.float64) for x in (q, np.repeat(k, 2, axis=2))))
    d_table = np.zeros(table.shape)
    for head in range(cases.HEADS):
        np.add.at(d_table[head], np.clip(cases.K - cases.Q, -4, 4) + 4, d_logits[:, head].sum(0))
    d_bias, *found = (np.asarray(x) for x in gradients("blockwise"))
    assert np.abs(d_bias).max() < 1e-5  # a constant for all keys changes nothing
    goldens = d_table, (d_logits * dots).sum()
    for what, actual, plain, golden in zip(("table", "scale"), found, gradients("reference")[1:], goldens):
        oracle.assert_as_good(actual, np.asarray(plain), golden, dtype=jnp.bfloat16, what=what)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("name", ["lengths, one of them zero", "empty first rows", "window with empty rows", "nothing"])
def test_empty_row_gives_zero_output_and_zero_gradient(tiny_tiles, implementation, name):
    build, attends = cases.CASES[name]
    (output, residual, *gradients), _ = run(build(), implementation)
    shape = (cases.BATCH, cases.HEADS, cases.Q_LEN, cases.KV_LEN)
    empty = ~np.broadcast_to(attends, shape).any(-1).transpose(0, 2, 1)
    assert empty.any()
    assert (np.asarray(output)[empty] == 0).all()
    assert (np.asarray(residual)[empty] == -np.inf).all()
    assert (np.asarray(gradients[0])[empty] == 0).all()
    assert all(np.isfinite(np.asarray(gradient)).all() for gradient in gradients)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_every_option_at_once_equals_the_oracle_in_value_and_gradient(tiny_tiles, implementation):
    rate, cap, offset = 0.3, 5.0, 3
    q, k, v, d_output = cases.arrays()
    table = jax.random.normal(jax.random.key(2), (cases.HEADS, 9))
    bias = jax.random.normal(jax.random.key(3), (cases.BATCH, 1, 1, cases.KV_LEN))
    sink_logits = jnp.array([0.5, -1.0, 2.0, 0.0])
    key = jax.random.key(4)

    def attend(q, k, v, bias, table, sink_logits, scale):
        return mf.dot_product_attention(
            q, k, v,
            mask=masks.causal() & masks.key_padding(lengths=jnp.asarray(cases.LENGTHS)),
            bias=bias, score_mod=mf.attention.score_mods.relative_bias(table), sink_logits=sink_logits, scale=scale,
            logits_soft_cap=cap, dropout_rate=rate, dropout_key=key, q_offset=offset,
            implementation=implementation,
        )  # fmt: skip

    scale = jnp.float32(0.3)
    output, pull_back = jax.vjp(jax.jit(attend), q, k, v, bias, table, sink_logits, scale)
    found = pull_back(d_output)

    # The kept entries, read off a call whose values are the identity: every weight becomes visible.
    shape = (cases.BATCH, cases.KV_LEN, cases.KV_HEADS, cases.KV_LEN)
    identity = jnp.broadcast_to(jnp.eye(cases.KV_LEN)[:, None], shape)
    weights = mf.dot_product_attention(
        q, k, identity, dropout_rate=rate, dropout_key=key, q_offset=offset, implementation="reference"
    )
    keep = np.asarray(weights).transpose(0, 2, 1, 3) > 0
    assert abs(keep.mean() - (1 - rate)) < 0.02

    offsets = np.clip(cases.K - cases.Q - offset, -4, 4) + 4
    added = np.asarray(bias, np.float64) + np.asarray(table, np.float64)[:, offsets][None]
    attends = by_rows = np.stack([(cases.K <= cases.Q + offset) & (cases.K < n) for n in cases.LENGTHS])[:, None]
    expected = oracle.attention(
        q, k, v, by_rows, scale=0.3, bias=added, sink_logits=sink_logits, soft_cap=cap, keep=keep, rate=rate,
        d_output=d_output,
    )
    d_logits = expected.gradients["logits"]
    d_table = np.zeros((cases.HEADS, 9))
    for head in range(cases.HEADS):
        np.add.at(d_table[head], offsets, d_logits[:, head].sum(0))
    dots = np.einsum("bqhd,bkhd->bhqk", np.asarray(q, np.float64), np.repeat(np.asarray(k, np.float64), 2, axis=2))
    goldens = {
        "query": expected.gradients["query"],
        "key": expected.gradients["key"],
        "value": expected.gradients["value"],
        "bias": d_logits.sum((1, 2), keepdims=True),
        "table": d_table,
        "sink_logits": expected.gradients["sink_logits"],
        "scale": (d_logits * dots).sum(),
    }
    assert attends.any()
    np.testing.assert_allclose(output, expected.output, atol=2e-6)
    for (name, value), actual in zip(goldens.items(), found):
        np.testing.assert_allclose(actual, value, atol=2e-5 if name in ("table", "scale") else 5e-6, err_msg=name)


@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 45), (37, 1), (9, 8)], ids=lambda lengths: "x".join(map(str, lengths))
)
def test_short_and_odd_lengths_equal_the_oracle(tiny_tiles, lengths):
    q, k, v, d_output = cases.arrays(q_len=lengths[0], kv_len=lengths[1])
    for mask, attends in ((None, True), (masks.causal(), np.arange(lengths[1]) <= np.arange(lengths[0])[:, None])):
        attend = jax.jit(lambda *a, mask=mask: mf.dot_product_attention(*a, mask=mask, implementation="blockwise"))
        output, pull_back = jax.vjp(attend, q, k, v)
        expected = oracle.attention(q, k, v, attends, d_output=d_output)
        np.testing.assert_allclose(output, expected.output, atol=2e-6)
        for name, actual in zip(("query", "key", "value"), pull_back(d_output)):
            np.testing.assert_allclose(actual, expected.gradients[name], atol=5e-6, err_msg=name)


def transformed(mask, implementation, arrays, d_output):
    """Output and gradients of two calls at once, each rematerialised inside a scan: [2, ...]."""

    def one(q, k, v, d_output):
        @jax.checkpoint
        def attend(q, k, v):
            return mf.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

        def loss(q, k, v):
            # Two rounds of the scan, the second half as heavy: gradients add up to those of one call.
            outputs = jax.lax.scan(lambda _, scale: (_, scale * attend(q, k, v)), 0, jnp.array([2 / 3, 1 / 3]))[1]
            return (outputs.sum(0) * d_output).sum(), outputs.sum(0)

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (_, output), gradients = jax.jit(jax.vmap(one))(*arrays, d_output)
    return output, *gradients


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("name", cases.CASES)
def test_vmap_scan_and_remat_together_equal_the_float64_oracle(tiny_tiles, implementation, name):
    build, attends = cases.CASES[name]
    *arrays, d_output = (jnp.stack([x, x[::-1] * 0.5]) for x in cases.arrays())
    found = transformed(build(), implementation, arrays, d_output)
    for entry in range(2):
        given = ([x[entry] for x in arrays], dict(d_output=d_output[entry]))
        expected = golden(given, attends)
        del expected[1]
        for what, actual, exact in zip(("output", "d query", "d key", "d value"), found, expected):
            np.testing.assert_allclose(actual[entry], exact, rtol=1e-5, atol=5e-6, err_msg=what)


def test_vmap_over_arrays_and_masks_equals_a_loop(tiny_tiles):
    q, k, v, d_output = (jnp.stack([x, x[::-1] * 0.5, -x]) for x in cases.arrays())
    ids = jnp.stack([jnp.asarray(cases.SEGMENTS) // divisor for divisor in (1, 2, 3)])

    def loss(implementation):
        def one(q, k, v, d_output, ids):
            mask = masks.causal() & masks.segments(ids)
            return (mf.dot_product_attention(q, k, v, mask=mask, implementation=implementation) * d_output).sum()

        return jax.value_and_grad(one, argnums=(0, 1, 2))

    found = jax.jit(jax.vmap(loss("blockwise")))(q, k, v, d_output, ids)
    looped = [jax.jit(loss("reference"))(*(x[i] for x in (q, k, v, d_output, ids))) for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *looped)
    for actual, expected in zip(jax.tree.leaves(found), jax.tree.leaves(stacked)):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=5e-6)


def test_a_mapped_mask_is_computed_an_entry_at_a_time_and_a_common_one_at_once(tiny_tiles):
    """Mapped together, every entry would run the loops of the longest and every branch."""
    q = jnp.zeros((7, 1, 32, 1, 8))
    call = lambda q, mask: mf.dot_product_attention(q, q, q, mask=mask, implementation="blockwise")
    attend = lambda q, ids: call(q, masks.segments(ids)).sum()
    for pass_ in (attend, jax.grad(attend)):
        mapped = str(jax.make_jaxpr(jax.vmap(pass_))(q, jnp.zeros((7, 32), jnp.int32)))
        common = str(jax.make_jaxpr(jax.vmap(pass_, (0, None)))(q, jnp.zeros(32, jnp.int32)))
        assert "length=7" in mapped and "length=7" not in common
