"""JAX's splash attention kernels for TPU, fed from our block maps.

The kernels are called with a ``MaskInfo`` made by `maskformer.attention.splash_maps`. Three things are done around
them: rows without any key (for which the kernel returns NaN or the mean of the values) are set to 0 and logsumexp -inf,
learned sinks are folded into the logsumexp afterwards, and the logsumexp is differentiable.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from maskformer import masks
from maskformer.attention import platform
from maskformer.attention.arguments import Call, fill
from maskformer.attention.splash_maps import Positions, grid, split, stored_tiles

try:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
except ImportError:  # a JAX without Pallas for TPU
    kernels = None

LANES = 128
BLOCK = 512
STORED_LIMIT = 2**28  # bytes of stored partial tiles, forward and backward each
_NEEDED = ("_splash_attention_forward", "_splash_attention_bwd_dq", "_splash_attention_bwd_dkv")
_MASKED = -0.7 * 3.4028234663852886e38  # the kernel's stand-in for -inf


def refuses(call: Call) -> str | None:
    """Why the kernel cannot honour this call, or None."""
    if kernels is None or not all(hasattr(kernels, name) for name in _NEEDED):
        return "this JAX has no splash attention kernels of the form known here"
    if call.bias is not None:
        return "the kernel adds no bias"
    if call.score_mod is not None:
        return "the kernel runs no score_mod"
    if call.seed is not None:
        return "the kernel has no dropout"
    if 0 in call.query.shape or 0 in call.key.shape:
        return "an axis of length 0 has no blocks"
    if call.query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the kernel takes float32 and bfloat16, not {call.query.dtype}"
    if call.mask is not None and split(call.mask, 1, 1, 0) is None:
        block_map = call.mask.block_map(call.q_len, call.kv_len, _blocks(call), q_offset=call.q_offset)
        for lists in (block_map.partial, block_map.partial_t):
            size = math.prod(lists.index.shape) * block_map.block_q * block_map.block_kv
            if size > STORED_LIMIT:
                return (
                    "its mask is not a function of positions joined to segments and padding by &, so its partial "
                    f"tiles would be stored, in up to {size / 2**20:.0f} MiB (limit {STORED_LIMIT // 2**20})"
                )
    return None


def prefers(call: Call) -> str | None:
    """Why the kernel is not worth taking by itself, or None."""
    return None if platform.current() == "tpu" else f"it is a TPU kernel and the platform is {platform.current()}"


def attend(call: Call) -> tuple[jax.Array, jax.Array]:
    """Output [batch, q_len, heads, value_dim] and logsumexp, float32 [batch, q_len, heads]."""
    block_q, block_kv = _blocks(call)
    q_pad, kv_pad = -call.q_len % block_q, -call.kv_len % block_kv
    mask = masks.everything() if call.mask is None else call.mask
    block_map = mask.block_map(call.q_len, call.kv_len, (block_q, block_kv), q_offset=call.q_offset)
    parts = split(mask, call.q_len, call.kv_len, call.q_offset)

    function = q_sequence = None
    segment_ids = None
    if parts is not None:
        if parts.positions is not None or kv_pad:
            function = Positions(masks.everything() if parts.positions is None else parts.positions, call.kv_len)
            q_sequence = jnp.asarray(call.q_offset + jnp.arange(call.q_len + q_pad), jnp.int32)
        if parts.q_ids is not None:
            pads = ((parts.q_ids, q_pad), (parts.kv_ids, kv_pad))
            segment_ids = kernels.SegmentIds(*(jnp.pad(ids, ((0, 0), (0, pad))) for ids, pad in pads))
    forward_grid = grid(block_map.partial, block_map.full, block_map.grid[1])
    backward_grid = grid(block_map.partial_t, block_map.full_t, block_map.grid[0])

    def info(tiles, transposed: bool) -> MaskInfo:
        stored = stored_tiles(mask, block_map, call.q_offset, transposed) if parts is None else None
        place = jnp.asarray(tiles.stored)
        if stored is not None:
            # The kernel indexes one list of tiles for all heads.
            place = place + jnp.arange(stored.shape[1], dtype=jnp.int32)[:, None, None] * stored.shape[2]
            stored = stored.reshape(stored.shape[0], -1, *stored.shape[3:])
        turn = (lambda x: jnp.asarray(x).swapaxes(-1, -2)) if transposed else jnp.asarray
        return MaskInfo(
            data_next=turn(tiles.block),
            mask_next=None if stored is None else turn(place),
            block_mask=turn(tiles.kind),
            partial_mask_blocks=stored,
            q_sequence=None,
        )

    infos = (info(forward_grid, False), info(backward_grid, True))
    # In half precision the kernel wants its scale in the queries, which costs one rounding.
    query = (call.query.astype(jnp.float32) * call.scale).astype(call.query.dtype)
    query, key, value = (
        fill(x, 1, x.shape[1] + pad).transpose(0, 2, 1, 3)
        for x, pad in ((query, q_pad), (call.key, kv_pad), (call.value, kv_pad))
    )
    options = _Options(block_q, block_kv, call.logits_soft_cap, function)
    output, residual = _over_batch(options, query, key, value, call.sink_logits, infos, q_sequence, segment_ids)
    return output[:, :, : call.q_len].transpose(0, 2, 1, 3), residual[:, :, : call.q_len].transpose(0, 2, 1)


def _over_batch(options, query, key, value, sink_logits, infos, q_sequence, segment_ids):
    """The kernel over the batch: as more heads where all entries share their tiles, one entry at a time if not."""
    batch, heads = query.shape[:2]
    per_entry = (infos, segment_ids)
    if all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(per_entry)) and segment_ids is None:
        if infos[0].data_next.shape[1] > 1:
            # The stored tiles are common to all; only the grid has a row per head.
            infos = tuple(
                info._replace(
                    **{
                        name: jnp.tile(getattr(info, name), (1, batch, 1, 1))
                        for name in ("data_next", "mask_next", "block_mask")
                        if getattr(info, name) is not None
                    }
                )
                for info in infos
            )
        query, key, value = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
        sink_logits = None if sink_logits is None else jnp.tile(sink_logits, batch)
        infos = jax.tree.map(lambda x: x[0], infos)
        output, residual = _attend(options, query, key, value, sink_logits, infos, q_sequence, None)
        return output.reshape(batch, heads, *output.shape[1:]), residual.reshape(batch, heads, -1)

    def entry(b):
        picked_infos, picked_ids = jax.tree.map(lambda x: x[b] if x.shape[0] > 1 else x[0], per_entry)
        return _attend(options, query[b], key[b], value[b], sink_logits, picked_infos, q_sequence, picked_ids)

    return jax.lax.map(entry, jnp.arange(batch))


def _blocks(call: Call) -> tuple[int, int]:
    q_block, kv_block = (min(BLOCK, -(-length // LANES) * LANES) for length in (call.q_len, call.kv_len))
    return q_block, kv_block


@dataclasses.dataclass(frozen=True)
class _Options:
    block_q: int
    block_kv: int
    soft_cap: float | None
    function: Positions | None

    def common(self) -> dict[str, Any]:
        return dict(
            mask_value=_MASKED,
            is_mqa=False,
            attn_logits_soft_cap=self.soft_cap,
            mask_function=self.function,
            interpret=False,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, query, key, value, sink_logits, infos, q_sequence, segment_ids):
    """One batch entry, heads first: output [heads, q, value_dim], logsumexp [heads, q]."""
    info = infos[0]._replace(q_sequence=q_sequence)
    output, (residual,) = kernels._splash_attention_forward(
        info,
        query,
        key,
        value,
        segment_ids,
        None,
        block_sizes=kernels.BlockSizes(block_q=options.block_q, block_kv=options.block_kv),
        residual_checkpoint_name=None,
        save_residuals=True,
        **options.common(),
    )
    # A row of masked logits has logsumexp near the stand-in for -inf; a row of which no tile was visited, NaN or -inf.
    empty = ~(residual > 0.5 * _MASKED)
    output = jnp.where(empty[..., None], 0.0, output.astype(jnp.float32))
    residual = jnp.where(empty, -jnp.inf, residual)
    if sink_logits is not None:
        total = jnp.where(empty, -jnp.inf, jnp.logaddexp(residual, sink_logits.astype(jnp.float32)[:, None]))
        output = output * jnp.where(empty, 0.0, jnp.exp(residual - jnp.where(empty, 0.0, total)))[..., None]
        residual = total
    return output.astype(query.dtype), residual


def _attend_forward(options, query, key, value, sink_logits, infos, q_sequence, segment_ids):
    output, residual = _attend(options, query, key, value, sink_logits, infos, q_sequence, segment_ids)
    return (output, residual), (query, key, value, sink_logits, infos, q_sequence, segment_ids, output, residual)


def _attend_backward(options, saved, cotangents):
    query, key, value, sink_logits, infos, q_sequence, segment_ids, output, residual = saved
    d_output, d_residual = cotangents
    empty = residual == -jnp.inf
    delta = jnp.sum(output.astype(jnp.float32) * d_output.astype(jnp.float32), axis=-1)
    delta = jnp.where(empty, 0.0, delta - d_residual)
    # exp(logit - large) = 0: an empty row weighs nothing.
    residual = jnp.where(empty, -_MASKED, residual)
    d_output = jnp.where(empty[..., None], 0, d_output)
    common = dict(
        q_layout=kernels.QKVLayout.HEAD_DIM_MINOR,
        k_layout=kernels.QKVLayout.HEAD_DIM_MINOR,
        v_layout=kernels.QKVLayout.HEAD_DIM_MINOR,
        bq=options.block_q,
        bkv=options.block_kv,
        **options.common(),
    )
    arguments = (query, key, value, segment_ids, None, residual, d_output, delta)
    d_query = kernels._splash_attention_bwd_dq(
        *arguments, mask_info=infos[0]._replace(q_sequence=q_sequence), **common
    )
    _, d_key, d_value = kernels._splash_attention_bwd_dkv(
        *arguments,
        bkv_compute=options.block_kv,
        use_fused_bwd_kernel=False,
        mask_info=infos[1]._replace(q_sequence=q_sequence),
        **common,
    )
    d_sinks = None
    if sink_logits is not None:
        d_sinks = -jnp.sum(jnp.exp(sink_logits.astype(jnp.float32)[:, None] - residual) * delta, axis=1)
        d_sinks = d_sinks.astype(sink_logits.dtype)
    return d_query, d_key, d_value, d_sinks, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)
