"""The platform that backends are chosen for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from maskformer.checks import nearest, shown

_assumed: contextvars.ContextVar[str | None] = contextvars.ContextVar("assumed_platform", default=None)


def current() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: the assumed platform, or JAX's default backend."""
    return _assumed.get() or jax.default_backend()


@contextlib.contextmanager
def assume(platform: str) -> Iterator[None]:
    """Chooses backends as on another platform, to compile ahead of time for a machine that is not this one.

    Raises:
      ValueError: for a name other than cpu, gpu or tpu.

    >>> with assume("tpu"):
    ...     current()
    'tpu'
    """
    if platform not in ("cpu", "gpu", "tpu"):
        near = nearest(platform, ("cpu", "gpu", "tpu"))
        raise ValueError(f"platform: expected 'cpu', 'gpu' or 'tpu', got {shown(platform)}{near}")
    token = _assumed.set(platform)
    try:
        yield
    finally:
        _assumed.reset(token)
