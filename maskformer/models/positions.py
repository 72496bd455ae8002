"""Position information that is computed, not learned: rotary channels and ALiBi distances."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


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
    >>> np.round(np.asarray(cosine).ravel(), 4).tolist(), np.round(np.asarray(sine).ravel(), 4).tolist()
    ([1.0, 0.5403000235557556], [0.0, 0.8414999842643738])
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


def alibi_slopes(heads: int) -> np.ndarray:
    """The slope of each head in ALiBi (Press et al. 2022), float32 [heads].

    For a power of two `n`, head `h` has slope `2**(-8 (h + 1) / n)`. For another number, the slopes of the
    power of two below come first, followed by every second slope of the power of two above (the authors'
    `get_slopes`).

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> alibi_slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    if heads < 1:
        raise ValueError(f"heads={heads}: expected at least 1")

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]

    below = 2 ** int(math.log2(heads))
    slopes = geometric(below)
    if below < heads:
        slopes += geometric(2 * below)[0::2][: heads - below]
    return np.asarray(slopes, np.float32)
