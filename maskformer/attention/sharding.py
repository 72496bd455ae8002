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
    """

    mesh: Mesh
    batch: Axes = None
    heads: Axes = None
    context: str | None = None
    context_method: str = "all_gather"
    balanced: bool = True

    def __post_init__(self):
        for name in ("batch", "heads", "context"):
            axes = getattr(self, name)
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                if axis not in self.mesh.shape:
                    raise ValueError(f"Placement {name}: the mesh has axes {tuple(self.mesh.shape)}, not {axis!r}")
        if self.context_method not in ("all_gather", "ring"):
            raise ValueError(f"context_method: expected 'all_gather' or 'ring', got {self.context_method!r}")

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

    Raises:
      ValueError: if a mesh axis does not divide the dimension it carries.
    """
    _check(call, placement)
    batch, heads, context = placement.batch, placement.heads, placement.context
    sequence = PartitionSpec(batch, context, heads, None)
    whole = PartitionSpec()

    def along(size: int, full: int, axes: Axes) -> Axes:
        return axes if size == full and size > 1 else None

    def bias_spec(bias):
        sizes = (call.batch, call.heads, call.q_len)
        return PartitionSpec(*(along(*pair) for pair in zip(bias.shape, sizes, (batch, heads, context))), None)

    # Heads whose masks are different expressions cannot be sliced as arrays: each device picks its own.
    picks_heads = call.mask is not None and masks_per_head(call.mask) and placement.size(heads) > 1

    def mask_spec(mask):
        if mask is None:
            return None

        def spec(array, rank):
            lead = array.shape[: array.ndim - rank]
            axes = [along(size, full, axis) for size, full, axis in zip(lead, (call.batch, call.heads), (batch, heads))]
            return PartitionSpec(*(axes[:1] if picks_heads else axes))

        return map_arrays(mask, spec)

    arrays = dict(
        query=call.query,
        key=call.key,
        value=call.value,
        mask=call.mask,
        bias=call.bias,
        sinks=call.sinks,
        seed=call.seed,
        captured=call.score_mod.captured if call.score_mod else (),
        scale=call.scale if isinstance(call.scale, jax.Array) else None,
        q_offset=call.q_offset if isinstance(call.q_offset, jax.Array) else None,
    )
    specs = dict(
        query=sequence,
        key=sequence,
        value=sequence,
        mask=mask_spec(call.mask),
        bias=None if call.bias is None else bias_spec(call.bias),
        sinks=None if call.sinks is None else PartitionSpec(heads),
        seed=None if call.seed is None else whole,
        captured=tuple(whole for _ in arrays["captured"]),
        scale=None if arrays["scale"] is None else whole,
        q_offset=None if arrays["q_offset"] is None else whole,
    )

    def shard(arrays):
        mine = {name: arrays[name] for name in ("query", "key", "value", "mask", "bias", "sinks", "seed")}
        local_batch, _, local_heads, _ = mine["query"].shape
        head_start = _index(heads) * local_heads
        if picks_heads:
            mine["mask"] = HeadsFrom(mine["mask"], head_start, local_heads)
        return local(
            dataclasses.replace(
                call,
                **mine,
                scale=call.scale if arrays["scale"] is None else arrays["scale"],
                q_offset=call.q_offset if arrays["q_offset"] is None else arrays["q_offset"],
                score_mod=call.score_mod and dataclasses.replace(call.score_mod, captured=arrays["captured"]),
                batch_start=_index(batch) * local_batch,
                head_start=head_start,
            )
        )

    run = jax.shard_map(
        shard,
        mesh=placement.mesh,
        in_specs=(specs,),
        out_specs=(sequence, PartitionSpec(batch, context, heads)),
        check_vma=False,  # Pallas kernels state no varying axes
    )
    return run(arrays)


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


def masks_per_head(mask: masks.Mask) -> bool:
    """Whether heads follow different expressions somewhere in the mask."""
    return isinstance(mask, masks.PerHead) or any(map(masks_per_head, mask.children()))


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
