"""What a window of training adds up: exact counts of any size, means only of what there is, averages in float32."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskformer import models, objectives
from maskformer.training import precision, tasks
from maskformer.training.state import Window, create_state
from maskformer.training.step import create_train_step
from tests.objectives.examples import make_batch, make_vocabulary

pytestmark = pytest.mark.usefixtures("quick_compilation")
VOCABULARY = make_vocabulary()
BATCH = make_batch(8, 16)


def task_of(name="mlm", **config):
    shape = dict(
        vocab_size=VOCABULARY.size, max_length=16, layers=1, width=16, heads=2, hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return tasks.create({}, objectives.create(name, VOCABULARY, 16), models.EncoderConfig(**shape | config))


@pytest.fixture(scope="module")
def task():
    return task_of()


def test_a_window_counts_more_tokens_than_an_int32_holds(task):
    window, tokens = Window.empty(task), 4 * 2**20

    @jax.jit
    def many(window):
        one = {name: (jnp.ones(()), jnp.ones(())) for name in window.sums}
        counts = {"tokens": jnp.int32(tokens), "predicted": jnp.int32(3)}
        return jax.lax.fori_loop(0, 600, lambda step, window: window.add(step, one, counts, 1e-3), window)

    host = jax.device_get(many(window))
    assert host.count("tokens") == 600 * tokens and host.count("predicted") == 1800


def test_a_mean_of_weight_zero_is_no_score_and_small_weights_are_divided_by(task):
    window = Window.empty(task)
    means = {
        "loss": (jnp.float32(0.5), jnp.float32(0.25)), "accuracy": (jnp.zeros(()), jnp.zeros(())),
        "grad_norm": (jnp.ones(()), jnp.ones(())),
    }
    host = jax.device_get(window.add(jnp.int32(0), means, {"tokens": 1, "predicted": 0}, 0.0))
    assert host.means() == {"loss": 2.0, "grad_norm": 1.0}
    assert task.describe({"grad_norm": 1.0}) == "nothing predicted"
    # Diffusion divides by all tokens: it has a loss where nothing was hidden, and no accuracy.
    assert task.describe({"loss": 0.5, "grad_norm": 1.0}) == "loss 0.5000"


def step_of(task, optimizer=None, **options):
    optimizer = optimizer or optax.sgd(1.0)
    state = jax.jit(lambda key: create_state(key, task, optimizer, ema="ema_decay" in options))(jax.random.key(0))
    return state, jax.jit(create_train_step(task, optimizer, lambda step: 1.0, seed=0, **options))


def test_a_batch_in_which_nothing_is_predicted_changes_nothing(task):
    state, step = step_of(task)
    after = step(state, {**BATCH, "segment_ids": np.zeros_like(BATCH["segment_ids"])})
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    assert set(jax.device_get(after.window).means()) == {"grad_norm"}


@pytest.mark.parametrize("parts", [1, 8])
def test_gradients_of_narrow_parameters_are_summed_and_handed_on_in_float32(parts):
    seen = []

    def update(gradients, state, params=None):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(gradients))
        return gradients, state

    task = task_of(param_dtype="bfloat16")
    optimizer = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    state = jax.eval_shape(lambda: create_state(jax.random.key(0), task, optimizer))
    step = create_train_step(task, optimizer, lambda step: 1.0, seed=0, accumulation_steps=parts)
    traced = jax.make_jaxpr(step)(state, BATCH)
    assert seen and set(seen) == {jnp.dtype("float32")}
    # The loop over the parts carries no bfloat16 sum.
    carried = [
        leaf.aval.dtype
        for equation in traced.eqns
        if equation.primitive.name == "scan" and equation.params["length"] == parts
        for leaf in equation.outvars  # nothing is stacked up beside what is carried
    ]
    assert parts == 1 or (carried and jnp.dtype("bfloat16") not in carried)


def test_the_average_of_bfloat16_parameters_is_kept_in_float32():
    task = task_of(param_dtype="bfloat16")
    state, step = step_of(task, ema_decay=0.999)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}
    first = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    expected = first
    for _ in range(20):
        state = step(state, BATCH)
        expected = jax.tree.map(lambda e, p: 0.999 * e + 0.001 * np.asarray(p, np.float64), expected, state.params)
    moved = []
    for ours, exact, start in zip(*map(jax.tree.leaves, (state.ema, expected, first)), strict=True):
        # Three roundings to float32 in each of 20 steps; bfloat16 would be off by a third of the path.
        bound = 60 * 2.0**-24 * np.abs(exact).max()
        assert np.abs(np.asarray(ours, np.float64) - exact).max() <= bound
        moved.append(np.abs(exact - start).max() / bound)
    assert max(moved) > 100


def test_the_average_of_master_weights_is_theirs_and_not_of_their_roundings():
    master = precision.on_master_weights(optax.sgd(1e-3))
    state, step = step_of(task_of(param_dtype="bfloat16"), master, ema_decay=0.9)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.opt_state.weights)
    for _ in range(5):
        state = step(state, BATCH)
        expected = jax.tree.map(
            lambda e, w: 0.9 * e + 0.1 * np.asarray(w, np.float64), expected, state.opt_state.weights
        )
    for ours, exact in zip(*map(jax.tree.leaves, (state.ema, expected)), strict=True):
        assert np.abs(np.asarray(ours, np.float64) - exact).max() <= 15 * 2.0**-24 * np.abs(exact).max()


def test_accuracy_in_training_is_of_the_logits_that_the_loss_is_of():
    """Where [MASK] has the largest logit of all, diffusion's predictions are the largest of the others."""
    task = task_of("diffusion")
    example = task.corrupt(jax.random.key(3), BATCH, 0, None)
    right = 5.0 * jax.nn.one_hot(example.target_tokens, VOCABULARY.size)
    # A model that is its parameters: what it answers is given.
    task.model = types.SimpleNamespace(apply=lambda params, **inputs: params)
    sums = task.sums(right.at[..., VOCABULARY.mask].set(50.0), example, jax.random.key(0))
    correct, asked = sums.means["accuracy"]
    assert float(correct) == float(asked) > 0
