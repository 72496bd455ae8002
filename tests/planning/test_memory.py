"""Bytes on a device: exact where they are known, and within a tenth of what the TPU compiler says of the whole."""

import pytest

from maskformer.planning.memory import shares
from tests.planning.cases import COMPILED, MINI, estimate_of, workload_of

# Compiled and fitted cases that are traced in a second; the slow ones are the recipes that docs/scale.md plans.
QUICK = ("bert data", "bert tensor", "llama fsdp", "llama 7b fsdp", "bert stages", "bert optimizer in parts")


def cases():
    slow = [pytest.mark.slow]
    return [pytest.param(case, id=name, marks=[] if name in QUICK else slow) for name, case in COMPILED.items()]


@pytest.mark.parametrize("case", cases())
def test_the_peak_is_within_a_tenth_of_the_compilers(case):
    made = estimate_of(case["flags"], case["topology"], case["slices"])
    if case["needed"] is not None:
        # What does not fit is told by its temporaries alone.
        assert not made.fits
        assert made.memory.peak == pytest.approx(case["needed"], rel=0.1)
        return
    assert made.fits
    assert made.memory.peak == pytest.approx(case["peak"], rel=0.1)
    # But for the padding of small arrays to the TPU's tiles, and arrays of a batch that no step reads.
    assert made.memory.arguments == pytest.approx(case["arguments"], rel=0.005, abs=4e6)


def test_the_state_of_adam_is_three_numbers_a_parameter():
    memory = estimate_of(MINI, "v5e:2x2").memory
    parameters = workload_of(MINI).parameters
    assert memory.parameters == 4 * parameters
    assert 8 * parameters <= memory.optimizer <= 8 * parameters + 1000  # and counters
    assert memory.gradients == 4 * parameters


def test_fsdp_splits_the_state_and_tensor_the_activations():
    whole = estimate_of(MINI, "v5e:2x2").memory
    fsdp = estimate_of([*MINI, "--config.mesh.fsdp=4"], "v5e:2x2").memory
    tensor = estimate_of([*MINI, "--config.mesh.data=1", "--config.mesh.tensor=4"], "v5e:2x2").memory
    assert fsdp.optimizer < 0.27 * whole.optimizer and fsdp.activations == whole.activations
    # Four times the rows, of which heads and feed-forward width are split.
    assert whole.activations < tensor.activations < 4 * whole.activations


@pytest.mark.parametrize("flag, field, factor", [
    ("--config.train.accumulation_steps=2", "activations", 0.5),
    ("--config.train.accumulation_steps=2", "gradients", 2.0),
    ("--config.optimizer.name=lion", "optimizer", 0.5),
    ("--config.optimizer.ema_decay=0.9", "averages", None),
    ("--config.train.batch_size=128", "activations", 2.0),
])
def test_a_setting_changes_its_part_alone(flag, field, factor):
    before, after = (estimate_of(flags, "v5e:2x2").memory for flags in (MINI, (*MINI, flag)))
    expected = before.parameters if factor is None else factor * getattr(before, field)
    assert getattr(after, field) == pytest.approx(expected, rel=1e-4)


def test_rematerialisation_is_ordered_by_what_it_keeps():
    kept = [
        estimate_of([*MINI, f"--config.model.remat={policy}"], "v5e:2x2").memory.activations
        for policy in ("full", "elementwise", "none")
    ]
    assert kept[0] < kept[1] < kept[2]


def test_the_parts_that_are_shown_add_up_to_the_peak():
    moments = set()
    for flags in (
        MINI, (*MINI, "--config.model.remat=full"), (*MINI, "--config.train.batch_size=4"),
        (*MINI, "--config.train.accumulation_steps=2", "--config.objective.rate=0.9"),
    ):  # fmt: skip
        memory = estimate_of(flags, "v5e:2x2").memory
        moments.add(memory.moment)
        assert sum(shares(memory).values()) + memory.batch == pytest.approx(memory.peak, rel=1e-6)
    assert moments == {"loss", "layers"}


def test_experts_that_drop_nothing_have_room_for_the_tokens_of_all_devices():
    flags = ("--config=configs/gpt.py:tiny,seq=32,vocab=500,experts=8", "--config.train.batch_size=16")
    capacity = "--config.model.expert_capacity=1.25"

    def activations(*mesh):
        return estimate_of((*flags, *mesh), "v5e:2x2").memory.activations

    # Two choices of each token: a row of 32 has 64, and the products of two layers keep them.
    kept = [one for one in workload_of(flags).kept if one.sorted]
    assert kept and all(1009 * 64 in one.shape for one in kept)
    sizes = {**workload_of(flags).sizes, "rows": 16 / 4}
    alone = sum(one.bytes(sizes) for one in kept)
    expert = activations("--config.mesh.data=1", "--config.mesh.expert=4")
    # Four times the tokens, of which each may still choose both of the two experts that are here.
    assert expert - activations() == pytest.approx(3 * alone, rel=1e-3)
    # With capacity the places of an expert come from all devices, and each has fewer experts.
    assert activations(capacity, "--config.mesh.data=1", "--config.mesh.expert=4") == activations(capacity)
