"""What we ask of the GPU libraries: their own XLA implementations of the same calls against the float64 oracle."""

import absl.flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskformer as mf
from maskformer import masks
from maskformer.attention import Placement, cudnn, intervals, tokamax
from tests.attention import cases, transforms

pytestmark = pytest.mark.usefixtures("quick_compilation")
DENSE = transforms.attention("reference", residual=False)
EVEN, ODD, UNEQUAL = (44, 44), (45, 45), (37, 45)


def grid(lengths):
    return np.arange(lengths[0])[:, None], np.arange(lengths[1])


def some_lengths(lengths, numbers, causal=False):
    q, k = grid(lengths)
    return cases.by_batch([(k < n) & (q >= 0) & ((k <= q) | (not causal)) for n in numbers])


def segments_of(lengths, causal):
    q, k = grid(lengths)
    rows = [row[: lengths[0], None] == row[: lengths[1]] for row in cases.SEGMENTS]
    return cases.by_batch([row & ((k <= q) | (not causal)) for row in rows])


# For each mask: how it is built, its matrix, and the lengths of queries and keys.
BOTH = {
    "none": (lambda: None, True, UNEQUAL),
    "causal": (masks.causal, np.tri(45, dtype=bool), ODD),
    "causal, even lengths": (masks.causal, np.tri(44, dtype=bool), EVEN),
    "causal window": (
        lambda: masks.causal() & masks.sliding_window(6),
        np.tri(45, dtype=bool) & ~np.tri(45, k=-7, dtype=bool),
        ODD,
    ),
    "lengths, one of them zero": (
        lambda: masks.key_padding(lengths=jnp.asarray(cases.LENGTHS)),
        some_lengths(UNEQUAL, cases.LENGTHS),
        UNEQUAL,
    ),
    "causal lengths": (
        lambda: masks.causal() & masks.key_padding(lengths=jnp.asarray(cases.LENGTHS)),
        some_lengths(ODD, cases.LENGTHS, causal=True),
        ODD,
    ),
    "lengths beyond the keys, with an axis for heads": (
        lambda: masks.key_padding(lengths=jnp.array([[-3], [99]])),
        some_lengths(UNEQUAL, (0, 45)),
        UNEQUAL,
    ),
}
RUNS = {
    "bidirectional window": (lambda: masks.sliding_window(3, 5), cases.CASES["bidirectional window"][1], UNEQUAL),
    "window to the left of later queries": (
        lambda: masks.sliding_window(6, 2**31 - 1),
        (grid((45, 37))[0] - grid((45, 37))[1]) <= 6,
        (45, 37),
    ),
    "causal, fewer keys than queries": (masks.causal, np.tri(45, 37, dtype=bool), (45, 37)),
    "packed": (
        lambda: masks.causal() & masks.segments(jnp.asarray(cases.SEGMENTS)),
        segments_of(UNEQUAL, causal=True),
        UNEQUAL,
    ),
    "documents": (
        lambda: masks.causal() & masks.documents(jnp.asarray(cases.SEGMENTS)),
        segments_of(UNEQUAL, causal=True),
        UNEQUAL,
    ),
    "packed, bidirectional, padding and an axis for heads": (
        lambda: masks.segments(jnp.asarray(cases.SEGMENTS)[:, None], padding=1),
        segments_of(UNEQUAL, causal=False) & (cases.SEGMENTS[:, None, : UNEQUAL[0], None] != 1),
        UNEQUAL,
    ),
    "nowhere a key": (
        lambda: masks.sliding_window(3) & masks.key_padding(lengths=jnp.array([0, 5])),
        some_lengths(UNEQUAL, (0, 5)) & cases.CASES["bidirectional window"][1] & (cases.K <= cases.Q),
        UNEQUAL,
    ),
}
CALLS = [("cudnn", name) for name in BOTH] + [("tokamax", name) for name in (*BOTH, *RUNS)]


