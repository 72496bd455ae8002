"""Layers in stages compute what layers in order compute, with the same dropout, and send each other no weights."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from maskformer import masks, models
from maskformer.models import pipeline, stages
from maskformer.models.pipeline import Pipeline, bubble
from maskformer.training import sharding
from maskformer.training.program import Program
from maskformer.training.sections import MeshConfig
from tests.training.tiny import tiny_config, write_corpus

TINY = models.EncoderConfig(
    vocab_size=23, max_length=8, layers=4, width=12, heads=2, mlp_width=20, hidden_dropout=0.0, attention_dropout=0.0,
    param_dtype="float32",
)  # fmt: skip
DOUBLE = dict(param_dtype="float64", compute_dtype="float64", output_dtype="float64")
ROWS, LENGTH = 16, 8
PATTERN = ("segments & window(3)", "segments")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Two programs for each mesh run once: hardly optimised, they compile in a quarter of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@dataclasses.dataclass
class Case:
    """A model, and its loss and gradients in order and in stages."""

    mesh: MeshConfig
    changes: dict[str, Any]
    mask: bool = False

    @functools.cached_property
    def model(self):
        return models.create(dataclasses.replace(TINY, **self.changes))

    @functools.cached_property
    def placed_on(self):
        count = int(np.prod(list(self.mesh.sizes.values())))
        mesh = sharding.create_mesh(self.mesh, jax.devices()[:count])
        return mesh, sharding.create_rules(mesh, self.model.config.axis_sizes)[0]

    @functools.cached_property
    def params(self):
        noise = iter(jax.random.split(jax.random.key(1), 100))
        params = self.model.init(jax.random.key(0))
        # Larger than at initialisation, so that every part matters.
        return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(noise), leaf.shape, leaf.dtype), params)

    @functools.cached_property
    def inputs(self):
        """Packed rows: two segments that meet elsewhere in each row, and padding."""
        meet, end = np.random.default_rng(0).integers((1, 5), (5, LENGTH + 1), (ROWS, 2)).T[:, :, None]
        place = np.arange(LENGTH)
        segments = np.where(place < meet, 1, 2) * (place < end)
        inputs = dict(
            tokens=np.random.default_rng(1).integers(0, 23, (ROWS, LENGTH)),
            segment_ids=segments,
            positions=np.where(place < meet, place, place - meet),
            predict_positions=np.random.default_rng(2).integers(0, LENGTH, (ROWS, 3)),
        )
        if self.mask:
            inputs["allowed"] = np.random.default_rng(3).random((ROWS, 2, LENGTH, LENGTH)) < 0.7
            inputs["reach"] = np.random.default_rng(4).integers(1, 5, (ROWS,))
        return jax.tree.map(jnp.asarray, inputs)

    def loss(self, params, inputs):
        inputs = dict(inputs)
        mask = None
        if self.mask:  # arrays of a row and a head, of a row, and one that a function closes over
            step = inputs["reach"][0]
            near = masks.predicate(lambda q, k, reach: abs(q - k) <= reach, inputs.pop("reach"), batch_dims=1)
            mask = masks.dense(inputs.pop("allowed")) | near & masks.predicate(lambda q, k: (q + k) % (step + 1) == 0)
        dropout_key = jax.random.key(2) if self.model.config.hidden_dropout else None
        return jnp.sum(jnp.sin(3 * self.model.apply(params, **inputs, mask=mask, dropout_key=dropout_key)))

    def loss_in_stages(self, params, inputs):
        mesh, rules = self.placed_on
        with sharding.activations(mesh, rules, pipeline=sharding.create_pipeline(mesh, self.mesh)):
            return self.loss(params, inputs)

    @functools.cached_property
    def compiled(self):
        mesh, rules = self.placed_on
        params = jax.device_put(self.params, sharding.param_shardings(mesh, self.model.logical_axes(), rules))
        inputs = jax.device_put(self.inputs, sharding.batch_sharding(mesh))
        return jax.jit(jax.value_and_grad(self.loss_in_stages)).lower(params, inputs).compile(), (params, inputs)


CASES = {
    "four stages": Case(MeshConfig(stage=4, data=2, microbatches=8), dict(mask="causal")),
    "two stages and rounds, packed": Case(
        MeshConfig(stage=2, data=2, rounds=2, microbatches=4),
        dict(mask=PATTERN, layers=8, positions="rotary", hidden_dropout=0.3, attention_dropout=0.3, remat="none"),
    ),
    "stages and tensor, masks of rows": Case(
        MeshConfig(stage=2, data=2, tensor=2),
        dict(mask=PATTERN, positions="alibi", hidden_dropout=0.3, attention_dropout=0.3, tied_embeddings=False),
        mask=True,
    ),
    "stages, fsdp and context": Case(
        MeshConfig(stage=2, data=1, fsdp=2, context=2, microbatches=2),
        dict(mask="segments", norm_position="pre", hidden_dropout=0.3, attention_dropout=0.3, scan_layers=False),
    ),
}
SLOW = ("stages, fsdp and context",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_loss_and_gradients_in_stages_are_those_in_order(name):
    with jax.enable_x64(True):
        case = CASES[name]
        case = dataclasses.replace(case, changes=case.changes | DOUBLE)
        compiled, arguments = case.compiled
        loss, gradients = compiled(*arguments)
        expected, in_order = jax.jit(jax.value_and_grad(case.loss))(case.params, case.inputs)
        assert float(loss) == pytest.approx(float(expected), rel=1e-12)
        for (path, ours), theirs in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(in_order), strict=True):
            scale = max(1.0, float(jnp.abs(theirs).max()))
            np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-12, err_msg=jax.tree_util.keystr(path))
        if name == "four stages":
            check_collectives(compiled.as_text(), case)


def check_collectives(text, case):
    """What crosses stages: hidden states to the next one, and what every device has a copy of, added up once a step."""
    mesh, _ = case.placed_on
    stage_of = {device.id: at[0] for at, device in np.ndenumerate(mesh.devices) for at in [at]}
    rest_of = {device.id: at[1:] for at, device in np.ndenumerate(mesh.devices)}
    found = re.findall(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\((.*)", text)
    permutes = [rest for _, kind, rest in found if kind == "collective-permute"]
    assert len(permutes) >= 4
    for rest in permutes:
        pairs = re.findall(r"\{(\d+),(\d+)\}", re.search(r"source_target_pairs=\{(.*?)\}\}", rest).group(0))
        assert pairs and all(rest_of[int(a)] == rest_of[int(b)] for a, b in pairs)
        assert {(stage_of[int(b)] - stage_of[int(a)]) % 4 for a, b in pairs} in ({1}, {3})
    assert {kind for _, kind, _ in found} == {"collective-permute", "all-reduce"}
    stack = {leaf.shape for leaf in jax.tree.leaves(case.params["layers"])}
    for shapes, kind, rest in found:
        if kind == "all-reduce":
            sent = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f64\[([\d,]+)\]", shapes)}
            assert not sent & stack
            assert "/while/" not in rest or re.search(r"replica_groups=\{\{0\},|=1,?'?\]? ", rest), rest[:300]


def test_no_weights_wait_for_the_backward_pass_at_every_tick():
    for remat in ("none", "elementwise", "full"):
        case = Case(MeshConfig(stage=2, data=2, rounds=2, microbatches=4), dict(mask=PATTERN, layers=8, remat=remat))
        jaxpr = jax.make_jaxpr(jax.grad(case.loss_in_stages))(case.model.param_shapes(), case.inputs)
        shapes = set(array_shapes(jaxpr.jaxpr))
        ticks = 4 * 2 + 2 - 1
        assert any(shape[0] == ticks for shape in shapes if len(shape) > 2), "nothing waits"
        assert not [shape for shape in shapes if shape[:1] == (ticks,) and shape[-2:] in ((12, 20), (20, 12))], remat


def array_shapes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from array_shapes(inner)


@pytest.mark.parametrize(("stage", "rounds", "count"), [(2, 1, 8), (4, 1, 4), (2, 2, 2), (4, 3, 8)])
def test_a_stage_waits_for_as_many_ticks_as_the_bubble_says(stage, rounds, count):
    mesh = MeshConfig(stage=stage, data=1, rounds=rounds, microbatches=count)
    case = Case(mesh, dict(layers=stage * rounds, mask="causal"))
    loops = scan_lengths(jax.make_jaxpr(case.loss_in_stages)(case.model.param_shapes(), case.inputs).jaxpr)
    ticks = max(loops)
    assert bubble(stage, count, rounds) == pytest.approx(1 - count * rounds / ticks)
    # Narayanan et al. 2021, section 2.2: the time lost over the time worked.
    assert (ticks - count * rounds) / (count * rounds) == pytest.approx((stage - 1) / (rounds * count))


def scan_lengths(jaxpr):
    found = [equation.params["length"] for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    inner = (scan_lengths(inner) for equation in jaxpr.eqns for inner in jaxprs_in_params(equation.params))
    return found + [length for lengths in inner for length in lengths]


@pytest.mark.parametrize("stage", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 6, 9])
def test_every_block_of_layers_reaches_the_stage_that_runs_it(stage, rounds):
    sent, to, kept = stages._routes(stage, rounds)
    runs = np.full((stage, rounds), -1)
    for exchange in range(rounds):
        assert sorted(to[exchange]) == list(range(stage))  # one to each: a collective permute
        for source in range(stage):
            target = to[exchange, source]
            runs[target, kept[exchange, target]] = source * rounds + sent[exchange, source]
    assert runs.tolist() == [[slot * stage + own for slot in range(rounds)] for own in range(stage)]


CONFIG = dict(
    mesh__stage=2, mesh__data=2, model__layers=4, train__accumulation_steps=2, train__batch_size=16,
    model__mask=PATTERN, model__hidden_dropout=0.1, model__attention_dropout=0.1, evaluation__batch_size=4,
    # Adam would divide by the root of second moments that are nothing but rounding.
    optimizer__name="sgd", optimizer__momentum=0.9, optimizer__learning_rate=0.1,
)  # fmt: skip
ALONE = dict(mesh__stage=1, mesh__data=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def trained(corpus):
    """One device and four, in stages: the program, its state after three steps, and a score."""
    found = []
    for changes, count in ((ALONE, 1), ({}, 4)):
        program = Program.of(tiny_config(corpus, **{**CONFIG, **changes}))
        placed = program.on(sharding.create_mesh(program.experiment.mesh, jax.devices()[:count]))
        placed.check_batch()
        state, batches = placed.init(), iter(placed.train_batches(0))
        for _ in range(3):
            state = placed.train_step(state, next(batches))
        found.append((placed, state, placed.evaluate(state.params, max_batches=1)))
    return found


def test_three_steps_in_stages_give_the_state_of_one_device(trained):
    (_, alone, alone_scored), (placed, staged, scored) = trained
    assert int(staged.step) == 3
    for (path, one), other in zip(jax.tree.leaves_with_path(alone), jax.tree.leaves(staged), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    assert scored == pytest.approx(alone_scored, rel=1e-5)
    assert placed.train_step._cache_size() == 1


def test_each_device_holds_the_layers_of_its_own_stage_and_their_momentum(trained):
    _, (placed, state, _) = trained
    held = 0
    for tree in (state.params, state.opt_state):
        for path, leaf in jax.tree.leaves_with_path(tree):
            if "layers" not in jax.tree_util.keystr(path):
                continue
            held += 1
            for shard in leaf.addressable_shards:
                stage = int(np.argwhere(placed.mesh.devices == shard.device)[0, 0])
                assert shard.index[0] == slice(2 * stage, 2 * stage + 2)
                assert shard.data.shape == (2, *leaf.shape[1:])
    assert held == 2 * 16


def test_the_schedule_is_told_with_its_bubble(trained):
    (alone, _, _), (placed, _, _) = trained
    assert alone.describe_pipeline() is None
    assert placed.describe_pipeline() == "2 stages, 4 microbatches of 2 rows: bubble 20.0%"


def refused(corpus, **changes):
    program = Program.of(tiny_config(corpus, **{**CONFIG, "mesh__rounds": 2, "model__mask": "causal", **changes}))
    mesh = program.experiment.mesh
    placed = program.on(sharding.create_mesh(mesh, jax.devices()[: int(np.prod(list(mesh.sizes.values())))]))
    placed.check_batch()
    placed.lower_train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__layers=6), r"model\.layers=6: does not divide into mesh\.stage=2 x mesh\.rounds=2 blocks.*4 or 8"),
        (dict(model__layers=3, mesh__rounds=1), r"model\.layers=3: does not divide .*mesh\.stage=2 blocks.*2 or 4"),
        (dict(model__mask=PATTERN), r"model\.mask: a pattern of 2 masks .* 1 layers .*model\.layers=4"),
        (
            dict(model__experts=4, model__moe_period=2),
            r"model\.layers without experts=2: does not divide .*mesh\.rounds=2 blocks.*use 4",
        ),
        (
            dict(model__experts=4, model__moe_period=4, model__layers=10, mesh__rounds=1),
            r"model\.moe_period=4: does not divide the 5 layers that model\.layers=10 ",
        ),
        (dict(mesh__microbatches=3), r"mesh\.microbatches=3: expected a multiple of mesh\.stage=2"),
        (dict(mesh__microbatches=8), r"mesh\.microbatches=8: does not divide the 4 rows.*microbatches=4$"),
        (dict(train__batch_size=12), r"train\.batch_size / .*=6: .*use a multiple of 4"),
        (dict(evaluation__batch_size=6), r"evaluation\.batch_size=6: does not divide .* mesh\.stage=2; use a mult.* 4"),
        (dict(mesh__stage=1), r"mesh\.rounds=2: expected 1 with mesh\.stage=1"),
        (
            dict(mesh__dcn_gradients="bfloat16", mesh__dcn={"data": 2}),
            r"mesh\.dcn_gradients='bfloat16': expected None with mesh\.stage=2",
        ),
    ],
)
def test_what_does_not_fit_into_stages_is_refused_in_one_line(corpus, changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        refused(corpus, **changes)
    assert "\n" not in str(raised.value)


def test_a_pipeline_of_one_stage_is_none():
    mesh = sharding.create_mesh(MeshConfig(data=1), jax.devices()[:1])
    with pipeline.use(Pipeline(mesh, ("data",))):
        assert pipeline.current() is None
