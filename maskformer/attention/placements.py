"""Attention over a device mesh: batch and heads stay on their devices, a sharded sequence is computed in parts.

`Placement` says which mesh axes carry the batch, the heads and the sequence; `use` makes it hold for every
`dot_product_attention` traced inside, so that a model needs no plumbing. The call then runs under `jax.shard_map`:
nothing is gathered for a batch or head axis, and a sequence axis goes to `maskformer.attention.context`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from maskformer import masks
from maskformer.attention.arguments import Call
from maskformer.checks import nearest, shown
from maskformer.masks.expression import pytree

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which mesh axes carry what.

    Attributes:
      mesh: the mesh.
      batch: axis or axes of the batch, e.g. ``("data", "fsdp")``.
      heads: axis of the heads; it must divide the key heads.
      context: axis of the sequence, for queries and keys alike.
      context_method: ``"all_gather"`` (every device gathers all keys and values) or ``"ring"`` (they travel; memory per
        device falls with the axis).
      balanced: give each device an early and a late part of the queries, so that causal work is even. Inputs and
        outputs stay in natural order either way.
      first, apart: dropout and score_mods count the call's rows on the first device from `first` on, which may be
        traced, and those of each further device from `apart` after those of the one before; None: without a gap.
    """

    mesh: Mesh
    batch: Axes = None
    heads: Axes = None
    context: str | None = None
    context_method: str = "all_gather"
    balanced: bool = True
    first: int | jax.Array = 0
    apart: int | None = None

    def __post_init__(self):
        for name in ("batch", "heads", "context"):
            axes = getattr(self, name)
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                if axis not in self.mesh.shape:
                    near = nearest(axis, self.mesh.shape)
                    raise ValueError(
                        f"Placement {name}: the mesh has axes {tuple(self.mesh.shape)}, not {shown(axis)}{near}"
                    )
        if self.context_method not in ("all_gather", "ring"):
            raise ValueError(
                f"context_method: expected 'all_gather' or 'ring', got {shown(self.context_method)}"
                f"{nearest(self.context_method, ('all_gather', 'ring'))}"
            )

    def size(self, axes: Axes) -> int:
        """The number of shards along mesh axes."""
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(self.mesh.shape[axis] for axis in axes)


_placement: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("attention_placement", default=None)


def current() -> Placement | None:
    """The placement in force."""
    return _placement.get()


@contextlib.contextmanager
def use(placement: Placement | None) -> Iterator[None]:
    """Makes a placement hold for every attention call traced inside; None takes it away."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def attend(call: Call, placement: Placement, local: Callable[[Call], Any]) -> tuple[jax.Array, jax.Array]:
    """Runs ``local`` on each device's share of the call, under `jax.shard_map`.

    Inside of a `jax.shard_map` over other axes, whose mesh the placement then has, it maps those that are left.

    Raises:
      ValueError: if a mesh axis does not divide the dimension it carries.
    """
    _check(call, placement)
    call = dataclasses.replace(call, batch_start=placement.first)
    batch, heads, context = placement.batch, placement.heads, placement.context
    sequence = PartitionSpec(batch, context, heads, None)

    def along(size: int, full: int, axes: Axes) -> Axes:
        return axes if size == full and size > 1 else None

    def bias_spec(bias):
        sizes = (call.batch, call.heads, call.q_len)
        return PartitionSpec(*(along(*pair) for pair in zip(bias.shape, sizes, (batch, heads, context))), None)

    # Heads whose masks are different expressions cannot be sliced as arrays: each device picks its own.
    picks_heads = call.mask is not None and call.mask.has_per_head and placement.size(heads) > 1

    def mask_spec(array, rank):
        lead = array.shape[: array.ndim - rank]
        axes = [along(size, full, axis) for size, full, axis in zip(lead, (call.batch, call.heads), (batch, heads))]
        return PartitionSpec(*(axes[:1] if picks_heads else axes))

    # What is not named here is on every device.
    specs = dataclasses.replace(
        jax.tree.map(lambda _: PartitionSpec(), call),
        query=sequence,
        key=sequence,
        value=sequence,
        mask=None if call.mask is None else map_arrays(call.mask, mask_spec),
        bias=None if call.bias is None else bias_spec(call.bias),
        sink_logits=None if call.sink_logits is None else PartitionSpec(heads),
    )

    def shard(mine: Call):
        local_batch, _, local_heads, _ = mine.query.shape
        head_start = _index(heads) * local_heads
        mask = HeadsFrom(mine.mask, head_start, local_heads) if picks_heads and mine.mask is not None else mine.mask
        batch_start = mine.batch_start + _index(batch) * (placement.apart or local_batch)
        return local(dataclasses.replace(mine, mask=mask, batch_start=batch_start, head_start=head_start))

    run = jax.shard_map(
        shard,
        mesh=placement.mesh,
        axis_names=set(placement.mesh.axis_names) - set(placement.mesh.manual_axes),
        in_specs=(specs,),
        out_specs=(sequence, PartitionSpec(batch, context, heads)),
        check_vma=False,  # Pallas kernels state no varying axes
    )
    return run(call)


def _index(axes: Axes) -> Any:
    return jax.lax.axis_index(axes) if axes else 0


def _check(call: Call, placement: Placement) -> None:
    sizes = [
        ("batch", call.batch, placement.batch),
        ("heads", call.heads, placement.heads),
        ("kv_heads", call.kv_heads, placement.heads),
        ("q_len", call.q_len, placement.context),
        ("kv_len", call.kv_len, placement.context),
    ]
    for name, size, axes in sizes:
        if size % placement.size(axes):
            raise ValueError(f"{name}: {size} is not divisible by mesh axes {axes} of size {placement.size(axes)}")


def map_arrays(mask: masks.Mask, function: Callable[[Any, int], Any]) -> masks.Mask:
    """The mask's pytree with ``function(array, rank)`` in the place of each array."""
    children = mask.children()
    node = mask.rebuild([map_arrays(child, function) for child in children]) if children else mask
    if isinstance(mask, masks.Shift):
        return masks.Shift(node.children()[0], jax.tree.map(lambda _: PartitionSpec(), mask.by))
    return node if children else node.select_leaf(function)


@functools.partial(pytree, data=["term", "start"], static=["heads"])
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HeadsFrom(masks.Mask):
    """Heads ``start, start + 1, ...`` of a mask whose heads are different expressions."""

    term: masks.Mask
    start: Any
    heads: int

    @property
    def lead(self) -> tuple[int, ...]:
        return (self.term.shape[0], self.heads)

    def select(self, b: Any = 0, h: Any = 0) -> masks.Mask:
        return self.term.select(b, h + self.start)

    def check_lengths(self, q_len: int, kv_len: int, q_offset: Any = 0) -> None:
        self.term.check_lengths(q_len, kv_len, q_offset)
