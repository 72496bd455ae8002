"""Every mask on the splash adapter against the float64 oracle, under every transformation.

Pallas' plain interpreter runs the kernels as XLA loops, which can be mapped, rematerialised and sharded on a CPU;
`test_splash` runs them in its simulation of a TPU. Lanes of 8 instead of 128 give tiny sequences many tiles.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskformer import masks
from maskformer.attention import Placement, splash
from maskformer.attention.splash_maps import split
from tests.attention import cases, test_splash, transforms

pltpu = pytest.importorskip("jax.experimental.pallas.tpu")
pytestmark = pytest.mark.usefixtures("quick_compilation")

SPLASH, DENSE = transforms.attention("splash"), transforms.attention("reference")
# Ways through the adapter that no other quick test takes under a transformation.
QUICK = ("causal window or sinks", "per head")


def every(quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in cases.CASES]


@pytest.fixture(autouse=True)
def interpreted():
    with pltpu.force_tpu_interpret_mode(True):
        yield


@pytest.fixture
def eight_lanes(monkeypatch):
    for owner, name in ((splash.kernels, "NUM_LANES"), (splash, "LANES"), (splash, "BLOCK")):
        monkeypatch.setattr(owner, name, 8)


def check(mask, attends, arrays, splash=SPLASH, dense=DENSE, **options):
    """Value and gradient of one call as good as the dense reference's; returns them."""
    given = transforms.cotangents(arrays)
    found = transforms.plain(splash, mask, arrays, given)
    expected = transforms.golden(arrays, attends, given, **options)
    transforms.assert_as_good(found, transforms.plain(dense, mask, arrays, given), expected)
    return found


def check_transformed(mask, attends, arrays, mask_axes=None, **options):
    """The same under vmap, scan and remat; ``attends`` is a list where the mask is mapped."""
    names = dict(logits_soft_cap=options.get("soft_cap"))
    calls = [transforms.attention(name, **names) for name in ("splash", "reference")]
    given = transforms.cotangents(arrays)
    found, dense = (transforms.transformed(call, mask, arrays, given, mask_axes) for call in calls)
    for entry in range(len(arrays[0])):
        here = lambda tree, entry=entry: [x[entry] for x in tree]
        seen = attends if mask_axes is None else attends[entry]
        transforms.assert_as_good(
            here(found), here(dense), transforms.golden(here(arrays), seen, here(given), **options)
        )


@pytest.mark.parametrize("name", every(QUICK))
def test_every_mask_under_vmap_scan_and_remat_is_as_good_as_the_dense_reference(eight_lanes, name):
    build, attends = cases.CASES[name]
    arrays = [*transforms.mapped(), jnp.stack([transforms.SINKS, -transforms.SINKS])]
    check_transformed(build(), attends, arrays)


@pytest.mark.slow
@pytest.mark.parametrize("name", test_splash.CASES)
def test_every_mask_of_whole_lanes_under_vmap_scan_and_remat_is_as_good_as_the_dense_reference(monkeypatch, name):
    monkeypatch.setattr(splash, "BLOCK", 128)
    mask, attends, options = test_splash.CASES[name]
    arrays = transforms.mapped(q_len=test_splash.Q_LEN, kv_len=test_splash.KV_LEN)
    check_transformed(mask, attends, arrays, soft_cap=options.get("logits_soft_cap"))


