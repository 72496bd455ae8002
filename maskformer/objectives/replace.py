"""What stands at the selected positions: `replace(key, tokens, selection) -> (tokens, kinds)`, a pure function."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import shown
from maskformer.objectives import randomness
from maskformer.objectives.counting import check_fraction
from maskformer.objectives.rows import KEEP, MASK, RANDOM, Selection

# Stages of the row key.
DECISION, RANDOM_ID = 20, 21


@dataclass(frozen=True, eq=False)
class Replace:
    """`[MASK]`, a random id, or the token itself, with probabilities `policy`.

    Args:
      policy: (mask, random, keep), summing to 1.
      mask_id: id of the mask token; may be None when the policy never masks.
      vocabulary_size: random ids are uniform over all ids but those in `never`.
      never: ids that a random replacement does not use. The original token is not excluded.
      per_unit: one decision for a whole unit (SpanBERT) in place of one per token. Random ids always
        differ from token to token.
    """

    policy: tuple[float, float, float]
    mask_id: int | None
    vocabulary_size: int
    never: tuple[int, ...] = ()
    per_unit: bool = False

    def __post_init__(self):
        check_policy(self.policy)
        if self.vocabulary_size <= len(set(self.never)) and self.policy[1] > 0:
            raise ValueError("replacement: every id is special, so no random token can be drawn")

    def random_ids(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """int32 of `shape`, uniform over the ids that are not in `never`."""
        never = np.array(sorted(set(self.never)), np.int32)
        drawn = randomness.integers(key, RANDOM_ID, shape, self.vocabulary_size - len(never))
        if len(never):
            # The r-th allowed id is r plus the number of forbidden ids at or below it.
            below = jnp.searchsorted(never - np.arange(len(never), dtype=np.int32), drawn, side="right")
            drawn += below.astype(jnp.int32)
        return drawn

    def __call__(self, key: jax.Array, tokens: jax.Array, selection: Selection) -> tuple[jax.Array, jax.Array]:
        """Replaced tokens int32 `[length]` and kinds int8 `[length]` (meaningful where selected)."""
        mask, random, keep = self.policy
        if mask == 1.0:
            kinds = jnp.zeros(tokens.shape, jnp.int8)
        else:
            draw = randomness.bits(key, DECISION, tokens.shape)
            if self.per_unit and selection.unit is not None:
                draw = draw[selection.unit]
            touched = randomness.below(draw, mask + random if keep else 1.0)
            kinds = jnp.where(randomness.below(draw, mask), MASK, jnp.where(touched, RANDOM, KEEP)).astype(jnp.int8)
        replaced = tokens
        if mask > 0.0:
            replaced = jnp.where(kinds == MASK, self.mask_id, replaced)
        if random > 0.0:
            replaced = jnp.where(kinds == RANDOM, self.random_ids(key, tokens.shape), replaced)
        return jnp.where(selection.chosen, replaced, tokens), kinds


def check_policy(policy) -> tuple[float, float, float]:
    """(mask, random, keep) as floats; ValueError unless each is a fraction and they sum to 1."""
    try:
        policy = tuple(policy)
    except TypeError:
        policy = (policy,)
    if len(policy) != 3:
        raise ValueError(f"replacement={shown(policy)}: expected (mask, random, keep), such as (0.8, 0.1, 0.1)")
    policy = tuple(check_fraction(f"replacement[{i}]", p) for i, p in enumerate(policy))
    if abs(sum(policy) - 1.0) > 1e-6:
        raise ValueError(f"replacement={policy}: (mask, random, keep) sums to {sum(policy):g}, expected 1")
    return policy
