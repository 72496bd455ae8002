"""The splash adapter's numerics in Pallas' TPU interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskformer as mf
from maskformer import masks
from maskformer.attention import splash
from tests.attention import cases, oracle

pltpu = pytest.importorskip("jax.experimental.pallas.tpu")

Q_LEN, KV_LEN = 200, 300
IDS = np.repeat(np.array([[0, 1, 2, 3]]), 100, axis=1).astype(np.int32)
Q, K = np.arange(Q_LEN)[:, None], np.arange(KV_LEN)[None]

CASES = {
    "none": (None, True, {}),
    "window with a soft cap": (masks.sliding_window(5), (Q - K <= 5) & (K <= Q), dict(logits_soft_cap=3.0)),
    "packed": (
        masks.causal() & masks.segments(jnp.asarray(IDS)),
        (K <= Q) & (IDS[0, :Q_LEN, None] == IDS[0, None, :KV_LEN]),
        {},
    ),
    "lengths, one of them zero": (
        masks.causal() & masks.key_padding(lengths=jnp.array([0, 25])),
        np.stack([(K <= Q) & (K < n) for n in (0, 25)])[:, None],
        {},
    ),
    "per head": (
        masks.per_head([masks.causal(), masks.sliding_window(5), masks.everything(), masks.nothing()]),
        np.stack([K <= Q, (Q - K <= 5) & (K <= Q), (Q >= 0) & (K >= 0), (Q < 0) & (K < 0)])[None],
        {},
    ),
    "prefix or causal, stored": (
        masks.causal() | masks.prefix(lengths=jnp.array([10, 150])),
        np.stack([(K <= Q) | ((K < n) & (Q < n)) for n in (10, 150)])[:, None],
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_splash_equals_the_oracle_in_value_and_gradient(monkeypatch, name):
    monkeypatch.setattr(splash, "BLOCK", 128)
    mask, attends, options = CASES[name]
    q, k, v, d_output = cases.arrays(q_len=Q_LEN, kv_len=KV_LEN, dim=64, value=32)
    sink_logits = jnp.array([0.5, -1.0, 2.0, 0.0])
    d_residual = jax.random.normal(jax.random.key(1), q.shape[:3])

    @jax.jit
    def step(q, k, v, sink_logits, mask):
        attend = lambda *a: mf.dot_product_attention(
            *a[:3], mask=mask, sink_logits=a[3], implementation="splash", return_residual=True, **options
        )
        results, pull_back = jax.vjp(attend, q, k, v, sink_logits)
        return results, pull_back((d_output, d_residual))

    with pltpu.force_tpu_interpret_mode():
        (output, residual), found = step(q, k, v, sink_logits, mask)
    expected = oracle.attention(
        q, k, v, attends, sink_logits=sink_logits, soft_cap=options.get("logits_soft_cap"),
        d_output=d_output, d_residual=d_residual,
    )
    assert oracle.error(output, expected.output) < 1e-6
    assert oracle.error(residual, expected.residual) < 1e-6
    for what, actual in zip(("query", "key", "value", "sink_logits"), found):
        size = np.sqrt(np.mean(expected.gradients[what] ** 2))
        assert oracle.error(actual, expected.gradients[what]) < 2e-6 * max(size, 1), what


def test_splash_in_half_precision_is_as_good_as_the_dense_reference(monkeypatch):
    monkeypatch.setattr(splash, "BLOCK", 128)
    mask, attends, _ = CASES["packed"]
    q, k, v, d_output = cases.arrays(jnp.bfloat16, q_len=Q_LEN, kv_len=KV_LEN, dim=64, value=32)

    def results(implementation):
        @jax.jit
        def step(q, k, v, mask):
            attend = lambda *a: mf.dot_product_attention(*a, mask=mask, implementation=implementation)
            output, pull_back = jax.vjp(attend, q, k, v)
            return output, *pull_back(d_output)

        return [np.asarray(x.astype(jnp.float32)) for x in step(q, k, v, mask)]

    dense = results("reference")
    with pltpu.force_tpu_interpret_mode():
        found = results("splash")
    exact = oracle.attention(*(np.asarray(x.astype(jnp.float32)) for x in (q, k, v)), attends, d_output=d_output)
    goldens = [exact.output, *(exact.gradients[name] for name in ("query", "key", "value"))]
    for what, actual, plain, golden in zip(("output", "d query", "d key", "d value"), found, dense, goldens):
        if what == "d query":
            # The kernel's rowsum(dO * O) sees an output already rounded to half precision: 1.11 of the dense error.
            assert oracle.error(actual, golden) <= 1.12 * oracle.error(plain, golden)
        else:
            oracle.assert_as_good(actual, plain, golden, dtype=jnp.bfloat16, what=what)


@pytest.mark.parametrize("name", ["packed", "window with a soft cap"])
def test_queries_from_a_traced_position_are_their_part_of_the_whole(monkeypatch, name):
    """What a device does whose queries are a shard of the sequence and whose keys are gathered."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    mask, attends, options = CASES[name]
    q, k, v, d_output = cases.arrays(q_len=Q_LEN, kv_len=KV_LEN, dim=64, value=32)
    start, stop = 70, 170

    @jax.jit
    def step(q, k, v, q_offset):
        attend = lambda *a: mf.dot_product_attention(
            *a, mask=mask, q_offset=q_offset, implementation="splash", **options
        )
        output, pull_back = jax.vjp(attend, q, k, v)
        return output, *pull_back(d_output[:, start:stop])

    with pltpu.force_tpu_interpret_mode():
        output, d_query, d_key, d_value = step(q[:, start:stop], k, v, jnp.int32(start))
    inside = (Q >= start) & (Q < stop)
    expected = oracle.attention(
        q, k, v, attends & inside, soft_cap=options.get("logits_soft_cap"), d_output=d_output * inside[None, :, :, None]
    )
    assert oracle.error(output, expected.output[:, start:stop]) < 1e-6
    assert oracle.error(d_query, expected.gradients["query"][:, start:stop]) < 2e-6
    assert oracle.error(d_key, expected.gradients["key"]) < 2e-6
    assert oracle.error(d_value, expected.gradients["value"]) < 2e-6


def test_splash_visits_only_the_tiles_of_the_block_map():
    block_map = (masks.causal() & masks.sliding_window(100)).block_map(1024, 1024, 128)
    tiles = splash.grid(block_map.partial, block_map.full, block_map.grid[1])
    assert tiles.block.shape[-1] == 2  # the widest row: the diagonal tile and the one before it
    assert (tiles.kind > 0).sum() == 8 + 7


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(bias=jnp.zeros((1, 1, 1, 8))), "no bias"),
        (dict(score_mod=lambda score, b, h, q, k: score), "no score_mod"),
        (dict(dropout_rate=0.1, dropout_key=0), "no dropout"),
    ],
    ids=["bias", "score_mod", "dropout"],
)
def test_splash_refuses_what_its_kernel_cannot_do(options, reason):
    q = jnp.zeros((1, 8, 1, 8))
    with pytest.raises(ValueError, match=reason):
        mf.dot_product_attention(q, q, q, implementation="splash", **options)


def test_splash_refuses_to_store_a_mask_of_quadratic_size():
    q = jax.ShapeDtypeStruct((1, 2**17, 1, 8), jnp.bfloat16)
    found = []
    jax.eval_shape(
        lambda ids: found.append(
            mf.explain(masks.segments(ids) | masks.sliding_window(5), q, q, q, implementation="splash")
        ),
        jax.ShapeDtypeStruct((1, 2**17), jnp.int32),
    )
    assert found[0].backend is None
    assert "would be stored" in found[0].why
