"""What each layer is declared to read: the objective's mask, and-ed with the model's own where there is a model."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import jax

from maskformer.masks import Mask
from maskformer.models import Params
from maskformer.objectives import Corrupted, CorruptedPair, Objective
from maskformer.objectives.rows import Reads

Example: TypeAlias = Corrupted | CorruptedPair
Layers: TypeAlias = tuple[tuple[Reads, ...], ...]


class Network(Protocol):
    """What is asked of an inspected model, in the words of `models.Model`: one stack, whatever stands beside it."""

    def init(self, key: jax.Array) -> Params: ...

    def apply(self, params: Params, *inputs: Any, **options: Any) -> jax.Array: ...

    def layer_masks(self, mask: Mask | None, segment_ids: jax.Array | None) -> tuple[Mask | None, ...]: ...

    def flops_per_token(self, length: int, *counts: Any, **options: Any) -> float: ...


def declared_layers(objective: Objective, example: Example, model: Network | None, layers: int) -> Layers:
    """What is read in every layer, the first one first.

    Args:
      objective: whose mask it is.
      example: what it made of a batch.
      model: one stack with masks of its own, and as many layers as it has; or None.
      layers: of each stack, where there is no model.

    Raises:
      ValueError: a model is one stack, and the objective feeds two.
    """
    check_single_stack(objective, model)
    declared = objective.attend(example)
    if model is None:
        return tuple(stack for stack in example.stacks(declared) for _ in range(layers))
    own: tuple[Any, ...] = model.layer_masks(declared, example.sides()[-1].segment_ids)
    return tuple(stack for mask in own for stack in example.stacks(mask))


def check_single_stack(objective: Objective, model: object) -> None:
    """ValueError where a model of one stack is given for an objective that makes pairs."""
    if objective.makes_pairs and model is not None:
        raise ValueError(
            f"objective '{objective.name}' feeds an encoder-decoder: leave model and apply out, or build it with "
            "layout='prefix' to run it on one stack"
        )
