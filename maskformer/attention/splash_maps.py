"""Splash attention's ``MaskInfo`` from our block map, and the split of a mask into what its kernel can evaluate.

JAX's own construction walks the dense mask on the host. Here the tile lists are the kernel's grid as they are, and the
partial tiles are masked inside the kernel: positions by a function, segments and padding by segment ids. Only a mask
that is neither has its partial tiles stored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer import masks
from maskformer.attention.intervals import by_entry

NO_KEY, NO_QUERY, EVERY = -(2**31) + 1, -(2**31) + 2, 0


@dataclasses.dataclass(frozen=True)
class Positions:
    """The kernel's ``mask_function``: a mask without arrays, and the end of the keys. Compared by value."""

    mask: masks.Mask
    kv_len: int

    def __call__(self, q: jax.Array, k: jax.Array) -> jax.Array:
        return self.mask(q, k) & (k < self.kv_len)


@dataclasses.dataclass(frozen=True)
class Split:
    """``mask == positions & equal ids``, or None for a part that is not there.

    Attributes:
      positions: a mask without arrays, the same for all heads.
      q_ids, kv_ids: int32 [batch | 1, length]; equal ids attend.
    """

    positions: masks.Mask | None
    q_ids: jax.Array | None
    kv_ids: jax.Array | None


def split(mask: masks.Mask, q_len: int, kv_len: int, q_offset: Any) -> Split | None:
    """Splits a conjunction, or returns None where a part is neither positions, one segments leaf nor padding."""
    terms = mask.terms if isinstance(mask, masks.And) else (mask,)
    terms = tuple(masks.Segments(term.starts) if isinstance(term, masks.Documents) else term for term in terms)
    positions = [term for term in terms if not jax.tree.leaves(term) and not has_heads(term)]
    rest = [term for term in terms if jax.tree.leaves(term) or has_heads(term)]
    if not all(isinstance(term, (masks.Segments, masks.KeyPadding, masks.QueryPadding)) for term in rest):
        return None
    if sum(isinstance(term, masks.Segments) for term in rest) > 1 or any(term.shape[1] > 1 for term in rest):
        return None
    ids = [array for term in rest if isinstance(term, masks.Segments) for array in jax.tree.leaves(term)]
    if any(jax.dtypes.canonicalize_dtype(array.dtype).itemsize > 4 for array in ids):
        return None  # the kernel compares int32, in which wider ids may agree
    if not all(map(is_elementwise, positions)):
        return None
    joined = masks.And(tuple(positions)) if len(positions) > 1 else positions[0] if positions else None
    if not rest:
        return Split(joined, None, None)
    q_position, k_position = q_offset + jnp.arange(q_len), jnp.arange(kv_len)
    q_ids = jnp.full((1, q_len), EVERY, jnp.int32)
    kv_ids = jnp.full((1, kv_len), EVERY, jnp.int32)
    for term in rest:
        if isinstance(term, masks.Segments):
            q_all = by_entry(jnp.asarray(term.q_ids), 1)
            kv_all = q_all if term.kv_ids is None else by_entry(jnp.asarray(term.kv_ids), 1)
            own_q, own_kv = q_all[:, q_position].astype(jnp.int32), kv_all[:, k_position].astype(jnp.int32)
            if term.padding is not None:
                own_q = jnp.where(own_q == term.padding, NO_QUERY, own_q)
                own_kv = jnp.where(own_kv == term.padding, NO_KEY, own_kv)
            q_ids = jnp.where(q_ids == NO_QUERY, q_ids, own_q)
            kv_ids = jnp.where(kv_ids == NO_KEY, kv_ids, own_kv)
    for term in rest:
        if isinstance(term, masks.KeyPadding):
            kv_ids = jnp.where(_exists(term, k_position), kv_ids, NO_KEY)
        elif isinstance(term, masks.QueryPadding):
            q_ids = jnp.where(_exists(term, q_position), q_ids, NO_QUERY)
    return Split(joined, q_ids, kv_ids)


def _exists(term: Any, position: jax.Array) -> jax.Array:
    """bool [batch | 1, length] of a padding leaf."""
    exists = jnp.ones((1, position.size), bool)
    if term.valid is not None:
        exists = exists & by_entry(jnp.asarray(term.valid), 1)[:, position].astype(bool)
    if term.lengths is not None:
        exists = exists & (position < by_entry(jnp.asarray(term.lengths), 0)[:, None])
    return exists


