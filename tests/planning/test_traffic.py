"""The bytes of each axis by theory: by hand for one model, and against compiled and traced programs."""

import math

import jax
import pytest

from maskformer import data
from maskformer.planning import topologies
from maskformer.planning.layouts import resolve
from maskformer.planning.traffic import gradient_bytes
from maskformer.training import sharding
from tests.planning.cases import COMPILED, MINI, estimate_of, parameters_of, workload_of

# Where the compiler does what theory says; docs/scale.md has where it does not.
FOLLOW = {
    "bert data": "data", "bert large": "data", "bert large bfloat16": "data", "bert fsdp": "fsdp",
    "llama 7b fsdp": "fsdp", "llama full remat": "fsdp", "llama tensor": "tensor", "bert stages": "stage",
    "bert optimizer in parts": "data",
}  # fmt: skip
QUICK = ("bert data", "bert fsdp", "llama 7b fsdp", "llama tensor", "bert stages", "bert optimizer in parts")


def payload(estimate, axis):
    return sum(flow.payload_bytes for flow in estimate.traffic if axis in flow.axis.split("+"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in FOLLOW]
)
def test_compiled_traffic_is_within_five_percent_of_theory(name):
    case, axis = COMPILED[name], FOLLOW[name]
    theory = payload(estimate_of(case["flags"], case["topology"], case["slices"]), axis)
    assert case["payload"][axis] == pytest.approx(theory, rel=0.05)


def test_pure_data_parallelism_reduces_the_gradients_bytes_and_nothing_else():
    estimate = estimate_of(MINI, "v5e:2x2")
    made = workload_of(MINI)
    (flow,) = estimate.traffic
    assert (flow.axis, flow.kind) == ("data", "all-reduce")
    assert flow.payload_bytes == 4 * made.parameters == gradient_bytes(made, parameters_of(MINI, estimate.layout.sizes))
    assert flow.sent_bytes == flow.payload_bytes * 2 * 3 // 4
    # The compiler adds five scalars: the loss, its weight and the counts.
    assert COMPILED["bert data"]["payload"] == {"data": flow.payload_bytes + 20}


def test_fsdp_gathers_twice_and_scatters_once():
    # GPT mini in bfloat16: matrices of the layers twice, the table once, in two bytes; gradients in two bytes.
    flags = ("--config=configs/gpt.py:mini,seq=128", "--config.model.compute_dtype=bfloat16", "--config.mesh.fsdp=4")
    estimate = estimate_of(flags, "v5e:2x2")
    layers, ends = 4 * 12 * 256**2, (8192 + 128) * 256
    gathers = sum(flow.payload_bytes for flow in estimate.traffic if flow.kind == "all-gather")
    scatters = sum(flow.payload_bytes for flow in estimate.traffic if flow.kind == "reduce-scatter")
    # Biases of out and down projections lie along the residual's width, and are split with it.
    biases = 4 * 2 * 256
    assert gathers == 2 * (2 * layers + ends) + 2 * 2 * biases
    assert scatters == 2 * (layers + ends + biases)


def test_tensor_reduces_four_times_a_layer():
    # Shoeybi et al. 2019, figure 4; then the lookup of the table, and the head's 77 predictions of each row.
    estimate = estimate_of([*MINI, "--config.mesh.data=1", "--config.mesh.tensor=4"], "v5e:2x2")
    once = 64 * 512 * 256 * 4
    assert payload(estimate, "tensor") == 4 * 4 * once + once + 64 * 77 * 256 * 4


def test_context_gathers_keys_and_values_and_reduces_gradients():
    flags = ("--config=configs/gpt.py:mini,seq=512", "--config.mesh.context=4", "--config.mesh.data=1")
    estimate = estimate_of(flags, "v5e:2x2")
    keys = 32 * 512 * 256 * 4
    gathered = sum(flow.payload_bytes for flow in estimate.traffic if flow.kind == "all-gather")
    assert gathered == 4 * 2 * 2 * keys
    (reduced,) = [flow for flow in estimate.traffic if flow.kind == "all-reduce"]
    assert reduced.payload_bytes == 4 * workload_of(flags).parameters


def test_slices_exchange_a_part_of_the_gradient_from_each_device():
    estimate = estimate_of(MINI, "v5e:4x4", 2)
    flows = {flow.axis: flow for flow in estimate.traffic}
    assert set(flows) == {"data", "slices"}
    assert flows["slices"].payload_bytes == pytest.approx(flows["data"].payload_bytes / 16, rel=1e-6)
    # Between two slices each device sends its part once.
    assert flows["slices"].sent_bytes == flows["slices"].payload_bytes


def test_gradients_between_slices_are_halved_and_sent_once_where_the_mesh_says_so():
    parts = (*MINI, "--config.train.accumulation_steps=2")
    mesh = ("--config.mesh.dcn={'data': 2}", "--config.mesh.dcn_gradients=bfloat16")
    before, after = (payload(estimate_of(flags, "v5e:4x4", 2), "slices") for flags in (parts, (*parts, *mesh)))
    assert after == pytest.approx(before / 4, rel=1e-6)


