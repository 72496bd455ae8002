"""What one step minimises: ELECTRA's joint loss is exact however the batch is split, and tokens' losses are kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskformer import models, objectives
from maskformer.training import tasks
from maskformer.training.state import create_state
from maskformer.training.step import create_train_step, masking_key
from tests.objectives.examples import make_batch, make_vocabulary

pytestmark = pytest.mark.usefixtures("quick_compilation")
VOCABULARY = make_vocabulary()
# Rows of very different lengths: a mean of means would be far off.
BATCH = make_batch(8, 16, lengths=[16, 4, 0, 16, 5, 9, 16, 3])
WEIGHT = 50.0
STILL = dict(hidden_dropout=0.0, attention_dropout=0.0)


@functools.cache
def build(**params):
    encoder = models.EncoderConfig(
        vocab_size=VOCABULARY.size, max_length=16, layers=1, width=32, heads=2, initializer_range=0.2, **STILL
    )
    pair = models.with_generator(encoder, models.GeneratorConfig(width=0.5))
    return tasks.create({}, objectives.create("electra", VOCABULARY, 16, rate=0.4, **params), pair)


def one_step(task, accumulation_steps=1):
    """The state after one step of plain gradient descent at rate 1, and the parameters before."""
    optimizer = optax.sgd(1.0)
    state = jax.jit(lambda key: create_state(key, task, optimizer))(jax.random.key(0))
    step = create_train_step(task, optimizer, lambda step: 1.0, seed=0, accumulation_steps=accumulation_steps)
    return jax.jit(step)(state, BATCH), state.params


def recorded(state):
    return jax.device_get(state.window).means()


@functools.cache
def by_hand(**params):
    """Both means, the joint loss and its gradients, over the whole batch at once; the losses in float64 by numpy."""
    task = build(**params)
    model, objective = task.model, task.objective
    before, key = jax.jit(model.init)(jax.random.key(0)), masking_key(0)
    corrupted = objective(key, BATCH)
    mask = objective.attend(corrupted)
    options = dict(positions=corrupted.positions, mask=mask)

    @jax.jit
    def both(params, inputs):
        generator = model.generator.apply(
            model.generator_params(params), corrupted.input_tokens,
            predict_positions=corrupted.predict_positions, **options,
        )
        return generator, model.discriminator.apply(params["discriminator"], inputs, **options)

    tokens = jnp.asarray(BATCH["tokens"])
    inputs = objective.discriminate(
        objective.row_keys(key, BATCH), BATCH["tokens"], corrupted, both(before, tokens)[0]
    ).input_tokens
    labels = np.asarray(inputs) != BATCH["tokens"]
    asked = BATCH["segment_ids"] > 0
    if params:
        asked = asked & np.asarray(corrupted.selected)
    weights = np.asarray(corrupted.loss_weights)

    def joint(params):
        generator, discriminator = both(params, inputs)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(generator), corrupted.target_tokens[..., None], -1)[..., 0]
        binary = -jnp.where(labels, jax.nn.log_sigmoid(discriminator), jax.nn.log_sigmoid(-discriminator))
        return -(chosen * weights).sum() / weights.sum() + WEIGHT * (binary * asked).sum() / asked.sum()

    generator, discriminator = (np.asarray(logits, np.float64) for logits in both(before, inputs))
    log_probs = generator - np.log(np.exp(generator).sum(-1, keepdims=True))
    cross_entropy = -np.take_along_axis(log_probs, np.asarray(corrupted.target_tokens)[..., None], -1)[..., 0]
    chance = 1 / (1 + np.exp(-discriminator))
    binary = -np.log(np.where(labels, chance, 1 - chance))
    found = asked & labels & (chance > 0.5)
    numbers = {
        "loss": (cross_entropy * weights).sum() / weights.sum(),
        "accuracy": (generator.argmax(-1) == np.asarray(corrupted.target_tokens))[weights > 0].mean(),
        "discriminator_loss": binary[asked].mean(),
        "discriminator_accuracy": ((chance > 0.5) == labels)[asked].mean(),
        "discriminator_precision": found.sum() / (asked & (chance > 0.5)).sum(),
        "discriminator_recall": found.sum() / (asked & labels).sum(),
        "replaced": labels[asked].mean(),
    }
    numbers["joint_loss"] = numbers["loss"] + WEIGHT * numbers["discriminator_loss"]
    return numbers, jax.jit(jax.grad(joint))(before)


@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_the_joint_loss_and_its_gradient_are_those_of_the_whole_batch(accumulation_steps):
    state, before = one_step(build(), accumulation_steps)
    numbers, gradients = by_hand()
    metrics = recorded(state)
    for name, number in numbers.items():
        assert metrics[name] == pytest.approx(number, rel=2e-6), name
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)
    for (path, old), new, gradient in zip(
        jax.tree.leaves_with_path(before), jax.tree.leaves(state.params), jax.tree.leaves(gradients), strict=True
    ):
        scale = max(1.0, float(jnp.abs(gradient).max()))
        np.testing.assert_allclose(
            (old - new) / scale, gradient / scale, atol=2e-5, err_msg=jax.tree_util.keystr(path)
        )


def test_the_discriminator_may_be_asked_about_the_masked_tokens_only():
    state, _ = one_step(build(discriminate_at="masked"))
    numbers, _ = by_hand(discriminate_at="masked")
    metrics = recorded(state)
    for name, number in numbers.items():
        assert metrics[name] == pytest.approx(number, rel=2e-6), name
    assert numbers["replaced"] > 2 * by_hand()[0]["replaced"]
    with pytest.raises(ValueError, match="discriminate_at='some': expected one of all, masked"):
        build(discriminate_at="some")


def test_no_gradient_of_the_discriminator_reaches_the_generator_through_its_samples():
    task = build()
    params, example = jax.jit(task.model.init)(jax.random.key(0)), task.corrupt(masking_key(0), BATCH, 0, None)

    @jax.jit
    @jax.grad
    def gradients(params):
        return task.sums(params, example, jax.random.key(0)).terms["discriminator_loss"]

    made = gradients(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(made["generator"]))
    assert np.any(made["discriminator"]["embeddings"]["tokens"]["embedding"])


# --- adaptive masking -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_running_losses_are_the_decayed_means_of_each_step(accumulation_steps):
    encoder = models.EncoderConfig(
        vocab_size=VOCABULARY.size, max_length=16, layers=1, width=16, heads=2, initializer_range=0.2, **STILL
    )
    objective = objectives.create("conditional_mlm", VOCABULARY, 16, weights="loss", rate=0.4, decay=0.75)
    task, optimizer = tasks.create({}, objective, encoder), optax.sgd(0.0)
    state = jax.jit(lambda key: create_state(key, task, optimizer))(jax.random.key(0))
    # Rows from twelve tokens, so that most of them come several times in a batch.
    batch = {**BATCH, "tokens": np.where(BATCH["tokens"] > 9, 10 + BATCH["tokens"] % 12, BATCH["tokens"])}
    step = jax.jit(
        create_train_step(task, optimizer, lambda step: 0.0, seed=0, accumulation_steps=accumulation_steps)
    )

    @jax.jit
    def logits_of(params, corrupted):
        return task.model.apply(
            params, corrupted.input_tokens, positions=corrupted.positions, mask=objective.attend(corrupted),
            predict_positions=corrupted.predict_positions,
        )

    expected = np.full(VOCABULARY.size, np.log(VOCABULARY.size))
    for epoch in range(3):
        now = {**batch, "epoch": np.full(8, epoch, np.int32)}
        corrupted = objective(masking_key(0), now, token_weights=state.task)
        logits = np.asarray(logits_of(state.params, corrupted), np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses: dict[int, list[float]] = {}
        for row, slot in np.argwhere(np.asarray(corrupted.loss_weights) > 0):
            token = int(corrupted.target_tokens[row, slot])
            losses.setdefault(token, []).append(-log_probs[row, slot, token])
        assert 3 < len(losses) < 16 and max(map(len, losses.values())) > 1
        for token, values in losses.items():
            expected[token] = 0.75 * expected[token] + 0.25 * np.mean(values)
        state = step(state, now)
        np.testing.assert_allclose(state.task, expected, rtol=1e-5)
    assert step._cache_size() == 1
