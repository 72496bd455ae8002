"""ELECTRA's two networks, mixtures of objectives, the loss, and what holds for every objective."""

import dataclasses
import inspect
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import stats

from maskformer import objectives
from maskformer.objectives import schedules
from maskformer.objectives.electra import Discrimination
from tests.objectives.examples import make_batch, make_vocabulary
from tests.objectives.test_mlm import corrupt

VOCABULARY = make_vocabulary(size=80, sentinels=16)


def batch_of(rows, length, **kwargs):
    return make_batch(rows, length, size=64, **kwargs)


# --- ELECTRA ----------------------------------------------------------------------------------------------------------


def test_electra_draws_positions_with_replacement():
    rows = 3000
    batch = batch_of(rows, 12)
    out = corrupt(objectives.create("electra", VOCABULARY, 12, rate=0.25), batch)
    positions = out.predict_positions
    assert positions.shape[1] == 3 and (out.loss_weights == 1).all()
    assert stats.chisquare(np.bincount(positions.ravel(), minlength=12)[1:11]).pvalue > 1e-3
    distinct = np.array([len(set(p)) for p in positions])
    # Three draws from ten: all different with 10*9*8/1000, all the same with 10/1000.
    expected = np.array([10, 270, 720]) / 1000 * rows
    assert stats.chisquare(np.bincount(distinct, minlength=4)[1:], expected).pvalue > 1e-3
    share = (out.input_tokens == VOCABULARY.mask).sum() / out.selected.sum()
    assert abs(share - 0.85) < 0.02


def test_a_sample_that_equals_the_original_counts_as_real():
    batch = batch_of(6, 16)
    objective = objectives.create("electra", VOCABULARY, 16, rate=0.3)
    key = jax.random.key(0)
    out = objective(key, batch)
    right = jax.nn.one_hot(out.target_tokens, VOCABULARY.size) * 1e4
    perfect = objective.discriminate(objective.row_keys(key, batch), batch["tokens"], out, right)
    assert (perfect.labels == 0).all() and (perfect.input_tokens == batch["tokens"]).all()
    wrong = jax.nn.one_hot(jnp.full_like(out.target_tokens, VOCABULARY.unk), VOCABULARY.size) * 1e4
    fooled = objective.discriminate(objective.row_keys(key, batch), batch["tokens"], out, wrong)
    assert (fooled.labels == out.selected).all()
    assert (np.asarray(fooled.input_tokens)[np.asarray(out.selected)] == VOCABULARY.unk).all()
    assert (fooled.loss_weights == (batch["segment_ids"] > 0)).all()


def test_the_generators_samples_follow_its_softmax_and_are_stateless():
    rows = 2000
    batch = batch_of(rows, 8)
    objective = objectives.create("electra", VOCABULARY, 8)
    key = jax.random.key(0)
    out = objective(key, batch)
    logits = jnp.full((rows, objective.budget, VOCABULARY.size), -1e4).at[..., 20:24].set(jnp.log(jnp.arange(1.0, 5.0)))
    keys = objective.row_keys(key, batch)
    filled = np.asarray(objective.discriminate(keys, batch["tokens"], out, logits).input_tokens)
    drawn = np.bincount(filled[np.asarray(out.selected)], minlength=80)[20:24]
    assert stats.chisquare(drawn, np.arange(1, 5) / 10 * drawn.sum()).pvalue > 1e-3
    part = {name: value[5:9] for name, value in batch.items()}
    keys = objective.row_keys(key, part)
    again = objective.discriminate(keys, part["tokens"], jax.tree.map(lambda x: x[5:9], out), logits[5:9])
    assert (again.input_tokens == filled[5:9]).all()


def test_discriminator_loss_is_binary_cross_entropy_over_real_tokens():
    objective = objectives.create("electra", VOCABULARY, 4)
    logits = jnp.array([[0.5, -1.0, 2.0, jnp.nan]])
    asked = Discrimination(jnp.zeros((1, 4), int), jnp.array([[1.0, 0, 0, 0]]), jnp.array([[1.0, 1, 1, 0]]))
    loss, weight = objective.discriminator_loss(logits, asked)
    p = 1 / (1 + np.exp(-np.array([0.5, -1.0, 2.0])))
    assert float(loss) == pytest.approx(-np.log(p[0]) - np.log(1 - p[1]) - np.log(1 - p[2]), rel=1e-5)
    assert float(weight) == 3.0


