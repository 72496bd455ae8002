"""Position information that is computed, not learned: rotary channels and ALiBi distances."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.attention import score_mods


def rotary_tables(positions: jax.Array, head_dim: int, base: float = 10_000.0) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotation of every channel pair at every position.

    Pair `i` turns by `position * base**(-2 i / head_dim)` (Su et al. 2021, equation 15).

    Args:
        positions: int [batch, length].
        head_dim: channels of a head, even.
        base: wavelength base; Llama 3 uses 500,000.

    Returns:
        Two float32 arrays [batch, length, 1, head_dim // 2], ready to broadcast over heads.

    >>> cosine, sine = rotary_tables(jnp.array([[0, 1]]), head_dim=2)
    >>> [f"{float(x):.4f}" for x in (*cosine.ravel(), *sine.ravel())]
    ['1.0000', '0.5403', '0.0000', '0.8415']
    """
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(heads: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate `heads` [batch, length, heads, head_dim] by `rotary_tables`.

    Channel `i` pairs with channel `i + head_dim // 2` (the GPT-NeoX and Hugging Face layout; checkpoints in
    the interleaved layout, which pairs `2 i` with `2 i + 1`, need their query and key channels permuted).
    """
    cosine, sine = tables
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(heads.dtype)


def alibi(positions: jax.Array, heads: int) -> score_mods.ScoreMod:
    """ALiBi over given positions: `score - slope[head] * |position[q] - position[k]|` (Press et al. 2022).

    The distance is symmetric, since an encoder looks both ways; under a causal mask it is the paper's. Slopes
    are those of `attention.score_mods.alibi_slopes`. Distances are of positions, not of places in the row, so a
    caller's own positions are honoured.

    Args:
        positions: int [batch, length].
        heads: number of query heads.

    >>> score_mod = alibi(jnp.array([[0, 1, 7]]), heads=4)
    >>> float(score_mod(jnp.float32(0.0), 0, 1, 0, 2))
    -0.4375
    """
    slopes = jnp.asarray(score_mods.alibi_slopes(heads), jnp.float32)

    def score_mod(score, batch, head, q, k):
        return score - slopes[head] * jnp.abs(positions[batch, q] - positions[batch, k])

    return score_mod
