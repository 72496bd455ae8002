"""Masks in which every query sees one run of keys, for GPU kernels that know nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer import masks
from maskformer.attention.arguments import Call
from maskformer.checks import shown


@dataclasses.dataclass(frozen=True)
class Rows:
    """Query i of entry b sees ``starts[b, i] <= k < ends[b, i]``, and if causal no key after it.

    Attributes:
      causal: whether the kernel's own causal mask applies (queries at offset 0), of which ``ends`` says nothing.
      starts, ends: int32 [batch | 1, q_len], from 0 to kv_len, or None for no bound of that side.
    """

    causal: bool
    starts: jax.Array | None
    ends: jax.Array | None


def terms(mask: masks.Mask | None) -> tuple[masks.Mask, ...]:
    """The conjuncts of a mask, without those that are always true."""
    if mask is None:
        return ()
    parts = mask.terms if isinstance(mask, masks.And) else (mask,)
    return tuple(part for part in parts if not isinstance(part, masks.Everything))


def by_entry(array: Any, rank: int) -> Any:
    """An array of a mask that is the same for all heads, as [batch | 1, ...] with ``rank`` axes of its own."""
    lead = array.ndim - rank
    return array[None] if lead == 0 else array[:, 0] if lead == 2 else array


def rows(call: Call) -> Rows | str:
    """The mask of a call as one run of keys per query, exactly; or the reason why it is none.

    Raises:
      ValueError: for arrays of the mask that are too short for the call.
    """
    if call.mask is None:
        return Rows(False, None, None)
    if call.mask.shape[1] > 1:
        return "its mask differs between heads"
    call.mask.check_lengths(call.q_len, call.kv_len, call.q_offset)
    parts = terms(call.mask)
    from_zero = isinstance(call.q_offset, int) and call.q_offset == 0
    causal = from_zero and any(isinstance(part, masks.Causal) for part in parts)
    found = _runs([part for part in parts if not (causal and isinstance(part, masks.Causal))], call)
    if isinstance(found, str):
        return found
    # Within the keys, whatever the arrays said; so also within int32.
    return Rows(causal, *(b if b is None else jnp.clip(b, 0, call.kv_len).astype(jnp.int32) for b in found))


Bounds = tuple[Any, Any]
"""The first key of each query and the one past its last, [batch | 1, q_len]; None where nothing bounds it."""

SEE_THEMSELVES = (masks.Everything, masks.Causal, masks.SlidingWindow, masks.Chunked, masks.Documents)


def _runs(parts: Iterable[masks.Mask], call: Call) -> Bounds | str:
    """What all parts attend to."""
    starts: list[jax.Array] = []
    ends: list[jax.Array] = []
    for part in parts:
        found = _run(part, call)
        if isinstance(found, str):
            return found
        for bounds, bound in zip((starts, ends), found, strict=True):
            if bound is not None:
                bounds.append(bound)
    return (
        functools.reduce(jnp.maximum, starts) if starts else None,
        functools.reduce(jnp.minimum, ends) if ends else None,
    )


def _run(mask: masks.Mask, call: Call) -> Bounds | str:
    q = call.q_offset + jnp.arange(call.q_len, dtype=jnp.int32)[None]
    none, every = jnp.zeros_like(q), jnp.full_like(q, call.kv_len)
    match mask:
        case masks.Everything():
            return None, None
        case masks.Nothing():
            return None, none
        case masks.Causal():
            return None, q + 1
        case masks.Sinks():
            return None, jnp.full_like(q, mask.count)
        case masks.SlidingWindow():
            return q - mask.left, q + min(mask.right, call.kv_len) + 1  # the sum stays within int32
        case masks.Chunked():
            chunk, chunks = q // mask.size, -(-call.kv_len // mask.size)
            left = min(mask.left, (2**31 - 1) // mask.size)
            return (chunk - left) * mask.size, jnp.minimum(chunk + min(mask.right, chunks) + 1, chunks) * mask.size
        case masks.KeyPadding(valid=None):
            return None, _lengths(mask) + none
        case masks.QueryPadding():
            seen = every if mask.lengths is None else jnp.where(q < _lengths(mask), every, none)
            if mask.valid is not None:
                seen = jnp.where(_at(mask.valid, q).astype(bool), seen, none)
            return None, seen
        case masks.Prefix(marked=None):
            return None, jnp.where(q < _lengths(mask), _lengths(mask), none)
        case masks.QueryRanges():
            return _at(mask.begin, q), _at(mask.end, q)
        case masks.Documents():
            starts = by_entry(jnp.asarray(mask.starts), 1)
            first = jnp.arange(starts.shape[1], dtype=jnp.int32)
            # The next document begins at the smallest start that comes later.
            later = jnp.where(starts == first, first, starts.shape[1])
            ends = jax.lax.cummin(later, axis=1, reverse=True)
            ends = jnp.concatenate([ends[:, 1:], jnp.full_like(ends[:, :1], starts.shape[1])], axis=1)
            return _at(starts, q), _at(ends, q)
        case masks.Segments():
            return _segments(mask, call)
        case masks.And():
            return _runs(mask.terms, call)
        case masks.Or():
            return _union(mask, call)
    return f"its mask has the term {shown(mask)}, which is not one run of keys per query"


def _union(mask: masks.Or, call: Call) -> Bounds | str:
    """Runs that have a key in common are one run together: the first of all keys, or the query's own position."""
    starts, ends = [], []
    for term in mask.terms:
        found = _run(term, call)
        if isinstance(found, str):
            return found
        starts.append(found[0])
        ends.append(found[1])
    if not (all(start is None for start in starts) or all(map(_sees_itself, mask.terms))):
        return f"its mask has the term {shown(mask)}, which is not known to be one run of keys per query"
    return _unless_open(jnp.minimum, starts), _unless_open(jnp.maximum, ends)


