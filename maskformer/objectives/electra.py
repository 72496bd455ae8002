"""ELECTRA's data side: what the generator reads, and what the discriminator reads and is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maskformer.checks import choose, number
from maskformer.objectives import randomness
from maskformer.objectives.counting import Count, check_copies, check_length, check_rate, check_slots
from maskformer.objectives.objective import Objective
from maskformer.objectives.replace import Replace, check_policy
from maskformer.objectives.rows import Corrupted, Selection
from maskformer.objectives.select import ORDER
from maskformer.objectives.vocabulary import Vocabulary, is_any_of

SAMPLE = 90
QUESTIONS = ("all", "masked")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Discrimination:
    """What the discriminator reads and answers: was this token replaced? All `[batch, length]`.

    `labels` float32, 1 where the input differs from the original token; a sample that equals it counts as original.
    `loss_weights` float32, 1 on every token that is asked about: all that are not padding, or those that were masked.
    """

    input_tokens: jax.Array
    labels: jax.Array
    loss_weights: jax.Array


@dataclass(frozen=True, eq=False)
class Electra(Objective):
    """The generator's masked language modelling, and `discriminate` for the second network.

    The generator's positions are drawn with replacement (ELECTRA, `pretrain_helpers.py`): one position may fill
    two slots and then counts twice in the generator's loss.
    """

    task = "electra"
    trains_generator = True

    replacement: tuple[float, float, float] = (1.0, 1.0, 1.0)
    count: Count = None  # type: ignore[assignment]
    replace: Replace = None  # type: ignore[assignment]
    avoid: tuple[int, ...] = ()
    discriminator_weight: float = 50.0
    discriminate_at: str = "all"

    @property
    def shows_mask(self) -> bool:  # type: ignore[override]
        return self.replacement[0] > 0

    def row(self, key, row, rate, token_weights):
        member = row.valid & ~is_any_of(row.tokens, self.avoid, self.vocabulary.size)
        number = jnp.sum(member, dtype=jnp.int32)
        picks = randomness.integers(key, ORDER, (self.budget,), number)
        # The r-th member position, by its rank among members.
        positions = jnp.searchsorted(jnp.cumsum(member), picks + 1).astype(jnp.int32)
        used = (jnp.arange(self.budget) < self.count(key, row.size, rate)) & (number > 0)
        slot = jnp.where(used, positions, row.tokens.shape[0])
        chosen = jnp.zeros(row.tokens.shape, bool).at[slot].set(True, mode="drop")
        tokens, kinds = self.replace(key, row.tokens, Selection(chosen))
        positions = jnp.where(used, positions, 0)
        return Corrupted(
            input_tokens=tokens, segment_ids=row.segment_ids, positions=row.positions,
            predict_positions=positions,
            target_tokens=jnp.where(used, row.tokens[positions], self.vocabulary.pad or 0),
            loss_weights=used.astype(jnp.float32),
            kinds=jnp.where(used, kinds[positions], 0).astype(jnp.int8),
            selected=chosen,
        )

    def row_keys(self, key: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Keys `[batch]` of the rows, which their corruption and their samples are drawn from.

        Args:
          key: the run's key, as given to the objective.
        """
        epoch, example_id = (jnp.asarray(batch[name], jnp.int32) for name in ("epoch", "example_id"))
        return randomness.row_keys(key, epoch, example_id, self.static_copies)

    def discriminate(
        self, keys: jax.Array, tokens: jax.Array, corrupted: Corrupted, logits: jax.Array
    ) -> Discrimination:
        """Fills the generator's positions with samples from its own logits.

        Args:
          keys: from `row_keys`, of the rows that were corrupted.
          tokens: int `[batch, length]`, their text.
          corrupted: what the objective made of them.
          logits: `[batch, budget, vocabulary]` of the generator; no gradient flows through the samples.

        Where one position fills two slots, the first slot's sample stands (the reference averages the two ids, which
        is a third, unrelated token).
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        inputs = _fill(keys, tokens, corrupted, jax.lax.stop_gradient(logits))
        return Discrimination(inputs, (inputs != tokens).astype(jnp.float32), self.questions(corrupted))

    def questions(self, corrupted: Corrupted) -> jax.Array:
        """float32 `[batch, length]`: 1 on every token that the discriminator is asked about."""
        asked = corrupted.segment_ids > 0 if self.discriminate_at == "all" else corrupted.selected
        return jnp.asarray(asked, jnp.float32)

    def discriminator_loss(
        self, logits: jax.Array, discrimination: Discrimination
    ) -> tuple[jax.Array, jax.Array]:
        """(sum of binary cross-entropies, number of tokens) of `logits` `[batch, length]`, in float32.

        The joint loss is generator mean + `discriminator_weight` (50) * discriminator mean.
        """
        logits = jnp.where(discrimination.loss_weights > 0, logits.astype(jnp.float32), 0.0)
        losses = jax.nn.softplus(logits) - logits * discrimination.labels
        return jnp.sum(losses * discrimination.loss_weights), jnp.sum(discrimination.loss_weights)


@jax.jit
def _fill(keys, tokens, corrupted, logits) -> jax.Array:
    """The batch's tokens with the generator's samples in its positions, int32 `[batch, length]`."""

    def fill(key, tokens, positions, weights, logits):
        noise = randomness.uniform(key, SAMPLE, logits.shape)
        gumbel = -jnp.log(-jnp.log(jnp.maximum(noise, 2.0**-25)))
        sampled = jnp.argmax(logits.astype(jnp.float32) + gumbel, axis=-1).astype(jnp.int32)
        # The first of two slots at one position has the say.
        length = tokens.shape[0]
        slot = jnp.arange(positions.shape[0])
        at = jnp.where(weights > 0, positions, length)
        first = jnp.full(length, positions.shape[0], jnp.int32).at[at].min(slot, mode="drop")
        filled = first < positions.shape[0]
        return jnp.where(filled, sampled[jnp.minimum(first, positions.shape[0] - 1)], tokens)

    return jax.vmap(fill)(keys, tokens, corrupted.predict_positions, corrupted.loss_weights, logits)


def electra(
    vocabulary: Vocabulary,
    length: int,
    *,
    rate: float = 0.15,
    replacement: Sequence[float] = (0.85, 0.0, 0.15),
    max_predictions: int | None = None,
    discriminator_weight: float = 50.0,
    discriminate_at: str = "all",
    static_copies: int = 0,
) -> Electra:
    """Replaced token detection (Clark et al. 2020; `pretrain_helpers.py`).

    max(1, round(rate * size)) slots per row, drawn with replacement from all tokens but `cls sep mask pad`; a slot is
    masked with probability 0.85 for the generator. A random id is never used there.

    Args:
      rate, replacement, max_predictions, static_copies: as in `mlm`.
      discriminator_weight: factor of the discriminator's mean loss beside the generator's.
      discriminate_at: `all` tokens, or only the `masked` ones ("ELECTRA 15%" of the paper's table 5).

    >>> electra(Vocabulary(size=100, pad=0, mask=4), 128).budget
    19
    """
    length, rate, policy = check_length(length), check_rate("rate", rate), check_policy(replacement)
    check_copies(static_copies)
    vocabulary.require("mask", "electra")
    check_slots(max_predictions, length)
    choose("discriminate_at", discriminate_at, QUESTIONS)
    number("discriminator_weight", discriminator_weight, "a factor of at least 0 and below 1e30", 0.0, 1e30)
    count = Count("round", rate, length, minimum=1, maximum=max_predictions)
    return Electra(
        "electra", vocabulary, length, count.largest(), rate, static_copies,
        description=f"electra: rate {rate:g}, (mask, random, keep) {policy}, asks about {discriminate_at} tokens",
        count=count, replace=Replace(policy, vocabulary.mask, vocabulary.size),
        avoid=vocabulary.marker_ids,
        discriminator_weight=float(discriminator_weight),
        discriminate_at=discriminate_at,
        replacement=policy,
    )
