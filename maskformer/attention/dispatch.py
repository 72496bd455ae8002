"""Which backend computes a call, and why not the others.

`choose` is the only place that decides; `dot_product_attention` runs what it returns and `explain` prints it, so the
two cannot disagree.
"""

from __future__ import annotations

import dataclasses
import types

import jax

from maskformer.attention import blockwise, reference, splash
from maskformer.attention.arguments import Call

BACKENDS: dict[str, types.ModuleType] = {
    "splash": splash,
    "blockwise": blockwise,
    "reference": reference,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend of a call.

    Attributes:
      backend: its name.
      why: the reason, as a sentence part.
      passed_over: for each backend that comes earlier in the order of preference, the reason it was not taken.
    """

    backend: str
    why: str
    passed_over: dict[str, str]


def choose(call: Call, implementation: str | None = None) -> Choice:
    """Picks the backend.

    Raises:
      ValueError: if ``implementation`` is unknown, or cannot honour the call.
    """
    if implementation is not None:
        if implementation not in BACKENDS:
            raise ValueError(f"implementation: expected one of {', '.join(BACKENDS)}, or None, got {implementation!r}")
        reason = BACKENDS[implementation].refuses(call)
        if reason is not None:
            raise ValueError(f"implementation {implementation!r} cannot honour this call: {reason}; "
                             "implementation=None picks a backend that can")
        return Choice(implementation, "asked for by name", {})
    return Choice("reference", "the only backend", {})