@pytest.fixture
def on_cpu(monkeypatch):
    """Backends that compute by XLA, in float32; tokamax needs the extra [gpu]."""
    monkeypatch.setattr(cudnn, "KERNEL", "xla")
    monkeypatch.setattr(tokamax, "KERNEL", "xla")
    monkeypatch.setattr(intervals, "tensor_cores", lambda call, capability: None)

    def backend(name, **options):
        if name == "tokamax":
            pytest.importorskip("tokamax", reason="needs the extra [gpu]")
            if not absl.flags.FLAGS.is_parsed():
                absl.flags.FLAGS(["test"])  # tokamax reads flags that nobody has parsed
        return transforms.attention(name, residual=False, **options)

    return backend


def known(call, mask, name):
    """The call with its mask as a constant, where it is of traced segment ids, whose runs are not known."""
    return (lambda nothing, *arrays: call(mask, *arrays)) if name.startswith("packed") else call


def case(name):
    build, attends, (q_len, kv_len) = {**BOTH, **RUNS}[name]
    return build(), attends, dict(q_len=q_len, kv_len=kv_len, value=cases.HEAD_DIM)


def check(call, mask, attends, arrays, **options):
    given = transforms.cotangents(arrays)
    found = transforms.plain(call, mask, arrays, given)
    expected = transforms.golden(arrays, attends, given, **options)
    transforms.assert_as_good(found, transforms.plain(DENSE, mask, arrays, given), expected, residual=False)
    return found


@pytest.mark.parametrize("backend, name", CALLS)
def test_what_is_asked_of_a_gpu_library_is_the_mask_in_value_and_gradient(on_cpu, backend, name):
    mask, attends, sizes = case(name)
    call = on_cpu(backend)
    found = check(known(call, mask, name), mask, attends, cases.arrays(**sizes)[:3])
    full = np.broadcast_to(attends, (cases.BATCH, cases.HEADS, sizes["q_len"], sizes["kv_len"]))
    if not full.any(-1).all():
        transforms.assert_empty_rows_are_exact([found[0], np.full(found[0].shape[:3], -np.inf), found[2]], attends)


@pytest.mark.parametrize("backend, name", CALLS)
def test_what_is_asked_of_a_gpu_library_stands_under_vmap_scan_and_remat(on_cpu, backend, name):
    mask, attends, sizes = case(name)
    arrays = transforms.mapped(**sizes)
    given = transforms.cotangents(arrays)
    call = on_cpu(backend)
    found = transforms.transformed(known(call, mask, name), mask, arrays, given)
    dense = transforms.transformed(DENSE, mask, arrays, given)
    for entry in range(2):
        here = lambda tree, entry=entry: [x[entry] for x in tree]
        expected = transforms.golden(here(arrays), attends, here(given))
        transforms.assert_as_good(here(found), here(dense), expected, residual=False)


@pytest.mark.parametrize("backend", ["cudnn", "tokamax"])
def test_a_mask_mapped_without_its_queries_and_queries_without_their_keys_equal_the_oracle(on_cpu, backend):
    call = on_cpu(backend)
    numbers = np.array([[0, 29], [45, 3]])
    query, key, value = cases.arrays(value=cases.HEAD_DIM)[:3]
    queries = jnp.stack([query, query[::-1] * 0.5], axis=1)
    given = transforms.cotangents([query, key, value])

    def loss(query, key, value, lengths):
        output = call(masks.key_padding(lengths=lengths), query, key, value)[0]
        return (output * given[0]).sum()

    one = jax.grad(loss, argnums=(0, 1, 2))
    for axes, args in (((None, None, None, 0), (query,)), ((1, None, None, 0), (queries,))):
        found = jax.jit(jax.vmap(one, in_axes=axes))(*args, key, value, jnp.asarray(numbers))
        for entry in range(2):
            mine = args[0] if axes[0] is None else args[0][:, entry]
            attends = some_lengths(UNEQUAL, numbers[entry])
            expected = transforms.golden([mine, key, value], attends, (given[0], 0 * given[1]))
            for what, actual in zip(("query", "key", "value"), found):
                np.testing.assert_allclose(actual[entry], expected.gradients[what], rtol=1e-5, atol=5e-6)


