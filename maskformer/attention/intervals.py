"""Masks in which every query sees one run of keys, for GPU kernels that know nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer import masks
from maskformer.attention.arguments import Call


@dataclasses.dataclass(frozen=True)
class Rows:
    """Query i of entry b sees ``starts[b, i] <= k < ends[b, i]``.

    Attributes:
      causal: whether ``ends`` may be left to the kernel's own causal mask (queries at offset 0).
      starts, ends: int32 [batch | 1, q_len], or None for no bound of that side (other than causal).
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
    if call.mask is not None:
        call.mask.check_lengths(call.q_len, call.kv_len, call.q_offset)
    q = call.q_offset + jnp.arange(call.q_len, dtype=jnp.int32)[None]
    causal, starts, ends = False, [], []
    for term in terms(call.mask):
        if term.shape[1] > 1:
            return "its mask differs between heads"
        if isinstance(term, masks.Causal):
            causal = True
        elif isinstance(term, masks.SlidingWindow):
            starts.append(q - term.left)
            ends.append(q + min(term.right, call.kv_len) + 1)  # the sum stays within int32
        elif isinstance(term, masks.KeyPadding) and term.valid is None:
            ends.append(by_entry(jnp.asarray(term.lengths, jnp.int32), 0)[:, None] + 0 * q)
        elif isinstance(term, masks.Segments):
            found = _runs(term, call)
            if isinstance(found, str):
                return found
            starts.append(found[0])
            ends.append(found[1])
        else:
            return f"its mask has the term {term!r}, which is not one run of keys per query"
    if causal and not (isinstance(call.q_offset, int) and call.q_offset == 0):
        causal = False
        ends.append(q + 1)
    return Rows(causal, _join(jnp.maximum, starts), _join(jnp.minimum, ends))


def _join(function, bounds):
    result = None
    for bound in bounds:
        result = bound if result is None else function(result, bound)
    return result


def _runs(term: masks.Segments, call: Call):
    """First and last-plus-one key of each query's segment, where every segment is known to be one run."""
    if any(isinstance(ids, jax.core.Tracer) for ids in (term.q_ids, term.kv_ids)) or isinstance(
        call.q_offset, jax.core.Tracer
    ):
        return "its segment ids are traced, so that each segment is one run of keys cannot be known"
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
    if call.sinks is not None:
        return "the kernel has no sinks"
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
