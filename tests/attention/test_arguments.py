"""A checked call: a pytree that splits into what may have a gradient and the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskformer import masks
from maskformer.attention import arguments, score_mods

IDS = jnp.zeros((1, 4), jnp.int32)


def some_call(**options):
    x = jnp.ones((1, 4, 2, 8))
    table = jnp.ones((2, 3))
    return arguments.check(
        x, x + 1, x + 2, mask=masks.causal() & masks.segments(IDS), bias=jnp.ones((4, 4)), sink_logits=jnp.zeros(2),
        score_mod=score_mods.relative_bias(table), dropout_rate=0.1, dropout_key=0, logits_soft_cap=3.0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, dict(scale=0.5, q_offset=3), dict(scale=jnp.ones(()), q_offset=jnp.int32(2))])
def test_a_call_is_a_pytree_whose_known_numbers_stay_known(options):
    call = some_call(**options)
    known = {name for name in ("scale", "q_offset") if not isinstance(options.get(name, 0), jax.Array)}
    arrays = (call.query, call.key, call.value, IDS, call.bias, *call.score_mod.captured, call.sink_logits, call.seed)
    # The same key, value, ... and no array besides; numbers that are arrays are leaves too.
    leaves = list(map(id, jax.tree.leaves(call)))
    assert [id(array) for array in arrays] == leaves[: len(arrays)] and len(leaves) == len(arrays) + 2 - len(known)

    seen = []
    jax.eval_shape(lambda inside: seen.append(inside), call)
    for name in ("scale", "q_offset", "batch_start", "head_start"):
        assert isinstance(getattr(seen[0], name), jax.core.Tracer) == (name in {"scale", "q_offset"} - known), name
    assert (seen[0].dropout_rate, seen[0].logits_soft_cap) == (0.1, 3.0)


def test_a_structure_of_numbers_keeps_the_structure_of_the_call():
    """Transformations fill the place of arrays with axes and flags, which are no numbers of the call."""
    call = dataclasses.replace(some_call(), q_offset=jnp.int32(0))
    for filled in (0, True, 2.0, object()):
        again = jax.tree.map(lambda _, filled=filled: filled, call)
        assert jax.tree.structure(again) == jax.tree.structure(call)
        assert again.scale == call.scale and again.q_offset is filled


def test_a_call_is_split_and_joined_without_loss():
    call = some_call()
    inputs, rest = call.split()
    assert jax.tree.leaves(rest) == jax.tree.leaves((call.mask, call.seed)) and rest.score_mod.captured == ()
    assert inputs.scale.dtype == jnp.float32 and np.shape(inputs.scale) == ()
    joined = rest.join(dataclasses.replace(inputs, scale=call.scale))
    assert jax.tree.structure(joined) == jax.tree.structure(call)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(call), strict=True))
