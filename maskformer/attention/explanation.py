"""`Explanation`: what `dot_product_attention` would do with a call, from the dispatcher's own decision."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from maskformer.attention import arguments, blocks, dispatch, placements, platform
from maskformer.attention.arguments import Call


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a call runs.

    Attributes:
      backend: the backend that runs, or None where the one asked for refuses or the call cannot be placed.
      why: why this one, or why none.
      passed_over: the backends preferred to it, each with the reason it was not taken.
      platform: the platform that the order of preference is for.
      block: tile size ``(block_q, block_kv)`` of the figures below; the backend's own where it is blockwise and has the
        whole sequence.
      band: tiles of a row that blockwise visits at once, empty ones among them; None where it visits them one by one.
      density: share of the logits that lie in visited tiles, in [0, 1]; None where the mask is traced.
      active_flops: floating-point operations of the forward pass over those tiles; None where the mask is traced.
      dense_flops: the same over all logits.
      widened: what the mask's analysis had no rule for; such tiles are visited and masked.
      devices: how many share the sequence, each of which cuts its part into tiles of its own.
    """

    backend: str | None
    why: str
    passed_over: dict[str, str]
    platform: str
    block: tuple[int, int] | None
    band: int | None
    density: float | None
    active_flops: float | None
    dense_flops: float
    widened: tuple[str, ...] = ()
    devices: int = 1

    def __str__(self) -> str:
        lines = [f"backend: {self.backend or 'none'} ({self.why})"]
        lines += [f"  passed over {name}: {reason}" for name, reason in self.passed_over.items()]
        if self.block is not None:
            tiles = f"tiles of {self.block[0]} x {self.block[1]}"
            if self.band is not None:
                tiles += f", {self.band} at once"
            if self.density is None:
                lines.append(f"mask: traced, its tiles are known at run time ({tiles})")
            else:
                lines.append(f"mask: {self.density:.1%} of the logits lie in visited {tiles}")
        active = "" if self.active_flops is None else f"{_giga(self.active_flops)} active of "
        lines.append(f"forward: {active}{_giga(self.dense_flops)} dense")
        if self.devices > 1:
            lines.append(f"note: these are of the whole sequence, of which {self.devices} devices cut their parts")
        if self.backend == "reference":
            lines.append("note: the reference computes all logits, whatever the mask")
        if self.widened:
            lines.append(f"not analysed, so visited and masked: {', '.join(self.widened)}")
        return "\n".join(lines)


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.3g} GFLOP"


def explain_call(mask, query, key, value, implementation: str | None, options: dict[str, Any]) -> Explanation:
    """See `maskformer.attention.explain`."""
    query, key, value = (_array_like(x) for x in (query, key, value))
    found: dict[str, Any] = {}
    placement = placements.current()
    devices = 1 if placement is None else placement.size(placement.context)
    # What has a shape alone is traced like the queries; the rest, a concrete mask above all, stays known.
    leaves, structure = jax.tree.flatten((mask, options))
    shapes = {index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)}

    def trace(query, key, value, traced):
        mask, options = structure.unflatten([traced.get(index, leaf) for index, leaf in enumerate(leaves)])
        call = arguments.check(query, key, value, mask=mask, **options)
        with dispatch.recorded() as choices:
            try:
                if placement is None:
                    choices.append(dispatch.choose(call, implementation))
                else:
                    dispatch.run(call, implementation)
            except ValueError as error:
                choices[:] = [dispatch.Choice("", str(error), {})]
        found["choice"] = choices[0]
        found["figures"] = _figures(call, choices[0].backend if devices == 1 else "")

    # The arrays are abstract, so nothing is computed; the mask is what the caller gave, so a concrete one is analysed.
    jax.eval_shape(trace, query, key, value, shapes)
    choice = found["choice"]
    return Explanation(
        backend=choice.backend or None,
        why=choice.why,
        passed_over=choice.passed_over,
        platform=platform.current(),
        devices=devices,
        **found["figures"],
    )


def _array_like(x) -> jax.ShapeDtypeStruct:
    x = x if hasattr(x, "dtype") else jax.numpy.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _figures(call: Call, backend: str) -> dict[str, Any]:
    batch, q_len, heads, head_dim = call.query.shape
    value_dim = call.value.shape[3]
    dense = 2.0 * batch * heads * q_len * call.kv_len * (head_dim + value_dim)
    if blocks.refuses(call) is not None:
        return dict(block=None, band=None, density=None, active_flops=None, dense_flops=dense)
    _, block_map = blocks.block_map(call)
    band = blocks.band_blocks(block_map, transposed=False) if backend == "blockwise" else None
    block = (block_map.block_q, block_map.block_kv)
    figures = dict(block=block, band=band, dense_flops=dense, widened=tuple(block_map.widened))
    if not isinstance(block_map.partial.count, np.ndarray):
        return dict(density=None, active_flops=None, **figures)
    if band is not None:
        density = min(1.0, band * block_map.block_kv / call.kv_len)
    else:
        density = block_map.active_flops(head_dim, batch, heads, value_dim) / dense
    return dict(density=float(density), active_flops=float(density * dense), **figures)
