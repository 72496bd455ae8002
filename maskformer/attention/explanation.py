"""`Explanation`: what `dot_product_attention` would do with a call, from the dispatcher's own decision."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from maskformer.attention import arguments, dispatch


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a call runs.

    Attributes:
      backend: the backend that runs, or None where the one asked for refuses.
      why: why this one.
      passed_over: the backends preferred to it, each with the reason it was not taken.
      platform: the platform that decided the order of preference.
      details: further facts, in order of printing.
    """

    backend: str | None
    why: str
    passed_over: dict[str, str]
    platform: str
    details: dict[str, Any]

    def __str__(self) -> str:
        lines = [f"backend: {self.backend} ({self.why})"]
        lines += [f"passed over {name}: {reason}" for name, reason in self.passed_over.items()]
        lines += [f"{name}: {value}" for name, value in self.details.items()]
        return "\n".join(lines)


def explain_call(mask, query, key, value, implementation: str | None, options: dict[str, Any]) -> Explanation:
    call = arguments.check(query, key, value, mask=mask, **options)
    choice = dispatch.choose(call, implementation)
    return Explanation(choice.backend, choice.why, choice.passed_over, jax.default_backend(), {})
