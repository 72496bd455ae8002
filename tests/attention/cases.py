"""Masks for the exactness tests, each with the NumPy matrix that says what it means."""

import jax
import jax.numpy as jnp
import numpy as np

from maskformer import masks

BATCH, Q_LEN, KV_LEN, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 37, 45, 4, 2, 16, 8
Q = np.arange(Q_LEN)[:, None]
K = np.arange(KV_LEN)[None, :]
SEGMENTS = np.array([[0] * 5 + [1] * 20 + [2] * 20, [3] * 1 + [4] * 40 + [5] * 4], np.int32)
LENGTHS = np.array([0, 29], np.int32)
TABLE = np.random.default_rng(7).random((Q_LEN, KV_LEN)) < 0.3


def by_batch(rows):
    return np.stack(rows)[:, None]


CASES = {
    "none": (lambda: None, True),
    "causal": (lambda: masks.causal(), K <= Q),
    "bidirectional window": (lambda: masks.sliding_window(3, 5), (Q - K <= 3) & (K - Q <= 5)),
    "causal window or sinks": (
        lambda: masks.causal() & (masks.sliding_window(6) | masks.predicate(lambda q, k: k < 2)),
        (K <= Q) & ((Q - K <= 6) & (K <= Q) | (K < 2)),
    ),
    "predicate": (lambda: masks.predicate(lambda q, k: (k - q) % 3 == 0), (K - Q) % 3 == 0),
    "not causal": (lambda: ~masks.causal(), K > Q),
    "empty first rows": (lambda: masks.predicate(lambda q, k: (q >= 20) & (k >= 9)), (Q >= 20) & (K >= 9)),
    "window with empty rows": (
        lambda: masks.sliding_window(6) & masks.predicate(lambda q, k: (q % 5 != 2) & ((q < 8) | (q >= 16))),
        (K <= Q) & (Q - K <= 6) & (Q % 5 != 2) & ((Q < 8) | (Q >= 16)),
    ),
    "packed in a window": (
        lambda: masks.sliding_window(6, 3) & masks.segments(jnp.asarray(SEGMENTS)),
        by_batch([(Q - K <= 6) & (K - Q <= 3) & (row[:Q_LEN, None] == row[None]) for row in SEGMENTS]),
    ),
    "nothing": (lambda: masks.nothing(), False),
    "packed": (
        lambda: masks.causal() & masks.segments(jnp.asarray(SEGMENTS)),
        by_batch([(K <= Q) & (row[:Q_LEN, None] == row[None]) for row in SEGMENTS]),
    ),
    "documents": (
        lambda: masks.causal() & masks.documents(jnp.asarray(SEGMENTS)),
        by_batch([(K <= Q) & (row[:Q_LEN, None] == row[None]) for row in SEGMENTS]),
    ),
    "lengths, one of them zero": (
        lambda: masks.key_padding(lengths=jnp.asarray(LENGTHS)),
        by_batch([(K < n) & (Q >= 0) for n in LENGTHS]),
    ),
    "table": (lambda: masks.dense(jnp.asarray(TABLE)), TABLE),
    "per head": (
        lambda: masks.per_head([masks.causal(), masks.sliding_window(5), masks.everything(), ~masks.causal()]),
        np.stack([K <= Q, (Q - K <= 5) & (K <= Q), (K >= 0) & (Q >= 0), K > Q])[None],
    ),
}


def arrays(dtype=jnp.float32, **sizes):
    """Query, key, value and the cotangent of the output."""
    size = dict(batch=BATCH, q_len=Q_LEN, kv_len=KV_LEN, heads=HEADS, kv_heads=KV_HEADS, dim=HEAD_DIM, value=VALUE_DIM)
    size |= sizes
    shapes = [
        (size["batch"], size["q_len"], size["heads"], size["dim"]),
        (size["batch"], size["kv_len"], size["kv_heads"], size["dim"]),
        (size["batch"], size["kv_len"], size["kv_heads"], size["value"]),
        (size["batch"], size["q_len"], size["heads"], size["value"]),
    ]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes)]
