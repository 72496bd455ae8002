"""Which backend computes a call, and why not the others.

`choose` is the only place that decides; `run` does what it returns and `explain` prints it, so the two cannot disagree.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import types
from collections.abc import Iterator

import jax

from maskformer.attention import blockwise, context, cudnn, placements, platform, reference, splash, tokamax
from maskformer.attention.arguments import Call
from maskformer.checks import nearest, shown

BACKENDS: dict[str, types.ModuleType] = {
    "splash": splash,
    "cudnn": cudnn,
    "tokamax": tokamax,
    "reference": reference,
    "blockwise": blockwise,
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


_record: contextvars.ContextVar[list | None] = contextvars.ContextVar("attention_choices", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Choice]]:
    """Collects the choices made inside."""
    choices: list[Choice] = []
    token = _record.set(choices)
    try:
        yield choices
    finally:
        _record.reset(token)


def choose(call: Call, implementation: str | None = None) -> Choice:
    """Picks the backend: the first in the order of `BACKENDS` that honours the call and is worth taking.

    Raises:
      ValueError: if ``implementation`` is unknown, or cannot honour the call.
    """
    if implementation is not None:
        if not isinstance(implementation, str) or implementation not in BACKENDS:
            raise ValueError(
                f"implementation: expected one of {', '.join(BACKENDS)}, or None, got {shown(implementation)}"
                f"{nearest(implementation, BACKENDS)}"
            )
        reason = BACKENDS[implementation].refuses(call)
        if reason is not None:
            raise ValueError(
                f"implementation {implementation!r} cannot honour this call: {reason}; "
                "implementation=None picks a backend that can"
            )
        against = BACKENDS[implementation].prefers(call)
        return Choice(implementation, "asked for by name" + (f"; {against}" if against else ""), {})
    passed_over = {}
    for name, backend in BACKENDS.items():
        reason = backend.prefers(call) or backend.refuses(call)
        if reason is None:
            return Choice(name, f"the first that honours the call on {platform.current()}", passed_over)
        passed_over[name] = reason
    # Only a call with an axis of length 0 comes here: it has no blocks.
    return Choice("reference", "what is left", {k: v for k, v in passed_over.items() if k != "reference"})


def run(call: Call, implementation: str | None) -> tuple[jax.Array, jax.Array | None]:
    """Computes a call, over the devices of the placement in force."""
    placement = placements.current()
    if placement is None:
        return _run_local(call, implementation)
    if placement.size(placement.context) == 1:
        return placements.attend(call, placement, functools.partial(_run_local, implementation=implementation))
    if placement.context_method == "ring" and implementation not in (None, "blockwise"):
        raise ValueError(
            f"implementation {implementation!r} cannot honour this call: its keys travel round mesh axis "
            f"{placement.context!r}, which blockwise alone can compute; context_method='all_gather' takes any backend"
        )
    run_context = functools.partial(_run_context, implementation=implementation, placement=placement)
    return placements.attend(call, placement, run_context)


def _run_local(call: Call, implementation: str | None, after: str = ""):
    choice = choose(call, implementation)
    _note(dataclasses.replace(choice, why=choice.why + after))
    output, residual = BACKENDS[choice.backend].attend(call)
    if residual is None:
        # Backends without a logsumexp refuse calls that ask for it; a constant keeps the two results of a shard.
        residual = jax.numpy.zeros(output.shape[:3])
    return output, residual


def _run_context(call: Call, implementation: str | None, placement: placements.Placement):
    axis = placement.context
    assert axis is not None
    devices = placement.size(axis)
    if placement.context_method == "all_gather":
        after = f", all_gather over mesh axis {axis!r}"
        local = functools.partial(_run_local, implementation=implementation, after=after)
        return context.all_gather(call, axis, devices, balanced=placement.balanced, local=local)
    reason = blockwise.refuses(call)
    if reason is not None:
        raise ValueError(f"attention over mesh axis {axis!r}: {reason}")
    travel = f"its keys travel round mesh axis {axis!r}, which blockwise alone can compute"
    others = {name: travel for name in BACKENDS if name != "blockwise"}
    _note(Choice("blockwise", f"ring over mesh axis {axis!r}", others))
    return context.ring(call, axis, devices, balanced=placement.balanced)


def _note(choice: Choice) -> None:
    choices = _record.get()
    if choices is not None:
        choices.append(choice)
