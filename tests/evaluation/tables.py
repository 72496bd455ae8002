"""Models that are tables: every conditional distribution is an arbitrary array, so that sums can be enumerated."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

# Ids 0..2 are text, 3 is a marker that stays visible, 4 is the mask.
TEXT, MARKER, MASK, SIZE = 3, 3, 4, 5


def random_table(seed: int, length: int, scale: float = 2.0) -> np.ndarray:
    """Logits [inputs, length, SIZE], for each of the SIZE ** length inputs a row can show."""
    return np.random.default_rng(seed).normal(scale=scale, size=(SIZE**length, length, SIZE))


def predict(table: jax.Array, corrupted) -> jax.Array:
    """The model of a table, with the signature that evaluation wants; every row of a batch is one segment."""
    tokens = corrupted.input_tokens
    places = SIZE ** jnp.arange(tokens.shape[1])
    logits = table[jnp.sum(tokens * places, axis=1)]
    if corrupted.predict_positions is not None:
        logits = jnp.take_along_axis(logits, corrupted.predict_positions[..., None], axis=1)
    return logits


def losses(table: np.ndarray, row: np.ndarray, hidden: tuple[int, ...]) -> dict[int, float]:
    """-log p of each hidden token given the others, float64; the mask is not an answer."""
    shown = np.array(row)
    shown[list(hidden)] = MASK
    logits = np.delete(table[int(np.sum(shown * SIZE ** np.arange(len(row))))], MASK, axis=-1)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return {i: -log_probs[i, row[i]] for i in hidden}


def sums_by_count(table: np.ndarray, row: np.ndarray) -> np.ndarray:
    """[text tokens]: entry l - 1 is the sum, over all sets of l hidden text tokens, of the losses in them."""
    text = [i for i, token in enumerate(row) if token != MARKER]
    sums = np.zeros(len(text))
    for count in range(1, len(text) + 1):
        for hidden in itertools.combinations(text, count):
            sums[count - 1] += sum(losses(table, row, hidden).values())
    return sums


def any_order_bound(table: np.ndarray, row: np.ndarray) -> float:
    """The bound on -log p(row) in nats, by enumeration of all masks."""
    sums = sums_by_count(table, row)
    size = len(sums)
    return sum(total / (count * math.comb(size, count)) for count, total in enumerate(sums, start=1))


def batch_of(rows: np.ndarray) -> dict[str, jax.Array]:
    """Rows without padding as the data pipeline gives them, one segment each."""
    rows = np.asarray(rows, np.int32)
    return {
        "tokens": jnp.asarray(rows),
        "segment_ids": jnp.ones(rows.shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32), rows.shape),
        "word_starts": jnp.ones(rows.shape, bool),
        "example_id": jnp.arange(rows.shape[0], dtype=jnp.int32),
        "epoch": jnp.zeros(rows.shape[0], jnp.int32),
    }
