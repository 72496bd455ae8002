"""Masked diffusion: the masking rate itself is drawn, and the loss is weighted so that it bounds the likelihood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from maskformer.objectives import loss as losses
from maskformer.objectives import randomness
from maskformer.objectives.counting import check_fraction, check_length
from maskformer.objectives.objective import Objective
from maskformer.objectives.rows import Corrupted, Row, rows_from_batch
from maskformer.objectives.select import ORDER
from maskformer.objectives.vocabulary import Vocabulary, is_any_of

TIME = 50
# Fractional part of the golden ratio: multiples of it modulo 1 are the most even one-dimensional sequence.
_GOLDEN = 0.6180339887498949
SAMPLINGS = ("uniform", "batch", "epochs")


@dataclass(frozen=True, eq=False)
class MaskedDiffusion(Objective):
    """Each token is masked with a probability that belongs to its row, and predicted from the rest.

    `probability(t)` and `weight(t)` follow the convention: `llada`: p = (1 - eps) t + eps, weight 1 / p;
    `mdlm`: t in [eps, 1], p = (1 - eps) t, weight 1 / t. The denominator is the number of tokens, masked or not.
    """

    shows_mask = True
    takes_label_smoothing = False
    loss_is_mean = False

    convention: str = "llada"
    epsilon: float = 1e-3
    sampling: str = "uniform"
    avoid: tuple[int, ...] = ()

    def times(self, key: jax.Array, keys: jax.Array, epoch: jax.Array, example_id: jax.Array) -> jax.Array:
        """float32 `[batch]` in [0, 1)."""
        if self.sampling == "uniform":
            return jax.vmap(lambda k: randomness.uniform(k, TIME))(keys)
        root = randomness.as_threefry(key)
        if self.sampling == "batch":
            # One offset for the batch, the rows spread evenly behind it (MDLM's antithetic sampling).
            offset = randomness.uniform(jax.random.fold_in(root, epoch[0]), TIME + 1 + example_id[0])
            count = epoch.shape[0]
            return jnp.mod(offset / count + jnp.arange(count) / count, 1.0)
        own = jax.vmap(lambda i: randomness.uniform(jax.random.fold_in(root, i), TIME))(example_id)
        return jnp.mod(own + jnp.mod(epoch.astype(jnp.float32), 4096.0) * _GOLDEN, 1.0)

    def probability_and_weight(self, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Masking probability and loss weight for `uniform` in [0, 1)."""
        time = (1.0 - self.epsilon) * uniform + self.epsilon
        if self.convention == "mdlm":
            return (1.0 - self.epsilon) * time, 1.0 / time
        return time, 1.0 / time

    def diffuse(self, key: jax.Array, row: Row, uniform: jax.Array, rate) -> Corrupted:
        if rate is None:
            probability, weight = self.probability_and_weight(uniform)
        else:
            probability = jnp.asarray(rate, jnp.float32)
            weight = 1.0 / jnp.maximum(probability, 1e-6)
        member = row.valid & ~is_any_of(row.tokens, self.avoid, self.vocabulary.size)
        chosen = member & randomness.below(randomness.bits(key, ORDER, row.tokens.shape), probability)
        return Corrupted(
            input_tokens=jnp.where(chosen, self.vocabulary.mask, row.tokens),
            segment_ids=row.segment_ids,
            positions=row.positions,
            predict_positions=None,
            target_tokens=row.tokens,
            loss_weights=jnp.where(chosen, weight, 0.0),
            kinds=jnp.zeros(row.tokens.shape, jnp.int8),
            denominators=jnp.sum(member, dtype=jnp.float32),
            bidirectional=row.valid,
            selected=chosen,
        )

    def row(self, key, row, rate, token_weights):
        return self.diffuse(key, row, randomness.uniform(key, TIME), rate)

    def __call__(self, key, batch: Mapping[str, jax.Array], *, step=None, rate=None, token_weights=None) -> Corrupted:
        """As `Objective.__call__`; `rate` fixes the masking probability of every row."""
        if token_weights is not None or self.sampling == "uniform":
            return super().__call__(key, batch, step=step, rate=rate, token_weights=token_weights)
        rows = rows_from_batch(batch, self.length, self.name, self.needs)
        epoch = jnp.asarray(batch["epoch"], jnp.int32)
        return _diffuse(self, key, rows, epoch, jnp.asarray(batch["example_id"], jnp.int32), self.rate_at(step, rate))

    @property
    def never_hidden(self) -> tuple[int, ...]:
        return self.avoid

    def transform_logits(self, logits, corrupted):
        """The mask token can never be the answer: its logit is minus infinity."""
        return losses.suppress(logits, self.vocabulary.mask)


@partial(jax.jit, static_argnums=0)
def _diffuse(objective: MaskedDiffusion, key, rows: Row, epoch, example_id, rate) -> Corrupted:
    keys = randomness.row_keys(key, epoch, example_id, objective.static_copies)
    times = objective.times(key, keys, epoch, example_id)
    return jax.vmap(partial(objective.diffuse, rate=rate))(keys, rows, times)


def diffusion(
    vocabulary: Vocabulary,
    length: int,
    *,
    compat: str = "llada",
    epsilon: float = 1e-3,
    sampling: str | None = None,
    keep_markers: bool = False,
    static_copies: int = 0,
) -> MaskedDiffusion:
    """Masked (absorbing) diffusion (MDLM: Sahoo et al. 2024; LLaDA: Nie et al. 2025).

    Each row draws t; each token is masked with probability p(t); the loss is the cross-entropy of the masked tokens
    divided by p (LLaDA) or by t (MDLM), summed, over the number of all tokens. Its expectation bounds the negative
    log-likelihood per token.

    Args:
      compat: `llada`: p = (1 - epsilon) t + epsilon, weight 1 / p, t uniform. `mdlm`: t = (1 - epsilon) u + epsilon,
        p = (1 - epsilon) t (log-linear noise), weight 1 / t, low-discrepancy u within the batch.
      epsilon: keeps the rate off 0, where the weight is unbounded.
      sampling: `uniform` = each row its own t; `batch` = rows of one batch evenly spread, which lowers the variance but
        ties a row's t to its place in the batch; `epochs` = each example's t spread evenly over epochs, tied to the
        example only. By default what `compat` uses.
      keep_markers: never mask special tokens. Neither reference does this; padding is never masked.

    >>> diffusion(Vocabulary(size=100, pad=0, mask=4), 16).budget
    16
    """
    vocabulary.require("mask", "diffusion")
    if compat not in ("llada", "mdlm"):
        raise ValueError(f"compat={compat!r}: expected 'llada' or 'mdlm'")
    epsilon = check_fraction("epsilon", epsilon)
    if not 0.0 < epsilon < 0.5:
        raise ValueError(f"epsilon={epsilon:g}: expected above 0 and below 0.5; at 0 the loss weight is unbounded")
    sampling = sampling or ("batch" if compat == "mdlm" else "uniform")
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling={sampling!r}: expected one of {', '.join(SAMPLINGS)}")
    if sampling == "epochs" and static_copies:
        raise ValueError("sampling='epochs' draws anew every epoch: drop static_copies")
    length = check_length(length)
    return MaskedDiffusion(
        "diffusion", vocabulary, length, length, static_copies=static_copies,
        description=f"diffusion: {compat}, epsilon {epsilon:g}, t {sampling}",
        convention=compat, epsilon=epsilon, sampling=sampling,
        avoid=vocabulary.special_ids if keep_markers else vocabulary.ids(("pad",)),
    )