OVER_A_MESH = [("cudnn", "causal lengths"), ("tokamax", "packed"), ("tokamax", "documents")]


@pytest.mark.parametrize("backend, name", OVER_A_MESH)
def test_what_is_asked_of_a_gpu_library_stands_over_data_and_tensor(on_cpu, backend, name):
    mask, attends, sizes = case(name)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    call = on_cpu(backend, placement=Placement(mesh, batch="data", heads="tensor"))
    if name == "packed":
        with pytest.raises(ValueError, match="its segment ids are traced"):
            check(call, mask, attends, cases.arrays(**sizes)[:3])
    else:
        check(call, mask, attends, cases.arrays(**sizes)[:3])


BIASES = [("cudnn", (2, 4, 44, 44)), ("cudnn", (1, 1, 44, 44)), ("tokamax", (1, 4, 1, 45)), ("tokamax", (2, 1, 45, 45))]


@pytest.mark.parametrize("backend, shape", BIASES)
def test_the_gradient_of_a_bias_equals_the_oracle(on_cpu, backend, shape):
    arrays = cases.arrays(q_len=shape[3], kv_len=shape[3], value=cases.HEAD_DIM)[:3]
    d_output, d_residual = transforms.cotangents(arrays)
    bias = jax.random.normal(jax.random.key(8), shape)

    def loss(bias):
        output, _ = on_cpu(backend, bias=bias)(masks.causal(), *arrays)
        return (output * d_output).sum()

    expected = transforms.golden(arrays, np.tri(shape[3], dtype=bool), (d_output, 0 * d_residual), bias=bias)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(bias), expected.gradients["bias"], rtol=1e-5, atol=1e-5)


def test_tokamax_is_given_whole_blocks_and_no_key_beyond_the_sequence(on_cpu, monkeypatch):
    on_cpu("tokamax")
    kernel, mask_type = tokamax._library()
    seen = []

    def spy(query, key, value, *, mask, **options):
        seen.append((query.shape[1], key.shape[1], np.asarray(mask.as_array(query.shape[1], key.shape[1]))))
        return kernel(query, key, value, mask=mask, **options)

    monkeypatch.setattr(tokamax, "_library", lambda: (spy, mask_type))
    for name in ("none", "causal, fewer keys than queries", "packed"):
        mask, _, sizes = case(name)
        arrays = cases.arrays(**sizes)[:3]
        mf.dot_product_attention(*arrays, mask=mask, implementation="tokamax")
        q_len, kv_len, allowed = seen.pop()
        assert q_len % tokamax.BLOCK_Q == 0
        assert kv_len % tokamax.BLOCK_KV == 0
        assert not allowed[..., : sizes["q_len"], sizes["kv_len"] :].any()


REFUSED = {
    "a bias that it would have to repeat": (dict(bias=jnp.zeros((1, 1, 1, 44))), EVEN, "both lengths in full"),
    "a bias of odd length": (dict(bias=jnp.zeros((1, 1, 45, 45))), ODD, "even lengths"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_cudnn_refuses_what_its_library_would_raise_over(name):
    options, lengths, reason = REFUSED[name]
    query, key, value = cases.arrays(jnp.bfloat16, q_len=lengths[0], kv_len=lengths[1], value=cases.HEAD_DIM)[:3]
    with pytest.raises(ValueError, match=reason):
        mf.dot_product_attention(query, key, value, implementation="cudnn", **options)


def test_key_lengths_that_differ_between_heads_are_refused():
    query, key, value = cases.arrays(jnp.bfloat16, value=cases.HEAD_DIM)[:3]
    mask = masks.key_padding(lengths=jnp.array([[1, 2, 3, 4]]))
    with pytest.raises(ValueError, match="key lengths differ between heads"):
        mf.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
