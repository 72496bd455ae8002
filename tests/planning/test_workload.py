"""What a program keeps for its backward pass, counted at prime sizes, against JAX's own count at the real ones."""

import jax
import numpy as np
import pytest

from maskformer import data
from maskformer.attention import platform
from maskformer.planning import workload
from maskformer.training import resolve, tasks
from tests.planning.cases import TINY, config_of, workload_of


def kept_by_jax(flags, rows):
    """Bytes that `jax.vjp` keeps of a batch of so many rows, apart from keys."""
    program = workload.Planned(resolve(config_of(flags)))
    task = program.task
    layout = data.batch_layout(rows, program.experiment.data.length)

    def backward(params, batch):
        example = task.corrupt(jax.random.key(0), batch, 0, task.initial_state())
        return jax.vjp(lambda p: sum(task.sums(p, example, jax.random.key(1)).terms.values()), params)[1]

    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in layout.items()}
    with platform.assume("tpu"):
        leaves = jax.tree.leaves(jax.eval_shape(backward, program.model.param_shapes(), batch))
    arrays = [leaf for leaf in leaves if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)


@pytest.mark.parametrize("flags", [
    TINY,
    (*TINY, "--config.model.remat=none", "--config.model.mlp_width=96"),
    (*TINY, "--config.model.remat=full", "--config.model.scan_layers=False"),
    ("--config=configs/bert.py:tiny,seq=32,vocab=500", "--config.model.kv_heads=1"),
    ("--config=configs/electra.py:tiny,seq=32,vocab=500",),
], ids=["gpt", "no remat", "unrolled", "grouped heads", "electra"])  # fmt: skip
def test_prime_sizes_count_what_real_sizes_do(flags):
    made = workload_of(flags)
    rows = made.sizes["rows"]
    ours = sum(one.bytes(made.sizes) for one in made.kept)
    # What has no rows is traced with another vocabulary and width: the parameters' own, which are arguments.
    weights = sum(one.bytes(made.sizes) for one in made.kept if one.kind == "weights")
    twice = kept_by_jax(flags, 2 * rows) - kept_by_jax(flags, rows)
    assert ours - weights == pytest.approx(twice, rel=1e-6)


def test_a_plan_reads_no_text_and_trains_no_tokenizer(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a tokenizer or a data set was asked for")

    monkeypatch.setattr(data, "load_tokenizer", refuse)
    monkeypatch.setattr(data, "load_dataset", refuse)
    program = workload.Planned(resolve(config_of([*TINY, "--config.data.name=tfds:no_such_dataset"])))
    assert program.vocabulary.size == 500 and program.model.num_params() > 0
    workload.trace(program, "tpu")


def test_masks_of_each_head_are_planned_with_whole_heads():
    flags = (*TINY, "--config.model.mask=per_head(causal, window(4))")
    assert workload_of(TINY).splits_heads and not workload_of(flags).splits_heads


def test_a_task_of_a_recipe_is_counted_like_ours():
    @tasks.builder()
    def twice_kept(objective, config):
        return Twice(objective, config)

    class Twice(tasks.Tokens):
        def sums(self, params, example, key):
            return super().sums(params, example, key)

    try:
        flags = (*TINY, "--config.task.name=twice_kept")
        made = workload.trace(workload.Planned(resolve(config_of(flags))), "tpu")
    finally:
        del tasks.BUILDERS["twice_kept"]
    ours = workload_of(TINY)
    assert [one.shape for one in made.kept] == [one.shape for one in ours.kept]


def test_the_prime_of_a_vocabulary_is_the_next_one():
    assert [workload._prime(number) for number in (500, 1009, 8192)] == [503, 1019, 8209]
    assert np.gcd(8209, 1013 * 10_007) == 1
