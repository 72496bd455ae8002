"""Attention under JAX's transformations, together with what the float64 oracle and the dense reference make of it."""

import jax
import jax.numpy as jnp
import numpy as np

import maskformer as mf
from maskformer.attention import placements
from tests.attention import cases, oracle

NAMES = ("output", "logsumexp", "d query", "d key", "d value", "d sink_logits")
SINKS = jnp.array([0.5, -1.0, 2.0, 0.0])


def attention(implementation, residual=True, placement=None, **options):
    """``(mask, query, key, value[, sink_logits]) -> (output, logsumexp)``; zeros for a logsumexp not asked for."""

    def attend(mask, query, key, value, sink_logits=None):
        with placements.use(placement):
            found = mf.dot_product_attention(
                query, key, value,
                mask=mask, sink_logits=sink_logits, implementation=implementation, return_residual=residual, **options,
            )  # fmt: skip
        return found if residual else (found, jnp.zeros(found.shape[:3]))

    return attend


def cotangents(arrays):
    """For an output and its logsumexp."""
    query, value = arrays[0], arrays[2]
    shape = (*query.shape[:-1], value.shape[-1])
    keys = jax.random.split(jax.random.key(5))
    return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape[:-1])


def _loss(results, cotangents):
    (output, residual), (d_output, d_residual) = results, cotangents
    known = jnp.where(jnp.isfinite(residual), residual, 0)
    return (output.astype(jnp.float32) * d_output).sum() + (known * d_residual).sum()


def plain(attend, mask, arrays, cotangents):
    """Output, logsumexp and the gradients of one jitted call."""

    def loss(arrays, mask):
        results = attend(mask, *arrays)
        return _loss(results, cotangents), results

    (_, results), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(tuple(arrays), mask)
    return *results, *gradients


def transformed(attend, mask, arrays, cotangents, mask_axes=None):
    """The same of calls mapped over a leading axis, each rematerialised inside a scan."""

    def one(arrays, cotangents, mask):
        again = jax.checkpoint(lambda arrays: attend(mask, *arrays))

        def loss(arrays):
            # Rounds of unlike weight that add up to 1: so do their gradients.
            scaled = lambda _, scale: (_, jax.tree.map(lambda x: scale * x, again(arrays)))
            results = tuple(x.sum(0) for x in jax.lax.scan(scaled, 0, jnp.array([0.75, 0.25]))[1])
            return _loss(results, cotangents), results

        (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
        return *results, *gradients

    return jax.jit(jax.vmap(one, in_axes=(0, 0, mask_axes)))(tuple(arrays), cotangents, mask)


def golden(arrays, attends, cotangents, **options):
    """What `plain` should have found, in float64."""
    query, key, value, *sink_logits = (np.asarray(x.astype(jnp.float32)) for x in arrays)
    d_output, d_residual = cotangents
    return oracle.attention(
        query, key, value, attends, sink_logits=sink_logits[0] if sink_logits else None,
        d_output=d_output, d_residual=d_residual,
        **options,
    )  # fmt: skip


def assert_as_good(found, dense, expected, residual=True):
    """Holds each result to the tolerance rule."""
    exact = [expected.output, expected.residual]
    names = ("query", "key", "value", "sink_logits")
    exact += [expected.gradients[name] for name in names if name in expected.gradients]
    for what, actual, plain, wanted in zip(NAMES, found, dense, exact, strict=False):
        if residual or what != "logsumexp":
            size = expected.sink_size if what == "d sink_logits" else None
            oracle.assert_as_good(actual, plain, wanted, what=what, size=size)


def assert_empty_rows_are_exact(found, attends):
    """A query without keys: output 0, logsumexp -inf (where there is one), gradient 0."""
    output, residual, d_query = (np.asarray(x) for x in found[:3])
    batch, q_len, heads = output.shape[:3]
    empty = ~np.broadcast_to(attends, (batch, heads, q_len, np.shape(attends)[-1])).any(-1).transpose(0, 2, 1)
    assert empty.any()
    assert (output[empty] == 0).all()
    assert (d_query[empty] == 0).all()
    assert (residual[empty] == -np.inf).all()


def mapped(**sizes):
    """Two calls' arrays, stacked, with the second at another scale and in another order."""
    return [jnp.stack([x, x[::-1] * 0.5]) for x in cases.arrays(**sizes)[:3]]
