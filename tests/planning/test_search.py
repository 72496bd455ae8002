"""Time by the roofline, layouts ranked by it, and the nearest change where nothing fits."""

import dataclasses
import itertools
import math

import pytest

from maskformer.models.pipeline import bubble
from maskformer.planning import topologies
from maskformer.planning.chips import CHIPS
from maskformer.planning.search import layouts, search
from maskformer.planning.verdict import changes
from tests.planning.cases import TINY, estimate_of, workload_of

FLAGS = (*TINY, "--config.train.batch_size=64")


def small(topology, usable):
    """A topology whose chips have little memory."""
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, usable=usable))


def test_a_layout_is_tried_once_and_takes_all_devices():
    topology = topologies.parse("v5e:4x4")
    tried = [tuple(layout.sizes.items()) for layout in layouts(workload_of(FLAGS), topology)]
    assert len(set(tried)) == len(tried) > 5
    assert {math.prod(size for _, size in layout) for layout in tried} == {16}
    # Two heads are split at most in two, rows of 32 tokens not at all, and 500 pieces divide by 2.
    assert {dict(layout)["tensor"] for layout in tried} == {1, 2}
    assert {dict(layout)["context"] for layout in tried} == {1}


def test_stages_are_tried_where_the_layers_and_the_rows_divide():
    topology = topologies.parse("v5e:4x4")
    tried = [dict(layout.sizes) for layout in layouts(workload_of(FLAGS), topology)]
    # Two layers.
    assert {sizes["stage"] for sizes in tried} == {1, 2} and {sizes["expert"] for sizes in tried} == {1}
    # Sixteen rows are one for each shard, which two stages cannot share.
    few = [dict(layout.sizes) for layout in layouts(workload_of((*TINY, "--config.train.batch_size=16")), topology)]
    assert all(sizes["data"] * sizes["fsdp"] < 16 for sizes in few if sizes["stage"] == 2)
    rounds = (*FLAGS, "--config.model.layers=4", "--config.mesh.stage=2", "--config.mesh.rounds=2")
    # Rounds are a pipeline's, and two of them part four layers over two stages at most.
    assert {layout.sizes["stage"] for layout in layouts(workload_of(rounds), topology)} == {2}


def test_both_networks_of_a_pair_are_parted_into_stages():
    flags = ("--config=configs/electra.py:tiny,seq=32,vocab=500", "--config.train.batch_size=64")
    tried = {layout.sizes["stage"] for layout in layouts(workload_of(flags), topologies.parse("v5e:2x2"))}
    assert tried == {1, 2}


def test_experts_are_parted_where_there_are_some():
    topology = topologies.parse("v5e:4x4")
    flags = ("--config=configs/gpt.py:tiny,seq=32,vocab=500,experts=4", "--config.train.batch_size=64")
    workload = workload_of(flags)
    assert {layout.sizes["expert"] for layout in layouts(workload, topology)} == {1, 2, 4}
    # All of them are experts' layers: where each device has fewer, it has less to hold.
    state = {
        expert: min(
            one.memory.parameters + one.memory.optimizer
            for one in search(workload, topology, 1.0)
            if one.layout.sizes["expert"] == expert and one.layout.sizes["fsdp"] == one.layout.sizes["tensor"] == 1
        )
        for expert in (1, 4)
    }
    assert state[4] < 0.6 * state[1]


def test_stages_wait_for_the_first_and_the_last_microbatch():
    flags = (*FLAGS, "--config.model.layers=8")
    alone = estimate_of(flags, "v5e:2x2").roofline.compute_seconds
    # 64 rows over the shards that are left, at most four microbatches a stage.
    for stage, rounds, microbatches in ((2, 1, 8), (4, 1, 16), (2, 2, 8), (4, 2, 8)):
        chosen = [f"--config.mesh.stage={stage}", f"--config.mesh.rounds={rounds}"]
        chosen += [f"--config.mesh.microbatches={microbatches}"]
        staged = estimate_of([*flags, *chosen], "v5e:2x2").roofline.compute_seconds
        waits = (stage - 1) / (microbatches * rounds + stage - 1)
        assert bubble(stage, microbatches, rounds) == pytest.approx(waits)
        assert staged == pytest.approx(alone / (1 - waits))


def test_rows_per_device_plan_as_the_parts_that_they_stand_for():
    # Sixteen rows of each of four devices, at most five at once: four parts.
    rows, parts = (
        estimate_of([*FLAGS, flag], "v5e:2x2")
        for flag in ("--config.train.rows_per_device=5", "--config.train.accumulation_steps=4")
    )
    assert rows == parts
    assert rows.memory.earlier_gradients > 0
    assert rows != estimate_of(FLAGS, "v5e:2x2")


