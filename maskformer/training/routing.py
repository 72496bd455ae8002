"""What the routers of a model's experts add to a token task: two terms of the loss, and what is told of the balance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.models.encoder_config import EncoderConfig
from maskformer.models.experts import Routing, balance_sum, load

Pair = tuple[jax.Array, jax.Array]  # a sum and its weight

# Of `Routers.evaluation_sums`: what `Routers.finish` makes metrics of, [2, layers, experts].
COUNTS = "expert_counts"


@dataclasses.dataclass(frozen=True)
class Routers:
    """The routers of a model of this shape; false where it has none, and then nothing is added.

    The balance of experts is a product of two means over the batch, of which one, the shares that the experts were
    chosen in, has no gradient. Whoever asks for a term of a part of a batch gives the choices of all of it: then the
    term is that of the whole batch, on any number of devices and in any number of parts.
    """

    config: EncoderConfig

    def __bool__(self) -> bool:
        return bool(self.config.experts)

    @property
    def factors(self) -> dict[str, float]:
        """Term -> factor. A term is a mean over tokens and layers, and what is minimised has a part for every layer.

        >>> Routers(EncoderConfig(vocab_size=100, layers=12, experts=8, moe_period=2, router_z_loss=0.0)).factors
        {'balance_loss': 0.06, 'router_z_loss': 0.0}
        """
        if not self:
            return {}
        config, layers = self.config, self.config.expert_layers
        return {"balance_loss": config.balance_loss * layers, "router_z_loss": config.router_z_loss * layers}

    @property
    def means(self) -> tuple[str, ...]:
        """Names of what `recorded` gives."""
        return ("expert_load", *(("dropped",) if self._drops else ())) if self else ()

    @property
    def _drops(self) -> bool:
        return self.config.expert_capacity is not None

    def weights(self, segment_ids: jax.Array) -> dict[str, jax.Array]:
        """Denominators of the terms: tokens that are not padding, by layers with experts."""
        if not self:
            return {}
        tokens = jnp.sum(segment_ids > 0, dtype=jnp.int32).astype(jnp.float32)
        return dict.fromkeys(self.factors, tokens * self.config.expert_layers)

    def terms(self, routing: Routing, assigned: jax.Array) -> dict[str, jax.Array]:
        """Sums of the terms.

        Args:
          routing: of a part of a batch, or of all of it.
          assigned: [layers, experts] of all of it.
        """
        return {"balance_loss": balance_sum(routing, assigned), "router_z_loss": jnp.sum(routing.z)}

    def recorded(self, routing: Routing, assigned: jax.Array) -> dict[str, Pair]:
        """Sums and weights of what is recorded beside the terms; arguments as of `terms`."""
        choices = jnp.sum(routing.assigned)
        pairs = {"expert_load": (load(assigned) * choices, choices), "dropped": (jnp.sum(routing.dropped), choices)}
        return {name: pairs[name] for name in self.means}

    def evaluation_sums(self, routing: Routing) -> dict[str, jax.Array]:
        """What a batch adds to the sums over a split, of which `finish` makes metrics."""
        choices = jnp.sum(routing.assigned)
        sums = {
            COUNTS: jnp.stack([routing.assigned, routing.probability]),
            "router_z_loss": jnp.stack([jnp.sum(routing.z), choices / self.config.experts_per_token]),
        }
        return {**sums, "dropped": jnp.stack([jnp.sum(routing.dropped), choices])} if self._drops else sums

    def finish(self, totals: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The totals that are a sum and a weight, and what no such pair gives: balance and load of the whole split."""
        pairs = dict(totals)
        if not self:
            return pairs, {}
        assigned, probability = pairs.pop(COUNTS)
        if not np.all(assigned.sum(-1) > 0):
            return pairs, {}
        share, mean = (x / x.sum(-1, keepdims=True) for x in (assigned, probability))
        balance = self.config.experts * (share * mean).sum(-1).mean()
        return pairs, {"balance_loss": float(balance), "expert_load": float(load(assigned))}


def describe(metrics: Mapping[str, float]) -> str:
    """The end of a log line or of an evaluation's, in a few words.

    >>> describe({"loss": 3.2, "expert_load": 1.254, "dropped": 0.031}), describe({"loss": 3.2})
    (' load 1.25 dropped 3.1%', '')
    """
    said = f" load {metrics['expert_load']:.2f}" if "expert_load" in metrics else ""
    return said + (f" dropped {metrics['dropped']:.1%}" if "dropped" in metrics else "")