def has_heads(mask: masks.Mask) -> bool:
    """Whether heads differ."""
    return mask.shape[1] > 1


def is_elementwise(mask: masks.Mask) -> bool:
    """Whether the kernel can evaluate a mask of positions: it closes over no array and looks nothing up in one."""
    tile = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    return _only_shapes(jax.make_jaxpr(mask)(tile, tile), ((), tile.shape))


def _only_shapes(closed: Any, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether a closed jaxpr has no constants and all its values have one of these shapes."""
    jaxpr = getattr(closed, "jaxpr", closed)
    if jaxpr.constvars:
        return False
    for equation in jaxpr.eqns:
        if any(value.aval.shape not in shapes for value in (*equation.invars, *equation.outvars)):
            return False
        for parameter in equation.params.values():
            inner = parameter if isinstance(parameter, (tuple, list)) else (parameter,)
            if not all(_only_shapes(each, shapes) for each in inner if hasattr(each, "eqns")):
                return False
    return True


@dataclasses.dataclass(frozen=True)
class Grid:
    """The kernel's grid for one direction; leading axes [batch | 1, heads | 1].

    Attributes:
      block: int32 [..., rows, width], the tile to load.
      kind: int32 [..., rows, width]; 0 skip, 1 partial, 2 full.
      stored: int32 [..., rows, width], the tile's place in the partial list, where its mask is stored.
    """

    block: Any
    kind: Any
    stored: Any


def grid(partial: masks.TileLists, full: masks.TileLists, columns: int) -> Grid:
    """Merges the two lists of each row, ascending, into rows as narrow as is known."""
    concrete = all(isinstance(x.count, np.ndarray) for x in (partial, full))
    xp = np if concrete else jnp
    end = np.int32(np.iinfo(np.int32).max)
    keys, places = [], []
    for kind, lists in ((1, partial), (2, full)):
        index = xp.asarray(lists.padded())
        slot = np.arange(index.shape[-1], dtype=np.int32)
        keys.append(xp.where(slot < xp.asarray(lists.count)[..., None], index * 4 + kind, end))
        places.append(xp.asarray(lists.start)[..., None] + slot)
    keys, places = xp.concatenate(keys, -1), xp.concatenate(places, -1)
    width = min(keys.shape[-1], columns)
    if concrete:
        width = max(1, int((np.asarray(partial.count) + np.asarray(full.count)).max(initial=0)))
    order = xp.argsort(keys, axis=-1)[..., :width]
    keys = xp.take_along_axis(keys, order, -1)
    valid = keys != end
    # A step that is skipped names the tile already loaded, so that nothing is fetched for it.
    last = xp.max(xp.where(valid, keys // 4, 0), axis=-1, keepdims=True)
    stored = xp.where(valid & (keys % 4 == 1), xp.take_along_axis(places, order, -1), 0)
    block = xp.where(valid, keys // 4, last)
    kind = xp.where(valid, keys % 4, 0)
    return Grid(*(x.astype(np.int32) for x in (block, kind, stored)))


def stored_tiles(mask: masks.Mask, block_map: masks.BlockMap, q_offset: Any, transposed: bool) -> jax.Array:
    """The masks of the partial tiles: bool [batch|1, heads|1, size, block_q, block_kv] (or the tiles transposed)."""
    lists = block_map.partial_t if transposed else block_map.partial
    starts, index = jnp.asarray(lists.start), jnp.asarray(lists.index)
    block_q, block_kv = block_map.block_q, block_map.block_kv

    def tile(b, h, row, column):
        if transposed:
            row, column = column, row
        q = q_offset + row * block_q + jnp.arange(block_q)
        k = column * block_kv + jnp.arange(block_kv)
        attends = mask.select(b, h)(q[:, None], k[None]) & (k < block_map.kv_len)
        return attends.T if transposed else attends

    def entry(b, h):
        rows = jnp.searchsorted(starts[b, h], jnp.arange(index.shape[2]), side="right") - 1
        return jax.vmap(lambda row, column: tile(b, h, row, column))(rows, index[b, h])

    over_heads = jax.vmap(entry, (None, 0))
    return jax.vmap(over_heads, (0, None))(jnp.arange(index.shape[0]), jnp.arange(index.shape[1]))
