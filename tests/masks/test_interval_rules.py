"""Every rule of the interval analysis, alone: never wrong, and as sharp as intervals can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskformer import masks
from maskformer.masks import intervals
from maskformer.masks.tiles import Programs, Reading, bounds, tile_set
from tests.masks import oracle

LENGTH, BLOCK = 48, 6
table = np.array([5, -3, 8, 0, 2, 7, -9, 4] * 6, np.int32)
rising = np.sort(table)
matrix = np.add.outer(rising, rising)
stripe = np.zeros((LENGTH, LENGTH), bool)
stripe[6:12] = True

SHARP = {
    "add": lambda q, k: q + k < 20,
    "sub": lambda q, k: q - k < 3,
    "sub of signs": lambda q, k: (k - 24) - (q - 20) > 9,
    "neg": lambda q, k: -q > k - 30,
    "mul": lambda q, k: (q - 20) * (k - 30) > 100,
    "mul by a negative": lambda q, k: (q - 20) * -3 > k,
    "abs": lambda q, k: abs(q - k) <= 2,
    "abs far": lambda q, k: abs(q - 20) >= k,
    "square": lambda q, k: (q - 20) ** 2 < k,
    "cube": lambda q, k: (q - 20) ** 3 < 50 * k,
    "max": lambda q, k: jnp.maximum(q, 10) < k,
    "min": lambda q, k: jnp.minimum(q, 10) > k,
    "clip": lambda q, k: jnp.clip(q, 9, 30) == k,
    "clamp": lambda q, k: jax.lax.clamp(9, q, 30) == k,
    "sign": lambda q, k: jnp.sign(q - 20) * 5 > k - 10,
    "floor divide": lambda q, k: q // 5 == k // 7,
    "floor divide below zero": lambda q, k: (q - 30) // 7 == (k - 30) // 7,
    "truncating divide": lambda q, k: jax.lax.div(q - 24, np.int32(7)) == jax.lax.div(k - 24, np.int32(7)),
    "remainder": lambda q, k: (q % 16 < 3) & (k % 24 > 9),
    "truncating remainder": lambda q, k: jax.lax.rem(q, np.int32(16)) < jax.lax.rem(k, np.int32(24)),
    "comparisons": lambda q, k: (q < 9) | (k <= 7) | (q > 40) | (k >= 45),
    "equal": lambda q, k: q == k,
    "not equal": lambda q, k: (q != k) & (q // 6 != k // 6),
    "logic": lambda q, k: ~((q < 9) | (k > 30)) & ~(q > 40),
    "exclusive or": lambda q, k: (q < 12) ^ (k < 24),
    "shift right": lambda q, k: (q >> 3) == (k >> 3),
    "logical shift right": lambda q, k: jax.lax.shift_right_logical(q, np.int32(3)) == k >> 3,
    "shift left": lambda q, k: (q << 2) < k,
    "where": lambda q, k: jnp.where(q < 24, q, 100) < k,
    "select of three": lambda q, k: jax.lax.select_n(q // 16, k, k - 100, k + 100) < 24,
    "cond": lambda q, k: jax.lax.cond(q < 24, lambda: k, lambda: k + 100) < 24,
    "convert": lambda q, k: q.astype(jnp.float32) * 0.5 < k.astype(jnp.int8),
    "to bool": lambda q, k: (q // 24).astype(bool) | (k < 7),
    "float divide": lambda q, k: q / 3.0 < k - 0.01,
    "floor": lambda q, k: jnp.floor(q / 4.0 + 0.01) > k,
    "ceil": lambda q, k: jnp.ceil(q / 4.0 - 0.01) > k,
    "exp": lambda q, k: jnp.exp(q / 10.0) < k + 0.1,
    "log": lambda q, k: jnp.log(q + 1.0) * 9.0 < k + 0.1,
    "log1p": lambda q, k: jnp.log1p(q * 1.0) * 9.0 < k + 0.1,
    "expm1": lambda q, k: jnp.expm1(q / 10.0) < k + 0.1,
    "exp2": lambda q, k: jnp.exp2(q / 10.0) < k + 0.1,
    "sqrt": lambda q, k: jnp.sqrt(q * 1.0) * 5.0 < k + 0.1,
    "cbrt": lambda q, k: jnp.cbrt(q * 1.0) * 9.0 < k + 0.1,
    "tanh": lambda q, k: jnp.tanh(q / 10.0) * 40.0 < k + 0.1,
    "logistic": lambda q, k: jax.nn.sigmoid(q / 10.0) * 40.0 < k + 0.1,
    "atan": lambda q, k: jnp.arctan(q / 10.0) * 20.0 < k + 0.1,
    "sinh": lambda q, k: jnp.sinh(q / 10.0) < k + 0.1,
    "asinh": lambda q, k: jnp.arcsinh(q / 10.0) * 10.0 < k + 0.1,
    "is finite": lambda q, k: jnp.isfinite(q * 1.0) & (k < 7),
    "read": lambda q, k: jnp.asarray(table)[q] * 0 + jnp.asarray(rising)[q] == jnp.asarray(rising)[k],
    "read a matrix": lambda q, k: jnp.asarray(matrix)[q, k] > 3,
    "gather": lambda q, k: jnp.take(jnp.asarray(rising), jnp.stack([q, q]), mode="clip").max() > k,
    "reshape": lambda q, k: jnp.reshape(jnp.stack([q, k, q, k]), (2, 2)).max() < 40,
    "square itself": lambda q, k: jax.lax.square(q - 20) < k,
    "read a row": lambda q, k: jnp.asarray(matrix)[q].max() > k,
    "reduce or": lambda q, k: jnp.any(jnp.array([3, 20]) == q) & (k < 9),
    "reduce and": lambda q, k: jnp.all(jnp.array([3, 20]) < q) & (k < 9),
    "reduce max": lambda q, k: jnp.max(jnp.array([3, 20]) + q) < k,
    "reduce min": lambda q, k: jnp.min(jnp.array([3, 20]) + q) < k,
    "reduce sum": lambda q, k: jnp.sum(jnp.array([7, 20, 33]) <= q) == jnp.sum(jnp.array([9, 31]) <= k),
    "concatenate": lambda q, k: jnp.concatenate([q[None], jnp.array([20])]).max() < k,
    "stack": lambda q, k: jnp.stack([q, q + 9])[1] < k,
    "broadcast and transpose": lambda q, k: (jnp.full((2, 3), q).T + jnp.arange(2)).max() < k,
    "reverse and slice": lambda q, k: jnp.flip(jnp.stack([q, q + 9]))[0:1].sum() < k,
    "stop gradient": lambda q, k: jax.lax.optimization_barrier(q) < k,
    "copy": lambda q, k: jnp.copy(q) < k,
    "rematerialised": lambda q, k: jax.checkpoint(lambda x: x + 5)(q) < k,
    "custom derivative": lambda q, k: jax.nn.relu(q - 20.0) < k - 0.5,
}
SOUND = {
    "round": lambda q, k: jnp.round(q / 3.0) < k,
    "and of bits": lambda q, k: (q & 12) == (k & 3),
    "or of bits": lambda q, k: (q | 12) < (k | 3),
    "exclusive or of bits": lambda q, k: (q ^ 12) < k,
    "not of bits": lambda q, k: ~q > -k,
    "sine": lambda q, k: jnp.sin(q * 1.0) * 20 > k,
    "cosine": lambda q, k: jnp.cos(k * 1.0) * 20 > q,
    "erf": lambda q, k: jax.scipy.special.erf(q * 1.0) * 5 > k,
    "remainder by a negative": lambda q, k: q % -7 < k % 5,
    "divide by what may be zero": lambda q, k: q // (k - 20) > 1,
    "slice of two": lambda q, k: jax.lax.dynamic_slice(jnp.asarray(rising), (q,), (2,)).sum() > k,
    "read at both": lambda q, k: jnp.asarray(rising)[(q + k) // 2] > 3,
    "read what was read": lambda q, k: jnp.asarray(rising)[jnp.clip(jnp.asarray(table)[q], 0, 40)] > k - 20,
    "read a matrix in long strides": lambda q, k: jnp.asarray(stripe)[jnp.minimum(3 * q, 47), k],
    "read in long strides": lambda q, k: jnp.asarray(stripe[:, 0])[jnp.minimum(5 * q, 47)] & (k < 9),
    "iota": lambda q, k: (jax.lax.iota(jnp.int32, 4) * q).sum() > k,
}


@pytest.mark.parametrize("name", [*SHARP, *SOUND])
def test_a_rule_is_never_wrong_and_sharp_where_intervals_can_be(name):
    mask = masks.predicate({**SHARP, **SOUND}[name])
    expected = np.asarray(mask.dense(LENGTH, LENGTH))
    block_map = mask.block_map(LENGTH, LENGTH, BLOCK)
    assert block_map.widened == ()
    assert oracle.broken_tiles(block_map, expected) == []
    if name in SHARP:
        visited = expected.reshape(LENGTH // BLOCK, BLOCK, -1, BLOCK).any((1, 3))
        np.testing.assert_array_equal(block_map.kinds()[0, 0] > 0, visited)


def test_all_rules_together_are_sound_on_traced_values():
    names = [*SHARP, *SOUND]
    each = [masks.predicate({**SHARP, **SOUND}[name]) for name in names]

    @jax.jit
    def classify(offset):
        # An offset that is not known sends every mask through the traced half of the analysis.
        blocks = np.arange(LENGTH // BLOCK)
        tiles = tile_set(jnp, (LENGTH, LENGTH), (BLOCK, BLOCK), blocks[:, None], blocks[None, :])
        found = [bounds(masks.shift(mask, offset), Reading(tiles, Programs(), set())) for mask in each]
        return [[jnp.broadcast_to(end, (blocks.size, blocks.size)) for end in (f.lo, f.hi)] for f in found]

    classified = classify.lower(0).compile({"xla_backend_optimization_level": 0})(0)
    for name, mask, (always, ever) in zip(names, each, classified):
        tiles = np.asarray(mask.dense(LENGTH, LENGTH)).reshape(LENGTH // BLOCK, BLOCK, -1, BLOCK)
        assert not (np.asarray(always) & ~tiles.all((1, 3))).any(), name
        assert not (~np.asarray(ever) & tiles.any((1, 3))).any(), name


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k: jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), q), k)),
        lambda q, k: jnp.abs(q + 1j * k) < 20,
        lambda q, k: jax.lax.cond(q > 24, lambda: jax.random.key(0), lambda: jax.random.key(1)) == jax.random.key(1),
    ],
    ids=["random", "complex", "branches"],
)
def test_values_that_have_no_order_are_visited_and_never_wrong(fn):
    mask = masks.causal() & masks.predicate(fn)
    expected = np.asarray(mask.dense(LENGTH, LENGTH))
    for block_map in (mask.block_map(LENGTH, LENGTH, BLOCK), jax.jit(lambda: mask.block_map(LENGTH, LENGTH, BLOCK))()):
        assert oracle.broken_tiles(block_map, expected) == []
        assert block_map.widened


def test_every_rule_has_a_predicate_here(monkeypatch):
    used = set()
    for name, rule in list(intervals.RULES.items()):
        monkeypatch.setitem(intervals.RULES, name, lambda *a, name=name, rule=rule: used.add(name) or rule(*a))
    for fn in {**SHARP, **SOUND}.values():
        masks.predicate(fn).block_map(LENGTH, LENGTH, BLOCK)
    # These come from transformations (sharding, differentiation), not from a predicate as written.
    assert set(intervals.RULES) - used <= {"add_any", "copy_p", "pvary", "stop_gradient", "expand_dims", "iota"}