def _sees_itself(mask: masks.Mask) -> bool:
    """Whether every query sees the key at its own position, if there is one."""
    return all(map(_sees_itself, mask.terms)) if isinstance(mask, masks.And) else isinstance(mask, SEE_THEMSELVES)


def _unless_open(function: Callable[[Any, Any], Any], bounds: list[Any]) -> Any:
    return None if any(bound is None for bound in bounds) else functools.reduce(function, bounds)


def _lengths(mask: Any) -> jax.Array:
    """[batch | 1, 1]"""
    return by_entry(jnp.asarray(mask.lengths, jnp.int32), 0)[:, None]


def _at(array: Any, q: jax.Array) -> jax.Array:
    """An array of all positions, [batch | 1, q_len] of those of the queries."""
    return by_entry(jnp.asarray(array), 1)[:, q[0]]


def _segments(term: masks.Segments, call: Call) -> Bounds | str:
    """Where every segment is known to be one run."""
    if any(isinstance(ids, jax.core.Tracer) for ids in (term.q_ids, term.kv_ids)) or isinstance(
        call.q_offset, jax.core.Tracer
    ):
        return (
            "its segment ids are traced, so that each segment is one run of keys cannot be known; "
            "where ids stand together, masks.documents says so"
        )
    q_ids = by_entry(np.asarray(term.q_ids), 1)
    kv_ids = q_ids if term.kv_ids is None else by_entry(np.asarray(term.kv_ids), 1)
    q_ids = q_ids[:, np.asarray(call.q_offset) + np.arange(call.q_len)]
    kv_ids = kv_ids[:, : call.kv_len]
    batch = max(len(q_ids), len(kv_ids))
    starts, ends = np.zeros((batch, call.q_len), np.int32), np.zeros((batch, call.q_len), np.int32)
    for b in range(batch):
        q_row, kv_row = q_ids[b % len(q_ids)], kv_ids[b % len(kv_ids)]
        for segment in np.unique(q_row):
            keys = np.flatnonzero(kv_row == segment)
            if len(keys) == 0 or segment == term.padding:
                continue
            if keys[-1] - keys[0] + 1 != len(keys):
                return f"segment {segment} is not one run of keys"
            starts[b, q_row == segment], ends[b, q_row == segment] = keys[0], keys[-1] + 1
    return jnp.asarray(starts), jnp.asarray(ends)


def tensor_cores(call: Call, capability: float) -> str | None:
    """Why a tensor-core kernel cannot take the dtype, or the GPU that is here cannot run the kernel; or None."""
    if jax.default_backend() == "gpu":
        here = getattr(jax.devices()[0], "compute_capability", None)
        if here is None or float(here) < capability:
            return f"the kernel needs an NVIDIA GPU of compute capability {capability}, and this one has {here}"
    if call.query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"the kernel takes float16 and bfloat16, not {call.query.dtype}"
    return None


def plain_options(call: Call, *, soft_cap: bool) -> str | None:
    """Why a kernel without score_mod, sinks, dropout and residual (and maybe soft cap) cannot take a call, or None."""
    if call.score_mod is not None:
        return "the kernel runs no score_mod"
    if call.sink_logits is not None:
        return "the kernel has no sink_logits"
    if call.seed is not None:
        return "the kernel's dropout draws other entries than ours"
    if call.return_residual:
        return "the kernel's logsumexp has no gradient"
    if call.logits_soft_cap is not None and not soft_cap:
        return "the kernel has no soft cap"
    if not isinstance(call.scale, (int, float)):
        return "the kernel wants a static scale, and this one is an array"
    if 0 in call.query.shape or 0 in call.key.shape:
        return "an axis has length 0"
    return None