# --- mixtures ---------------------------------------------------------------------------------------------------------

PARTS = [{"name": "mlm", "weight": 2}, {"name": "causal_lm"}, {"name": "prefix_lm"}, {"name": "diffusion", "weight": 0}]


def test_every_row_of_a_mixture_is_the_row_of_the_objective_it_drew():
    rows = 800
    batch = batch_of(rows, 16)
    mixed = objectives.create("mixture", VOCABULARY, 16, parts=PARTS)
    out = corrupt(mixed, batch)
    assert stats.chisquare(np.bincount(out.source, minlength=4)[:3], [rows / 2, rows / 4, rows / 4]).pvalue > 1e-3
    assert (out.source != 3).all()
    for index, part in enumerate(mixed.parts[:3]):
        alone = corrupt(part, batch)
        mine = out.source == index
        assert (out.input_tokens[mine] == alone.input_tokens[mine]).all()
        assert np.allclose(out.loss_weights[mine].sum(1), alone.loss_weights[mine].sum(1))
        if part.name == "mlm":
            for row in np.flatnonzero(mine)[:20]:
                slots = alone.loss_weights[row] > 0
                positions = alone.predict_positions[row][slots]
                assert np.flatnonzero(out.loss_weights[row]).tolist() == positions.tolist()
                assert (out.target_tokens[row][positions] == alone.target_tokens[row][slots]).all()


def test_the_mask_of_a_mixture_is_that_of_each_rows_objective():
    batch = batch_of(12, 8)
    mixed = objectives.create("mixture", VOCABULARY, 8, parts=PARTS)
    out = mixed(jax.random.key(0), batch)
    dense = np.asarray(mixed.attend(out).dense(8, 8))
    for index, part in enumerate(mixed.parts):
        alone = np.asarray(part.attend(part(jax.random.key(0), batch)).dense(8, 8))
        mine = np.asarray(out.source) == index
        assert (dense[mine] == alone[mine]).all()


def test_a_mixture_of_masking_objectives_keeps_their_slots():
    mixed = objectives.create("mixture", VOCABULARY, 64, parts=[{"name": "mlm"}, {"name": "mlm", "rate": 0.4}])
    assert mixed.budget == 26
    assert corrupt(mixed, batch_of(4, 64)).predict_positions.shape == (4, 26)


def test_weights_on_a_schedule_swap_the_objective_in_mid_run_without_compiling_again():
    parts = [
        {"name": "mlm", "weight": {"schedule": "step", "values": {0: 1.0, 100: 0.0}}},
        {"name": "causal_lm", "weight": {"schedule": "step", "values": {0: 0.0, 100: 1.0}}},
    ]
    mixed = objectives.create("mixture", VOCABULARY, 16, parts=parts)
    batch = batch_of(8, 16)
    traced = []

    @jax.jit
    def source(key, step):
        traced.append(1)
        return mixed(key, batch, step=step).source

    assert (source(jax.random.key(0), 99) == 0).all() and (source(jax.random.key(0), 100) == 1).all()
    assert len(traced) == 1
    with pytest.raises(ValueError, match="weights of the mixture change with the step"):
        mixed(jax.random.key(0), batch)


def test_the_loss_of_a_mixture_is_that_of_its_rows():
    batch = batch_of(24, 16)
    parts = [{"name": "mlm"}, {"name": "diffusion"}]
    mixed = objectives.create("mixture", VOCABULARY, 16, parts=parts)
    out = mixed(jax.random.key(0), batch)
    logits = jax.random.normal(jax.random.key(1), (24, 16, VOCABULARY.size))
    total, weight = jax.jit(mixed.loss)(logits, out)
    expected, expected_weight = 0.0, 0.0
    for index, part in enumerate(mixed.parts):
        alone = part(jax.random.key(0), batch)
        mine = out.source == index
        alone = dataclasses.replace(
            alone,
            loss_weights=alone.loss_weights * mine[:, None],
            denominators=None if alone.denominators is None else alone.denominators * mine,
        )

        @jax.jit
        def loss(there, alone, part=part):
            if alone.predict_positions is not None:
                there = jnp.take_along_axis(there, alone.predict_positions[..., None], axis=1)
            return part.loss(there, alone)

        one, one_weight = loss(logits, alone)
        expected, expected_weight = expected + one, expected_weight + one_weight
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert float(weight) == pytest.approx(float(expected_weight), rel=1e-6)


