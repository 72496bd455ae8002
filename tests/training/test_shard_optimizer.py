"""`mesh.shard_optimizer`: the optimizer's state split over `data`, and the numbers of one device all the same."""

import jax
import numpy as np
import pytest

from maskformer.training import sharding
from maskformer.training.program import Program
from maskformer.training.sections import MeshConfig
from tests.training.tiny import tiny_config, write_corpus

CHANGES = dict(
    mesh__data=4, mesh__fsdp=2, optimizer__ema_decay=0.9, train__accumulation_steps=1, model__hidden_dropout=0.0,
    model__attention_dropout=0.0, evaluation__every=0,
)  # fmt: skip


def after(placed, steps=2):
    state = placed.init()
    batches = iter(placed.train_batches(0))
    for _ in range(steps):
        state = placed.train_step(state, next(batches))
    return state


def bytes_on_a_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The state after two steps on one device, and on eight with the optimizer's state split."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    one = Program.of(tiny_config(corpus, **CHANGES | dict(mesh__data=1, mesh__fsdp=1)))
    with jax.default_device(jax.devices()[0]):
        alone = after(one.on(sharding.create_mesh(one.experiment.mesh, jax.devices()[:1])))
    split = Program.of(tiny_config(corpus, **CHANGES, mesh__shard_optimizer=True)).on()
    return alone, after(split), split


def test_split_or_not_a_step_is_the_same(states):
    alone, split, _ = states
    for name in ("params", "opt_state", "ema"):
        for one, other in zip(jax.tree.leaves(getattr(alone, name)), jax.tree.leaves(getattr(split, name))):
            # Adam divides by the root of tiny second moments, as far as 1e-3 of an update.
            np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-5)


def test_each_device_holds_its_part_of_the_state_and_all_of_its_parameters(states):
    _, split, placed = states
    parameters = bytes_on_a_device(split.params)
    # Two moments and the average; what does not divide by 8 is small.
    assert bytes_on_a_device(split.ema) < 0.30 * parameters
    assert bytes_on_a_device(split.opt_state) < 2 * 0.30 * parameters
    assert all(leaf.sharding.spec == at.spec for leaf, at in zip(
        jax.tree.leaves(split.params), jax.tree.leaves(placed.params_at)
    ))  # fmt: skip


def test_an_average_that_is_split_is_evaluated(states):
    _, split, placed = states
    assert np.isfinite(placed.evaluate(split.evaluation_params)["loss"])


def test_an_array_is_split_where_most_of_it_is_left():
    mesh = sharding.create_mesh(MeshConfig(data=4, fsdp=2), jax.devices())
    shapes = {"wide": jax.ShapeDtypeStruct((6, 16, 24), np.float32), "odd": jax.ShapeDtypeStruct((6, 3), np.float32)}
    at = sharding.NamedSharding(mesh, sharding.PartitionSpec(None, "fsdp"))
    divided, said = sharding.split_over_data(mesh, shapes, {"wide": at, "odd": sharding.replicated(mesh)})
    assert divided["wide"].spec == sharding.PartitionSpec(None, "fsdp", "data")
    assert divided["odd"].spec == sharding.PartitionSpec()
    assert said == [
        "mesh.shard_optimizer: arrays with 18 parameters in all do not divide over mesh.data=4 and are whole on every "
        "device along data"
    ]