MAPPED = {
    "segments": (
        lambda ids: masks.causal() & masks.segments(ids),
        lambda ids: (cases.K <= cases.Q) & (ids[:, None, : cases.Q_LEN, None] == ids[:, None, None]),
        np.stack([cases.SEGMENTS, cases.SEGMENTS // 2]),
    ),
    "stored": (
        lambda table: masks.dense(table) | masks.causal(),
        lambda table: table | (cases.K <= cases.Q),
        np.stack([cases.TABLE, cases.TABLE[::-1]]),
    ),
}


@pytest.mark.parametrize("name", MAPPED)
def test_masks_mapped_with_their_queries_equal_the_oracle(eight_lanes, name):
    build, attends, leaves = MAPPED[name]
    mask = jax.vmap(build)(jnp.asarray(leaves))
    check_transformed(mask, [attends(leaf) for leaf in leaves], transforms.mapped(), mask_axes=0)


@pytest.mark.parametrize("name", every(("packed", "per head")))
def test_every_mask_over_data_and_tensor_is_as_good_as_the_dense_reference(eight_lanes, name):
    build, attends = cases.CASES[name]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    sharded = transforms.attention("splash", placement=Placement(mesh, batch="data", heads="tensor"))
    check(build(), attends, [*cases.arrays()[:3], transforms.SINKS], splash=sharded)


@pytest.mark.parametrize("name", ["packed", pytest.param("per head", marks=pytest.mark.slow)])
def test_a_sharded_sequence_on_gathered_keys_is_as_good_as_the_dense_reference(eight_lanes, name):
    length = 32  # dealt out in four parts of 8, an early and a late one to each device
    q, k = np.arange(length)[:, None], np.arange(length)
    ids = cases.SEGMENTS[:, :length]
    mask, attends = {
        "packed": (
            masks.causal() & masks.segments(jnp.asarray(ids)),
            cases.by_batch([(k <= q) & (row[:, None] == row) for row in ids]),
        ),
        "per head": (
            masks.per_head([masks.causal(), masks.sliding_window(5), ~masks.causal(), masks.nothing()]),
            np.stack([k <= q, (k <= q) & (q - k <= 5), k > q, (k < 0) & (q < 0)])[None],
        ),
    }[name]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "context"))
    sharded = transforms.attention("splash", placement=Placement(mesh, batch="data", context="context"))
    check(mask, attends, [*cases.arrays(q_len=length, kv_len=length)[:3], transforms.SINKS], splash=sharded)


LEFT_PADDED = np.array([[0] * 11 + [1] * 20 + [2] * 14, [0] * cases.KV_LEN], np.int32)
FEW = cases.TABLE & (cases.K >= 9) & (cases.Q >= 3)
EMPTY = {
    "empty first rows": cases.CASES["empty first rows"],
    "nothing": cases.CASES["nothing"],
    "lengths, one of them zero": cases.CASES["lengths, one of them zero"],
    "padding first, and an entry of padding": (
        lambda: masks.causal() & masks.segments(jnp.asarray(LEFT_PADDED), padding=0),
        cases.by_batch(
            [(cases.K <= cases.Q) & (r[: cases.Q_LEN, None] == r) & (r[: cases.Q_LEN, None] > 0) for r in LEFT_PADDED]
        ),
    ),
    "stored, first keys and an entry empty": (
        lambda: masks.dense(jnp.asarray(np.stack([FEW, FEW & False]))),
        cases.by_batch([FEW, FEW & False]),
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_rows_without_keys_are_exactly_zero_and_the_others_as_good_as_the_reference(eight_lanes, name):
    build, attends = EMPTY[name]
    found = check(build(), attends, [*cases.arrays()[:3], transforms.SINKS])
    attends = np.broadcast_to(attends, (cases.BATCH, 1, cases.Q_LEN, cases.KV_LEN)) if attends is False else attends
    transforms.assert_empty_rows_are_exact(found, attends)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 45), (37, 1), (129, 257)], ids=lambda n: "x".join(map(str, n)))
def test_lengths_that_fill_no_block_equal_the_oracle(monkeypatch, lengths):
    monkeypatch.setattr(splash, "BLOCK", 128)
    q_len, kv_len = lengths
    q, k = np.arange(q_len)[:, None], np.arange(kv_len)
    ids = np.arange(max(lengths), dtype=np.int32) // 50 % 5  # 0 comes again at the end, beside what fills the block
    arrays = cases.arrays(q_len=q_len, kv_len=kv_len)[:3]
    if min(lengths) > 1:
        check(masks.causal(), k <= q, arrays)
    check(masks.segments(jnp.asarray(ids)), ids[:q_len, None] == ids[:kv_len], arrays)


