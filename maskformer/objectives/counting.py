"""How many units a row loses, and the static budget of prediction slots that always holds them.

The count of a row of `size` units is looked up in a table made in Python floats (float64) when the objective is
built, because float32 rounds products such as 0.15 * 30 to the other side of a half. A rate that changes
with the step cannot have a table; it is computed in float32 and may differ by one at exact halves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer import checks
from maskformer.objectives import randomness

# The stage of the row key that stochastic rounding draws from (randomness.bits).
STAGE = 0

RULES = ("round", "ceil", "stochastic")
# Positions and counts are int32 on the devices.
MOST = 2**31 - 1


def check_fraction(name: str, value: Any, *, low_open: bool = False) -> float:
    """`value` as float, in [0, 1] (or (0, 1]); ValueError otherwise.

    >>> check_fraction("rate", 15)
    Traceback (most recent call last):
    ...
    ValueError: rate=15: expected a fraction between 0 and 1; did you mean 0.15?
    """
    checks.typed(name, value, float)
    hint = f"; did you mean {value / 100:g}?" if 2 <= value <= 100 else ""
    bounds = "above 0 and at most 1" if low_open else "between 0 and 1"
    return checks.number(name, value, f"a fraction {bounds}{hint}", 0.0, 1.0, open_low=low_open, closed=True)


def check_rate(name: str, value: Any) -> float:
    """The share of the tokens to hide, as float in (0, 1]; ValueError otherwise.

    >>> check_rate("rate", 0)
    Traceback (most recent call last):
    ...
    ValueError: rate=0: expected a fraction above 0 and at most 1: at a constant 0 nothing is hidden or predicted
    """
    value = check_fraction(name, value)
    zero = "a fraction above 0 and at most 1: at a constant 0 nothing is hidden or predicted"
    checks.require(value > 0, name, 0, zero)
    return value


def check_length(length: Any, name: str = "length") -> int:
    """Tokens per row as int, at least 1; ValueError otherwise."""
    checks.typed(name, length, int)
    return checks.integer(name, int(length), 1, MOST)


def check_copies(static_copies: Any) -> int:
    """The number of fixed corruptions of each row, 0 for a new one every epoch; ValueError otherwise."""
    checks.typed("static_copies", static_copies, int)
    return checks.integer("static_copies", int(static_copies), 0, MOST)


def check_slots(max_predictions: Any, length: int) -> int | None:
    """Prediction slots of a row of `length` tokens, or None for what the rate needs; ValueError otherwise."""
    if max_predictions is None:
        return None
    checks.typed("max_predictions", max_predictions, int)
    within = 1 <= max_predictions <= length
    checks.require(within, "max_predictions", max_predictions, f"between 1 and the row length {length}")
    return int(max_predictions)


@dataclass(frozen=True, eq=False)
class Count:
    """Number of units to take from a row of `size` units.

    Rules: `round` = max(minimum, round half to even(rate * size)) (BERT); `ceil` = ceil(rate * size) (SpanBERT);
    `stochastic` = floor(rate * size + U), U uniform in [0, 1) (RoBERTa). An empty row gives 0. At most `maximum`.

    >>> count = Count("round", 0.15, length=64, minimum=1)
    >>> [int(count(jax.random.key(0), jnp.int32(n))) for n in (0, 1, 10, 30, 50)]   # 1.5, 4.5 and 7.5 go to even
    [0, 1, 2, 4, 8]
    """

    rule: str
    rate: float
    length: int
    minimum: int = 0
    maximum: int | None = None

    def __post_init__(self):
        checks.choose("rule", self.rule, RULES)

    def _bounds(self, count, size, where):
        count = where.maximum(count, self.minimum)
        if self.maximum is not None:
            count = where.minimum(count, self.maximum)
        return where.where(size > 0, where.minimum(count, size), 0)

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """(whole, fraction) for sizes 0..length: the count is `whole`, plus one with probability `fraction`."""
        product = [self.rate * size for size in range(self.length + 1)]
        if self.rule == "stochastic":
            whole = [math.floor(x) for x in product]
            return np.array(whole, np.int32), np.array([x - w for x, w in zip(product, whole)], np.float32)
        rounding = round if self.rule == "round" else math.ceil
        return np.array([rounding(x) for x in product], np.int32), np.zeros(self.length + 1, np.float32)

    def __call__(self, key: jax.Array, size: jax.Array, rate: jax.Array | None = None) -> jax.Array:
        """int32 count for a row of `size` units; `rate` (traced) replaces the rate the table was made for."""
        if rate is None:
            whole, fraction = self.table()
            whole, fraction = jnp.asarray(whole)[size], jnp.asarray(fraction)[size]
        else:
            product = jnp.asarray(rate, jnp.float32) * size.astype(jnp.float32)
            if self.rule == "stochastic":
                whole = jnp.floor(product)
                fraction = product - whole
            else:
                whole = jnp.round(product) if self.rule == "round" else jnp.ceil(product - 1e-5)
                fraction = jnp.zeros_like(product)
            whole = whole.astype(jnp.int32)
        if self.rule == "stochastic":
            draw = randomness.uniform(key, STAGE)
            whole = whole + (draw + fraction >= 1.0)
        return self._bounds(whole, size, jnp)

    def largest(self) -> int:
        """The largest count over all row sizes up to `length`."""
        whole, fraction = self.table()
        return int(self._bounds(whole + (fraction > 0), np.arange(self.length + 1), np).max())


def binomial_quantile(size: int, rate: float, tail: float = 1e-9) -> int:
    """Smallest k with P(Binomial(size, rate) > k) < tail: the slots that independent draws need.

    >>> binomial_quantile(128, 0.15), binomial_quantile(128, 0.0), binomial_quantile(128, 1.0)
    (47, 0, 128)
    """
    if rate <= 0.0:
        return 0
    if rate >= 1.0:
        return size
    log = [
        math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1)
        + k * math.log(rate) + (size - k) * math.log1p(-rate)
        for k in range(size + 1)
    ]
    above = 0.0
    for k in range(size, 0, -1):
        above += math.exp(log[k])
        if above >= tail:
            return k
    return 0


def top_n(random_bits: jax.Array, eligible: jax.Array, count: jax.Array, most: int) -> jax.Array:
    """bool `[length]`: `count` of the eligible positions, uniformly without replacement.

    Args:
      random_bits: uint32 `[length]`, one draw per position.
      eligible: bool `[length]`.
      count: int32 scalar; all eligible positions where fewer exist.
      most: static upper bound of `count`.
    """
    length = eligible.shape[0]
    most = min(most, length)
    if most == 0:
        return jnp.zeros(length, bool)
    values, index = jax.lax.top_k(jnp.where(eligible, randomness.sortable(random_bits), 0.0), most)
    taken = (jnp.arange(most) < count) & (values > 0.0)
    return jnp.zeros(length, bool).at[jnp.where(taken, index, length)].set(True, mode="drop", unique_indices=False)


def slots(chosen: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """The first `budget` True positions of `chosen` `[length]`, ascending, and which slots are in use.

    >>> slots(jnp.array([False, True, False, True]), 3)
    (Array([1, 3, 0], dtype=int32), Array([ True,  True, False], dtype=bool))
    """
    length = chosen.shape[0]
    # Top-k of length - position is a stable compaction; float32 holds these integers exactly.
    order = jnp.where(chosen, length - jnp.arange(length), 0).astype(jnp.float32)
    values, index = jax.lax.top_k(order, budget)
    used = values > 0.0
    return jnp.where(used, index, 0).astype(jnp.int32), used
