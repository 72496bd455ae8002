"""A mixture of experts computes what a loop over tokens and experts does, on one device and on several."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maskformer import models
from maskformer.models import experts
from maskformer.training import sharding
from maskformer.training.matrices import per_matrix
from maskformer.training.optimizer import decay_mask
from maskformer.training.sections import MeshConfig
from tests.models import experts_oracle as oracle

TINY = models.EncoderConfig(
    vocab_size=23, max_length=12, layers=2, width=16, heads=4, mlp_width=24, hidden_dropout=0.0, attention_dropout=0.0,
    experts=4,
)
QWEN = dict(
    activation="swiglu", router_softmax="all", shared_expert_width=8, shared_expert_gate=True, use_bias=False,
    expert_width=12,
)
# Programs that run once or twice.
pytestmark = pytest.mark.usefixtures("quick_compilation")

REAL = np.array([[True] * 10 + [False] * 2, [False] * 3 + [True] * 9] * 4)


def noise(shapes, scale=0.3):
    """Larger weights than at initialisation, no two experts alike, and no bias of 0."""
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * generator.normal(size=leaf.shape), jnp.float32), shapes)


def build(config):
    """The layer's parameters, and it as a function `params, x, real -> y, routing`."""
    graph, state = nnx.split(nnx.eval_shape(lambda: experts.Experts(config, rngs=nnx.Rngs(params=0))))
    return noise(nnx.to_pure_dict(state)), jax.jit(lambda params, x, real: nnx.merge(graph, params)(x, real))


def inputs(rows=8, length=12, width=16):
    return jnp.asarray(np.random.default_rng(3).normal(size=(rows, length, width)), jnp.float32)


def expected(config, params, x, real=REAL):
    capacity = None if config.expert_capacity is None else experts.places(config, x.shape[1])
    return oracle.experts(
        params, np.asarray(x, np.float64), real, k=config.experts_per_token, over=config.router_softmax,
        activation=config.activation, capacity=capacity,
    )


OPTIONS = {
    "biases, two of four": {},
    "one, as Switch": dict(router_softmax="all", experts_per_token=1, activation="relu"),
    "gated, beside a shared one, as Qwen": QWEN,
    "all of them": dict(experts_per_token=4),
    "few places": dict(expert_capacity=0.7),
    "few places, gated": dict(expert_capacity=1.0, **QWEN),
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_the_layer_and_its_statistics_equal_a_loop_over_tokens_and_experts(changes):
    config = dataclasses.replace(TINY, **changes)
    params, layer = build(config)
    x = inputs()
    y, routing = layer(params, x, jnp.asarray(REAL))
    theirs, statistics = expected(config, params, x)
    np.testing.assert_allclose(y, theirs, atol=2e-5)
    for name, value in statistics.items():
        np.testing.assert_allclose(getattr(routing, name), value, rtol=1e-5, err_msg=name)
    assert (statistics["dropped"] > 0) == (config.expert_capacity is not None)


@pytest.mark.parametrize("name", ["gated, beside a shared one, as Qwen", "few places"])
def test_gradients_are_the_slopes_of_the_loop(name):
    config = dataclasses.replace(TINY, **OPTIONS[name])
    params, layer = build(config)
    x = inputs(rows=2)

    def loss(params, x):
        y, routing = layer(params, x, jnp.asarray(REAL[:2]))
        return jnp.sum(jnp.sin(y)) + routing.z + jnp.sum(routing.probability * jnp.arange(4.0))

    def theirs(params, x):
        y, said = expected(config, params, x, REAL[:2])
        return np.sin(y).sum() + said["z"] + said["probability"] @ np.arange(4.0)

    arguments = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x))
    gradients = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    generator = np.random.default_rng(0)
    # Each array alone, along one direction: the choices are the same on both sides of so short a step.
    leaves, tree = jax.tree.flatten(arguments)
    for index, (leaf, gradient) in enumerate(zip(leaves, jax.tree.leaves(gradients), strict=True)):
        direction = generator.normal(size=leaf.shape)

        def moved(step, index=index, direction=direction):
            return tree.unflatten([x + step * direction if i == index else x for i, x in enumerate(leaves)])

        slope = (theirs(*moved(1e-5)) - theirs(*moved(-1e-5))) / 2e-5
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-3, abs=1e-3)


MESHES = {
    "expert=4": dict(data=1, expert=4),
    "expert=2 x data=2 x tensor=2": dict(data=2, expert=2, tensor=2),
    "expert=2 x fsdp=2 x context=2": dict(data=1, fsdp=2, expert=2, context=2),
}