def test_a_split_optimizer_scatters_and_gathers_the_same_bytes():
    flags = (*MINI, "--config.mesh.shard_optimizer=True")
    whole, split = estimate_of(MINI, "v5e:2x2"), estimate_of(flags, "v5e:2x2")
    assert {flow.kind for flow in split.traffic} == {"reduce-scatter", "all-gather"}
    assert sum(f.sent_bytes for f in split.traffic) == pytest.approx(sum(f.sent_bytes for f in whole.traffic), rel=1e-6)
    assert split.memory.optimizer < 0.3 * whole.memory.optimizer


def test_one_device_has_no_traffic():
    assert estimate_of(MINI, "v5e:1x1").traffic == ()


def test_the_hosts_of_gpus_are_crossed_by_the_outer_axes():
    topology = topologies.parse("h100:8x2")
    flags = (*MINI, "--config.mesh.tensor=4")
    layout = resolve(workload_of(flags, "gpu").experiment.mesh, topology)
    assert dict(layout.across) == {"data": 2}
    axes = {flow.axis for flow in estimate_of(flags, "h100:8x2").traffic}
    assert axes == {"data", "tensor", "slices"}


EXPERTS = (
    "--config=configs/gpt.py:tiny,seq=32,vocab=500,experts=8", "--config.train.batch_size=16", "--config.mesh.data=1",
    "--config.mesh.expert=4",
)  # fmt: skip


def experts_payload(*flags):
    """Of each kind, what theory says travels along `expert` in its layers: not the gradients of all parameters."""
    found = {}
    for flow in estimate_of((*EXPERTS, *flags), "v5e:2x2").traffic:
        if flow.kind != "all-reduce":
            assert flow.axis == "expert" and not flow.overlaps
            found[flow.kind] = found.get(flow.kind, 0) + flow.payload_bytes
    return found


def exchanged(flags):
    """Of each kind, the bytes that the traced training step exchanges by hand; no formula, and nothing compiled."""
    program = workload_of((*EXPERTS, *flags)).program
    placed = program.on(sharding.create_mesh(program.experiment.mesh, jax.devices()[:4]))
    layout = data.batch_layout(program.experiment.train.batch_size, program.experiment.data.length)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed.rows) for name, (shape, dtype) in layout.items()
    }
    found = {}
    add_exchanges(placed.train_step.trace(placed.state, batch).jaxpr.jaxpr, 1, found)
    return found


def add_exchanges(jaxpr, runs, found):
    for equation in jaxpr.eqns:
        name = equation.primitive.name.replace("_", "-")
        if name in ("all-gather", "all-to-all", "reduce-scatter"):
            whole = equation.outvars if name == "all-gather" else equation.invars
            size = sum(math.prod(one.aval.shape) * one.aval.dtype.itemsize for one in whole)
            found[name] = found.get(name, 0) + runs * size
        times = runs * (equation.params["length"] if name == "scan" else 1)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    add_exchanges(inner, times, found)


def test_experts_with_capacity_exchange_their_places_there_and_back():
    # 2 layers; a device's 4 rows bring 8 experts 10 places each (1.25 * 2 choices * 32 / 8) of 128 channels.
    once = 4 * 8 * 10 * 128 * 4
    capacity = "--config.model.expert_capacity=1.25"
    assert experts_payload(capacity, "--config.model.remat=none") == {"all-to-all": 2 * 4 * once}
    # Recomputed in the backward pass, both ways again.
    assert experts_payload(capacity) == {"all-to-all": 2 * 6 * once}
    # Of twice the choices twice the places.
    more = experts_payload(capacity, "--config.model.experts_per_token=4", "--config.model.remat=none")
    assert more == {"all-to-all": 2 * 4 * 2 * once}


def test_experts_that_drop_nothing_gather_all_tokens_and_their_choices():
    # 2 layers; the 16 rows of all four devices, 128 channels and 2 choices of a token, all in four bytes.
    tokens, choices = 16 * 32 * 128 * 4, 16 * 32 * 2 * 4
    assert experts_payload("--config.model.remat=none") == {
        "all-gather": 2 * (2 * tokens + 2 * choices), "reduce-scatter": 2 * (2 * tokens + choices),
    }  # fmt: skip
    assert experts_payload()["all-gather"] == 2 * (3 * tokens + 4 * choices)
    # What tokens are in bfloat16, results and gates are not.
    half = experts_payload("--config.model.compute_dtype=bfloat16", "--config.model.remat=none")
    assert half["all-gather"] == 2 * (1.5 * tokens + 2 * choices)
    assert half["reduce-scatter"] == 2 * (1.5 * tokens + choices)


@pytest.mark.parametrize("flags", [
    (), ("--config.model.remat=none", "--config.model.compute_dtype=bfloat16"), ("--config.model.remat=full",),
    ("--config.model.expert_capacity=1.25",), ("--config.model.expert_capacity=2.0", "--config.model.remat=none"),
    ("--config.model.experts_per_token=3", "--config.model.moe_period=2", "--config.train.accumulation_steps=2"),
], ids=str)  # fmt: skip
def test_experts_exchange_in_the_traced_step_what_theory_says(flags):
    assert exchanged(flags) == experts_payload(*flags)