@pytest.mark.parametrize("name, kv_heads", [("packed", 1), pytest.param("per head", 4, marks=pytest.mark.slow)])
def test_one_key_head_or_as_many_as_queries_equal_the_oracle(eight_lanes, name, kv_heads):
    build, attends = cases.CASES[name]
    check(build(), attends, cases.arrays(kv_heads=kv_heads)[:3])


def test_a_traced_offset_and_a_soft_cap_equal_the_oracle(eight_lanes):
    def call(implementation):
        def attend(tree, *arrays):
            mask, offset = tree
            return transforms.attention(implementation, q_offset=offset, logits_soft_cap=3.0)(mask, *arrays)

        return attend

    ids = np.repeat(np.arange(6, dtype=np.int32), 8)
    q = cases.Q + 8
    attends = (cases.K <= q) & (ids[q] == ids[: cases.KV_LEN])
    mask = masks.causal() & masks.segments(jnp.asarray(ids))
    arrays = [*cases.arrays()[:3], transforms.SINKS]
    check((mask, jnp.int32(8)), attends, arrays, splash=call("splash"), dense=call("reference"), soft_cap=3.0)


FLAGS = np.arange(64) % 5 < 3
def said_twice(ids):
    return masks.causal() & masks.documents(ids) & masks.parse("causal & segments").bind(segment_ids=ids)


UNUSUAL = {
    # What the kernel cannot look up goes with the stored tiles.
    "a predicate that closes over an array": (
        lambda: masks.predicate(lambda q, k: jnp.asarray(FLAGS)[k] & (k <= q)),
        FLAGS[: cases.KV_LEN] & (cases.K <= cases.Q),
        False,
    ),
    "a predicate that makes a table": (
        lambda: masks.predicate(lambda q, k: (jnp.arange(7) > 3)[k % 7] | (k == q)),
        (cases.K % 7 > 3) | (cases.K == cases.Q),
        False,
    ),
    "documents of an objective, and a config that says segments again": (
        lambda: said_twice(jnp.asarray(cases.SEGMENTS)),
        cases.by_batch([(row[: cases.Q_LEN, None] == row) & (cases.K <= cases.Q) for row in cases.SEGMENTS]),
        True,
    ),
    # Leaves that say [batch, 1] where [batch] would do.
    "segments and padding with an axis for heads": (
        lambda: masks.segments(jnp.asarray(cases.SEGMENTS)[:, None])
        & masks.key_padding(lengths=jnp.asarray(cases.LENGTHS)[:, None])
        & masks.query_padding(valid=jnp.asarray(FLAGS)[None, None, : cases.Q_LEN]),
        cases.by_batch(
            [
                (row[: cases.Q_LEN, None] == row) & (cases.K < n) & FLAGS[: cases.Q_LEN, None]
                for row, n in zip(cases.SEGMENTS, cases.LENGTHS)
            ]
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_masks_that_the_kernel_cannot_evaluate_as_they_are_equal_the_oracle(eight_lanes, name):
    build, attends, in_kernel = UNUSUAL[name]
    assert (split(build(), cases.Q_LEN, cases.KV_LEN, 0) is not None) == in_kernel
    check(build(), attends, cases.arrays()[:3])


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal() & (masks.sliding_window(5) | masks.sinks(2)),
        masks.dilated_window(4, 4, 3),
        masks.chunked(5, 1) & masks.strided(3),
        masks.block_diffusion(4, 18),
        masks.neighborhood((4, 8), (3, 3)),
        masks.tiles((4, 8), (2, 2), 1),
        masks.longformer(3, 2),
        masks.predicate(lambda q, k: (jnp.sin(q * 0.3) > jnp.cos(k * 0.2)) ^ (q // 3 == k % 5)),
    ],
    ids=str,
)
def test_masks_of_positions_are_evaluated_in_the_kernel_and_not_stored(mask):
    assert split(mask, 32, 32, 0).positions == mask
