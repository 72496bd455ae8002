"""`mesh.dcn_gradients`: each slice adds up its own gradients, and what crosses between slices is bfloat16.

`tests/aot/test_slices.py` looks at what the TPU compiler sends.
"""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from maskformer.training import sharding
from maskformer.training.program import Program
from maskformer.training.sections import MeshConfig
from tests.training.tiny import tiny_config, write_corpus

CHANGES = dict(
    model__hidden_dropout=0.0, model__attention_dropout=0.0, evaluation__every=0, train__accumulation_steps=2,
    optimizer__name="sgd", optimizer__momentum=0.0, optimizer__weight_decay=0.0, optimizer__clip_norm=None,
    optimizer__learning_rate=1.0,
)  # fmt: skip


def two_slices():
    """Two slices of two devices: within a slice, a device holds half of the parameters."""
    sizes = {"slice": 2, "stage": 1, "data": 1, "fsdp": 2, "expert": 1, "tensor": 1, "context": 1}
    return Mesh(np.array(jax.devices()[:4]).reshape(tuple(sizes.values())), tuple(sizes))


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    one = Program.of(tiny_config(corpus, **CHANGES))
    return one.on(sharding.create_mesh(MeshConfig(data=1), jax.devices()[:1])), one.on(two_slices())


def test_a_step_over_two_slices_is_that_of_one_device_within_the_rounding_of_its_gradients(programs):
    after = []
    for placed in programs:
        state = placed.init()
        before = jax.device_get(state.params)
        state = placed.train_step(state, next(iter(placed.train_batches(0))))
        after.append(jax.tree.map(np.subtract, jax.device_get(state.params), before))
        losses = state.window.means()
        after[-1] = after[-1], losses
    (one, one_losses), (two, two_losses) = after
    assert one_losses["loss"] == pytest.approx(two_losses["loss"], rel=1e-5)
    for whole, sliced in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        # Each slice's part is rounded to 8 bits and so is the sum: 2**-8 of the larger part at the most.
        np.testing.assert_allclose(sliced, whole, rtol=0, atol=2**-7 * np.abs(whole).max() + 1e-8)
        assert not np.array_equal(sliced, whole) or not whole.any()


def test_evaluation_uses_the_rows_of_all_slices(programs):
    alone, together = programs
    params = alone.init().params
    expected = alone.evaluate(params, "validation")
    moved = jax.device_put(jax.device_get(params), together.params_at)
    assert together.evaluate(moved, "validation")["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_it_is_refused_where_data_crosses_no_slices():
    with pytest.raises(ValueError, match=r"mesh\.dcn_gradients='bfloat16'.*--config\.mesh\.dcn\.data=2"):
        MeshConfig(dcn_gradients="bfloat16")
    with pytest.raises(ValueError, match=r"mesh\.dcn_gradients='int3'"):
        MeshConfig(dcn_gradients="int3", dcn={"data": 2})