def test_mixture_errors():
    for parts, message in (
        ([], "no objectives given"),
        ([{"name": "mlm"}, {"name": "t5"}], "changes the number or the kind of rows"),
        ([{"name": "mlm"}, {"name": "t5", "layout": "prefix"}], "all parts must"),
        ([{"name": "mlm", "weight": -1}], "weight=-1"),
        ([{"name": "mlm", "weight": 0}], "at least one must be above 0"),
        (["mlm"], "expected a mapping such as"),
    ):
        with pytest.raises(ValueError, match=message):
            objectives.create("mixture", VOCABULARY, 16, parts=parts)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_the_smoothed_target_distribution(smoothing):
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 4, 7))
    targets, weights = random.integers(0, 7, (3, 4)), random.random((3, 4)) * (random.random((3, 4)) < 0.7)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = (1 - smoothing) * np.eye(7)[targets] + smoothing / 7
    expected = -(wanted * log_p).sum(-1)
    loss, weight = objectives.cross_entropy(jnp.asarray(logits, jnp.bfloat16), targets, jnp.asarray(weights), smoothing)
    assert loss.dtype == weight.dtype == jnp.float32
    exact, weight = objectives.cross_entropy(jnp.asarray(logits), targets, jnp.asarray(weights), smoothing)
    assert float(exact) == pytest.approx((expected * weights).sum(), rel=1e-5)
    assert float(weight) == pytest.approx(weights.sum(), rel=1e-6)


def test_a_slot_without_weight_adds_nothing_even_where_its_logits_are_nan():
    logits = jnp.array([[0.0, 1.0, 2.0], [jnp.nan, jnp.inf, 0.0]])
    targets, weights = jnp.array([1, 0]), jnp.array([1.0, 0.0])
    value, gradient = jax.value_and_grad(lambda x: objectives.cross_entropy(x, targets, weights, 0.1)[0])(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all() and (gradient[1] == 0).all()


def test_nothing_to_predict_gives_zero_loss_and_zero_weight():
    batch = batch_of(2, 16, lengths=[0, 0])
    objective = objectives.create("mlm", VOCABULARY, 16)
    out = objective(jax.random.key(0), batch)
    assert [float(x) for x in objective.loss(jnp.ones((2, objective.budget, 80)), out)] == [0.0, 0.0]


# --- every objective --------------------------------------------------------------------------------------------------

LENGTH = 24
EVERY = {
    "mlm": {}, "roberta": {"whole_word": True}, "hf": {}, "spanbert": {},
    "pmi_mlm": {"ngrams": [(11, 12), (13, 14, 15)]},
    "prefix_lm": {}, "fim": {}, "llada": {}, "electra": {}, "t5": {}, "bart": {"full_stops": (10, 11)},
    "ul2": {"denoisers": [("R", 3, 0.15), ("X", 3, 0.5)]},
}


@pytest.fixture(scope="module")
def every():
    made = {}
    for name, params in EVERY.items():
        objective = objectives.create(name, VOCABULARY, LENGTH, **params)
        made[name] = (objective, jax.jit(objective))
    return made


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_what_holds_for_every_objective_on_any_rows(every, data):
    lengths = data.draw(st.lists(st.integers(0, LENGTH), min_size=8, max_size=8))
    seed = data.draw(st.integers(0, 2**31 - 1))
    cut = data.draw(st.integers(1, LENGTH - 1))
    batch = batch_of(8, LENGTH, lengths=lengths, seed=seed % 1000, words=data.draw(st.floats(0.0, 1.0)))
    batch["segment_ids"] = np.where((np.arange(LENGTH) >= cut) & (batch["segment_ids"] > 0), 2, batch["segment_ids"])
    batch["epoch"][:] = data.draw(st.integers(0, 1000))
    for name in data.draw(st.permutations(list(EVERY)))[:4]:
        objective, call = every[name]
        out = jax.tree.map(np.asarray, call(jax.random.key(seed), batch))
        weights = out.loss_weights
        assert weights.shape == (8, objective.budget) and np.isfinite(weights).all() and (weights >= 0).all()
        assert (out.target_tokens[weights > 0] < VOCABULARY.size).all()
        empty = np.array(lengths) == 0
        assert weights[empty].sum() == 0
        if hasattr(out, "encoder_input_tokens"):
            assert (out.encoder_segment_ids[empty] == 0).all()
            continue
        assert ((out.input_tokens >= 0) & (out.input_tokens < VOCABULARY.size)).all()
        assert ((out.positions >= 0) & (out.positions < objective.output_length)).all()
        if out.predict_positions is not None and objective.output_length == LENGTH:
            # Every corrupted position is recoverable from inputs and targets; nothing else was touched.
            restored = out.input_tokens.copy()
            row = np.broadcast_to(np.arange(8)[:, None], weights.shape)
            restored[row[weights > 0], out.predict_positions[weights > 0]] = out.target_tokens[weights > 0]
            assert (restored == batch["tokens"]).all()
            touched = out.input_tokens != batch["tokens"]
            assert not (touched & ~out.selected).any()
            if name != "roberta":
                markers = np.isin(batch["tokens"], [VOCABULARY.cls, VOCABULARY.sep, VOCABULARY.pad])
                assert not (out.selected & markers).any()


@pytest.mark.parametrize("name", ["roberta", "t5"])
def test_rows_are_the_same_on_one_device_and_on_eight_and_in_any_slice(every, name):
    objective, call = every[name]
    batch = batch_of(8, LENGTH, lengths=np.arange(17, 25))
    one = jax.tree.map(np.asarray, call(jax.random.key(3), batch))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    if len(jax.devices()) != 8:
        pytest.skip("needs the eight simulated devices of the test session")
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    eight = jax.tree.map(np.asarray, call(jax.random.key(3), spread))
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    order = np.array([6, 2, 3])
    part = objective(jax.random.key(3), {n: v[order] for n, v in batch.items()})
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), one, jax.tree.map(np.asarray, part))