def on_mesh(sizes, config, function):
    """`function(params, x, real)` compiled where the rules put its arguments, and the devices that it takes."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = sharding.create_mesh(MeshConfig(**sizes), devices)
    rules, dropped = sharding.create_rules(mesh, {"experts": config.experts, "mlp": config.axis_sizes["mlp"]})
    assert not dropped
    axes = models.create(config).logical_axes()["expert_layers"]["mlp"]
    axes = jax.tree.map(lambda names: names[1:], axes, is_leaf=lambda node: isinstance(node, tuple))
    placed = sharding.param_shardings(mesh, axes, rules)
    rows = sharding.batch_sharding(mesh)

    def under_rules(*arguments):
        with sharding.activations(mesh, rules):
            return function(*arguments)

    return jax.jit(under_rules, in_shardings=(placed, rows, rows))


@pytest.mark.parametrize(
    "changes, meshes",
    [({}, tuple(MESHES)), (QWEN, ("expert=2 x data=2 x tensor=2",)), (dict(expert_capacity=0.7), tuple(MESHES))],
    ids=["dropless", "gated", "with places"],
)
def test_loss_and_gradients_are_the_same_on_any_mesh(changes, meshes):
    config = dataclasses.replace(TINY, **changes)
    params, layer = build(config)
    x, real = inputs(), jnp.asarray(REAL)

    def loss(params, x, real):
        y, routing = layer(params, x, real)
        return jnp.sum(jnp.sin(y)) + routing.z + experts.balance_sum(routing, routing.assigned), routing

    everything = jax.value_and_grad(loss, (0, 1), has_aux=True)
    one = jax.jit(everything)(params, x, real)
    for name in meshes:
        several = on_mesh(MESHES[name], config, everything)(params, x, real)
        for (path, ours), theirs in zip(jax.tree.leaves_with_path(several), jax.tree.leaves(one), strict=True):
            scale = max(1.0, float(jnp.abs(theirs).max()))
            np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5, err_msg=f"{name} {path}")


@pytest.mark.parametrize("capacity, exchange", [(None, ("all-gather", "reduce-scatter")), (1.0, ("all-to-all",))])
def test_a_device_sees_the_weights_of_its_own_experts_only(capacity, exchange):
    config = dataclasses.replace(TINY, expert_capacity=capacity)
    params, layer = build(config)
    arguments = params, inputs(), jnp.asarray(REAL)
    text = on_mesh(MESHES["expert=4"], config, layer).lower(*arguments).compile().as_text()
    assert "f32[1,16,24]" in text and "f32[4,16,24]" not in text
    assert all(f" {name}(" in text for name in exchange), exchange


def test_experts_that_do_not_divide_over_the_mesh_are_on_every_device():
    config = dataclasses.replace(TINY, experts=3)
    mesh = sharding.create_mesh(MeshConfig(data=1, expert=2), jax.devices()[:2])
    rules, dropped = sharding.create_rules(mesh, config.axis_sizes)
    assert dropped == ["experts=3 does not divide over mesh.expert=2: every device along expert holds all of it"]
    params, layer = build(config)
    x, real = inputs(), jnp.asarray(REAL)
    rows = sharding.batch_sharding(mesh)

    def under_rules(params, x, real):
        with sharding.activations(mesh, rules):
            return layer(params, x, real)[0]

    ours = jax.jit(under_rules, in_shardings=(sharding.replicated(mesh), rows, rows))(params, x, real)
    np.testing.assert_allclose(ours, layer(params, x, real)[0], atol=1e-5)


def test_places_depend_on_no_later_token_and_on_no_other_row():
    config = dataclasses.replace(TINY, expert_capacity=0.7)
    params, layer = build(config)
    x, real = inputs(rows=2), jnp.asarray(REAL[:2])
    before, routing = layer(params, x, real)
    assert routing.dropped > 0
    later, _ = layer(params, x.at[:, 6:].add(1.0), real)
    np.testing.assert_array_equal(later[:, :6], before[:, :6])
    assert (later[:, 6:] != before[:, 6:]).any()
    other, _ = layer(params, x.at[0].add(1.0), real)
    np.testing.assert_array_equal(other[1], before[1])


def routing_of(assigned, probability):
    zeros = jnp.zeros(len(assigned))
    return experts.Routing(jnp.array(assigned, jnp.float32), jnp.array(probability, jnp.float32), zeros, zeros)


def test_balance_is_the_formula_of_switch_and_1_where_all_experts_get_the_same():
    # Four tokens, each with one expert: equations 4 to 6 by hand.
    even = routing_of([[1, 1, 1, 1]], [[1, 1, 1, 1]])
    one = routing_of([[4, 0, 0, 0]], [[4, 0, 0, 0]])
    mixed = routing_of([[2, 1, 1, 0]], [[1.6, 1.2, 0.8, 0.4]])
    tokens = 4
    assert experts.balance_sum(even, even.assigned) / tokens == 1
    assert experts.balance_sum(one, one.assigned) / tokens == 4
    formula = 4 * (2 / 4 * 0.4 + 1 / 4 * 0.3 + 1 / 4 * 0.2)
    assert experts.balance_sum(mixed, mixed.assigned) / tokens == pytest.approx(formula)
    # Two choices of each token: shares of the choices.
    twice = routing_of([[4, 2, 2, 0]], [[1.6, 1.2, 0.8, 0.4]])
    assert experts.balance_sum(twice, twice.assigned) / tokens == pytest.approx(formula)
    assert [float(experts.load(r.assigned)) for r in (even, one, mixed)] == [1, 4, 2]


def test_the_balance_of_parts_adds_up_to_that_of_the_whole_given_its_choices():
    parts = routing_of([[3, 1]], [[2.5, 1.5]]), routing_of([[0, 4]], [[1, 3]])
    whole = jax.tree.map(jnp.add, *parts)
    together = experts.balance_sum(whole, whole.assigned)
    assert sum(experts.balance_sum(part, whole.assigned) for part in parts) == pytest.approx(float(together))
    assert sum(experts.balance_sum(part, part.assigned) for part in parts) != pytest.approx(float(together), rel=0.1)


def test_the_router_computes_in_float32_under_bfloat16():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    params, layer = build(config)
    x = inputs().astype(jnp.bfloat16)
    y, routing = layer(params, x, jnp.asarray(REAL))
    assert y.dtype == jnp.bfloat16
    _, statistics = expected(config, params, x)
    assert routing.z == pytest.approx(statistics["z"], rel=1e-5)
    np.testing.assert_array_equal(routing.assigned, statistics["assigned"])


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen"])
def test_the_block_equals_that_of_hugging_face(name):
    stored = np.load(pathlib.Path(__file__).parents[1] / "golden" / "experts_tiny.npz")
    has = {key.split("/", 1)[1]: array for key, array in stored.items() if key.startswith(f"{name}/")}
    config = dataclasses.replace(
        TINY, width=8, activation="swiglu", use_bias=False, expert_width=12,
        router_softmax="chosen" if name == "mixtral" else "all",
        **(dict(shared_expert_width=10, shared_expert_gate=True) if name == "qwen" else {}),
    )
    gate, up = np.split(has["experts.gate_up_proj"], 2, axis=1)
    params = {
        "router": has["gate.weight"].T,
        **{
            part: {"kernel": array.swapaxes(1, 2)}
            for part, array in (("gate", gate), ("up", up), ("down", has["experts.down_proj"]))
        },
    }
    if name == "qwen":
        shared = {part: {"kernel": has[f"shared_expert.{part}_proj.weight"].T} for part in ("gate", "up", "down")}
        params |= {"shared": shared, "shared_gate": has["shared_expert_gate.weight"].T}
    _, layer = build(config)
    x = has["input"]
    theirs, _ = expected(config, params, x, np.ones(x.shape[:2], bool))
    scale = np.abs(has["output"]).max()
    # Its router's softmax is of float32, whatever else is.
    np.testing.assert_allclose(theirs / scale, has["output"] / scale, atol=1e-6)
    ours, _ = layer(jax.tree.map(jnp.float32, params), jnp.float32(x), None)
    np.testing.assert_allclose(ours / scale, has["output"] / scale, atol=5e-6)


def test_every_other_layer_has_experts_scanned_as_unrolled():
    config = dataclasses.replace(
        TINY, layers=3, moe_period=2, mask=("causal & window(2)", "segments"), hidden_dropout=0.3,
        attention_implementation="reference",
    )
    model = models.create(config)
    params = noise(model.param_shapes(), 0.2)
    assert params["layers"]["mlp"]["up"]["kernel"].shape == (2, 16, 24)
    assert params["expert_layers"]["mlp"]["up"]["kernel"].shape == (1, 4, 16, 24)
    assert model.logical_axes()["expert_layers"]["mlp"]["down"]["kernel"] == ("layers", "experts", "mlp", "embed")
    tokens = jax.random.randint(jax.random.key(7), (2, 12), 0, 23)
    segments = jnp.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])

    def run(model):
        def loss(params):
            hidden, routing = model.apply_with_routing(
                params, tokens, segment_ids=segments, dropout_key=jax.random.key(2)
            )
            return jnp.sum(jnp.sin(hidden * (segments > 0)[..., None])) + jnp.sum(routing.z), routing

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    scanned = run(model)
    unrolled = run(models.create(dataclasses.replace(config, scan_layers=False, remat="none")))
    # 21 tokens, of which each chooses two.
    assert scanned[0][1].assigned.shape == (1, 4) and scanned[0][1].assigned.sum() == 42
    for ours, theirs in zip(jax.tree.leaves(scanned), jax.tree.leaves(unrolled), strict=True):
        scale = max(1.0, float(jnp.abs(theirs).max()))
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-4)


def test_layers_that_make_no_whole_group_are_found_in_their_stacks():
    # Two masks and three layers a period: no group of six fits, and five layers run one by one.
    config = dataclasses.replace(TINY, layers=5, moe_period=3, mask=("causal", "everything"))
    assert [config.stack_of(layer) for layer in range(5)] == [
        ("layers", 0), ("layers", 1), ("expert_layers", 0), ("layers", 2), ("layers", 3)
    ]
    model = models.create(config)
    tokens = jax.ShapeDtypeStruct((2, 12), jnp.int32)
    _, routing = jax.eval_shape(model.apply_with_routing, model.param_shapes(), tokens)
    assert routing.assigned.shape == (1, 4)


def test_operations_count_the_chosen_experts_and_parameters_all():
    dense = models.create(dataclasses.replace(TINY, experts=0, mlp_width=48))
    routed = models.create(TINY)  # two of four experts of width 24
    router = 16 * 4
    assert routed.flops_per_token(12) - dense.flops_per_token(12) == 2 * 3 * 2 * router
    kernels_and_biases = 2 * 16 * 24 + 24 + 16
    wider = 2 * 16 * 48 + 48 + 16
    assert routed.num_params() - dense.num_params() == 2 * (4 * kernels_and_biases + router - wider)


def test_decay_and_optimizer_see_the_matrix_of_one_expert():
    axes = models.create(TINY).logical_axes()["expert_layers"]["mlp"]
    decayed = decay_mask(axes, "matrices")
    assert decayed["up"] == {"kernel": True, "bias": False} and decayed["router"]

    def measure(updates, state, params=None):
        # What Adafactor does with a norm, in small: each array is divided by its own.
        return jax.tree.map(lambda leaf: leaf / jnp.sqrt(jnp.sum(leaf**2)), updates), state

    optimizer = optax.GradientTransformation(lambda params: optax.ScaleByRssState(params), measure)
    one = per_matrix(optimizer, {"kernel": axes["up"]["kernel"], "bias": axes["up"]["bias"]})
    gradients = {"kernel": jax.random.normal(jax.random.key(0), (2, 4, 16, 24)), "bias": jnp.ones((2, 4, 24))}
    updates, _ = one.update(gradients, one.init(gradients), gradients)
    np.testing.assert_allclose(jnp.sum(updates["kernel"] ** 2, axis=(2, 3)), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(updates["bias"] ** 2, axis=2), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(experts=0, experts_per_token=3), "model.experts_per_token=3: expected 2 with model.experts=0"),
        (dict(experts=0, expert_capacity=1.0), "model.expert_capacity=1.0: expected None with model.experts=0"),
        (dict(experts_per_token=5), "model.experts_per_token=5: expected an integer of at most 4"),
        (dict(moe_period=3), "model.moe_period=3: expected an integer of at most 2"),
        (dict(expert_capacity=0.0), "model.expert_capacity=0.0: expected a factor above 0"),
        (dict(experts_per_token=1), "model.router_softmax='chosen': over one chosen expert it is always 1"),
        (dict(shared_expert_gate=True), "model.shared_expert_gate=True: there is no shared expert"),
        (dict(router_softmax="chose"), "model.router_softmax='chose': .* did you mean 'chosen'"),
        (dict(balance_loss=-1.0), "model.balance_loss=-1.0: expected a factor from 0"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_two_networks_take_no_experts():
    with pytest.raises(ValueError, match="model.experts=4: two networks are trained without"):
        models.with_generator(TINY, models.GeneratorConfig(width=0.5))


def test_padding_is_left_to_the_shared_layer():
    config = dataclasses.replace(TINY, **QWEN)
    params, layer = build(config)
    x, nothing = inputs(rows=1), jnp.zeros((1, 12), bool)
    y, routing = layer(params, x, nothing)
    assert all((leaf == 0).all() for leaf in routing)
    np.testing.assert_allclose(y, expected(config, params, x, nothing)[0], atol=1e-5)