def test_the_fastest_that_fits_comes_first():
    topology = topologies.parse("v5e:4x4")
    ranked = search(workload_of(FLAGS), topology, 1.0)
    seconds = [one.roofline.step_seconds for one in ranked]
    assert all(later >= earlier * 0.97 for earlier, later in itertools.pairwise(seconds))
    assert not any(one.whole for one in ranked)
    peaks = sorted(one.memory.peak for one in ranked)
    tight = search(workload_of(FLAGS), small(topology, peaks[len(peaks) // 2]), 1.0)
    fits = [one.fits for one in tight]
    assert fits == sorted(fits, reverse=True) and True in fits and False in fits


def test_more_parts_are_the_nearest_change_of_a_batch_that_is_too_large():
    workload, topology = workload_of((*FLAGS, "--config.train.batch_size=4096")), topologies.parse("v5e:2x2")
    floor = search(workload_of((*FLAGS, "--config.train.batch_size=64")), topology, 1.0)[0].memory.peak
    tight = small(topology, 1.05 * floor)
    found = changes(workload, tight, 1.0)
    assert found and all(change.estimate.fits for change in found)
    first = found[0]
    assert "parts" in first.what and "--config.train.accumulation_steps=" in first.flags
    # The change does what it says: planned anew with its flags, it fits.
    again = estimate_of([*FLAGS, "--config.train.batch_size=4096", *first.flags.split()], "v5e:2x2")
    assert again.memory.peak <= tight.chip.usable


def test_a_batch_that_follows_the_mesh_runs_in_as_many_parts_as_training_gives_it():
    large = (*FLAGS, "--config.train.batch_size=4096")
    follows = estimate_of([*large, "--config.train.rows_per_device=256"], "v5e:2x2")
    told = estimate_of([*large, "--config.train.accumulation_steps=4"], "v5e:2x2")
    assert (follows.memory, follows.traffic, follows.roofline) == (told.memory, told.traffic, told.roofline)


def test_fewer_rows_at_once_are_the_nearest_change_of_a_batch_that_follows_the_mesh():
    flags = (*FLAGS, "--config.train.batch_size=4096", "--config.train.rows_per_device=512")
    topology = topologies.parse("v5e:2x2")
    tight = small(topology, 1.05 * search(workload_of(FLAGS), topology, 1.0)[0].memory.peak)
    first = changes(workload_of(flags), tight, 1.0)[0]
    assert "rows of a device at once" in first.what and "--config.train.rows_per_device=" in first.flags
    assert estimate_of([*flags, *first.flags.split()], "v5e:2x2").memory.peak <= tight.chip.usable


def test_stages_wait_for_each_other_as_long_as_the_formula_says():
    batch = (*FLAGS, "--config.model.layers=4", "--config.train.accumulation_steps=2")
    whole = estimate_of(batch, "v5e:2x2").roofline.compute_seconds
    for microbatches, rounds in ((2, 1), (8, 2)):
        mesh = ("--config.mesh.stage=2", f"--config.mesh.microbatches={microbatches}", f"--config.mesh.rounds={rounds}")
        # Of each stage's time, one piece of work of microbatches x rounds is waited for.
        waits = 1 + 1 / (microbatches * rounds)
        assert estimate_of([*batch, *mesh], "v5e:2x2").roofline.compute_seconds == pytest.approx(waits * whole)


def test_rows_that_do_not_divide_into_microbatches_are_refused():
    with pytest.raises(ValueError, match="mesh.microbatches=6: does not divide .* set --config.mesh.microbatches=4"):
        estimate_of([*FLAGS, "--config.mesh.stage=2", "--config.mesh.microbatches=6"], "v5e:2x2")


def test_where_no_change_helps_there_is_none():
    assert changes(workload_of(FLAGS), small(topologies.parse("v5e:2x2"), 1000.0), 1.0) == []


def test_more_chips_are_named_where_only_they_help():
    workload, topology = workload_of(FLAGS), topologies.parse("v5e:2x2")
    # Less than the state of any layout of these chips.
    least = min(one.memory.parameters + one.memory.optimizer for one in search(workload, topology, 1.0))
    found = changes(workload, small(topology, 0.9 * least), 1.0)
    assert [change.what for change in found] == ["more chips"] and "--topology v5e:" in found[0].flags


def test_the_step_is_the_slowest_of_what_runs_side_by_side():
    roofline = estimate_of(FLAGS, "v5e:2x2", price=3.6).roofline
    hidden = max(roofline.compute_seconds, roofline.memory_seconds, *roofline.axis_seconds.values())
    assert roofline.step_seconds == pytest.approx(hidden + roofline.exposed_seconds)
    tokens = workload_of(FLAGS).tokens
    assert roofline.tokens_per_second == pytest.approx(tokens / roofline.step_seconds)
    # Four chips at 3.60 dollars an hour are 0.004 dollars a second.
    assert roofline.dollars_per_billion_tokens == pytest.approx(0.004 / roofline.tokens_per_second * 1e9)
    flops = workload_of(FLAGS).flops
    assert roofline.mfu == pytest.approx(flops / roofline.step_seconds / 4 / CHIPS["v5e"].flops)


def test_tensor_parallelism_is_exposed_and_data_parallelism_is_not():
    assert estimate_of(FLAGS, "v5e:2x2").roofline.exposed_seconds == 0
    tensor = estimate_of([*FLAGS, "--config.mesh.tensor=2"], "v5e:2x2").roofline
    assert tensor.exposed_seconds == pytest.approx(tensor.axis_seconds["tensor"])


def test_full_rematerialisation_costs_a_forward_pass():
    kept, full = (
        estimate_of([*FLAGS, f"--config.model.remat={policy}"], "v5e:2x2").roofline
        for policy in ("elementwise", "full")
    )
    assert full.compute_seconds == pytest.approx(4 / 3 * kept.compute_seconds)


def test_slices_share_the_hosts_network():
    # One ring crosses it: each of a host's four chips has a quarter of 25 GB/s.
    estimate = estimate_of(FLAGS, "v5e:2x2", 2)
    (flow,) = [flow for flow in estimate.traffic if flow.axis == "slices"]
    assert estimate.roofline.axis_seconds["slices"] == pytest.approx(flow.sent_bytes / (2.5e10 / 4))


def test_float32_products_cost_a_gpu_twice_and_a_tpu_nothing():
    half = (*FLAGS, "--config.model.compute_dtype=bfloat16")
    gpu = [estimate_of(flags, "h100:8").roofline.compute_seconds for flags in (FLAGS, half)]
    tpu = [estimate_of(flags, "v5e:2x2").roofline.compute_seconds for flags in (FLAGS, half)]
    assert gpu[0] == pytest.approx(2 * gpu[1]) and tpu[0] == pytest.approx(tpu[1])