def test_a_step_of_another_epoch_or_rate_compiles_nothing_again():
    objective = objectives.create("mlm", VOCABULARY, LENGTH, rate=schedules.cosine(0.3, 0.15, 50))
    traced = []

    @jax.jit
    def step(key, batch, step):
        traced.append(1)
        return objective(key, batch, step=step)

    for epoch in range(3):
        for number in range(3):
            step(jax.random.key(0), batch_of(2, LENGTH, epoch=epoch, seed=number), number)
    assert len(traced) == 1


GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "objectives.json"


def checksums(every):
    batch = batch_of(8, LENGTH, lengths=np.arange(17, 25), epoch=2)
    sums = {}
    for name, (_, call) in every.items():
        out = jax.tree.map(np.asarray, call(jax.random.key(11), batch))
        tokens = out.encoder_input_tokens if hasattr(out, "encoder_input_tokens") else out.input_tokens
        sums[name] = [zlib.crc32(x.astype("<i4").tobytes()) for x in (tokens, out.target_tokens)]
    return sums


def test_draws_have_not_changed_since_they_were_recorded(every):
    """A change here breaks the pairing with earlier runs and bit-exact resumption: it needs a line in the changelog."""
    assert checksums(every) == json.loads(GOLDEN.read_text())


def test_every_builder_and_convention_is_documented_and_buildable():
    for name, builder in objectives.BUILDERS.items():
        assert inspect.getdoc(builder), name
    for name, convention in objectives.COMPAT.items():
        assert convention.source and convention.objective in objectives.BUILDERS, name
        known = objectives.builders.parameters(convention.objective)
        assert set(convention.params) <= set(known), name


def test_static_copies_repeat_after_their_number_of_epochs():
    for name in ("spanbert", "t5"):
        objective = objectives.create(name, VOCABULARY, LENGTH, static_copies=3)
        outs = [corrupt(objective, batch_of(4, LENGTH, epoch=epoch)) for epoch in (0, 1, 3)]
        leaves = [jax.tree.leaves(out) for out in outs]
        assert all((a == b).all() for a, b in zip(leaves[0], leaves[2]))


def test_an_objective_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        objectives.create("mlm", VOCABULARY, LENGTH).budget = 3


def test_a_mixture_never_hides_only_what_none_of_its_parts_hides():
    mlm, diffusion, causal = (objectives.create(name, VOCABULARY, 16) for name in ("mlm", "diffusion", "causal_lm"))
    assert objectives.mixture([diffusion, causal]).never_hidden == tuple(sorted(diffusion.never_hidden))
    both = set(mlm.never_hidden) & set(diffusion.never_hidden)
    assert set(objectives.mixture([mlm, diffusion]).never_hidden) == both
