"""Collectives read out of compiled programs: forms of groups, loops, fusions, what crosses slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maskformer.planning import hlo
from maskformer.planning.collectives import axis_name, groups, read

MESH = {"data": 2, "fsdp": 2, "tensor": 2}

PROGRAM = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[8,128]) -> f32[4,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %inner = f32[8,128]{1,0:T(8,128)} all-reduce(%p), channel_id=7, replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%add
  ROOT %slice = f32[4,128]{1,0} dynamic-slice(%inner, %p), dynamic_slice_sizes={4,128}
}

%fused.1 (p: bf16[4,64]) -> bf16[8,64] {
  %p = bf16[4,64]{1,0} parameter(0)
  ROOT %part.1 = bf16[8,64]{1,0} all-gather(%p), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
}

%fused.2 (p: bf16[4,64]) -> bf16[8,64] {
  %p = bf16[4,64]{1,0} parameter(0)
  ROOT %part.2 = bf16[8,64]{1,0} all-gather(%p), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
}

%condition (s: (s32[], f32[4,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %s = (s32[]{:T(128)}, f32[4,4]{1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%s), index=0
  ROOT %more = pred[] compare(%counter, %limit), direction=LT, metadata={op_name="direction=GT"}
}

%body (s: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %s = (s32[], f32[4,4]{1,0}) parameter(0)
  %x = f32[4,4]{1,0} get-tuple-element(%s), index=1
  %pair = (f32[4,4]{1,0:T(8,128)S(1)}, /*index=1*/f32[2]{0}) all-reduce(%x, %x), channel_id=4, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, to_apply=%add
  %moved = (f32[4,4]{1,0}, f32[4,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=5, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  ROOT %next = (s32[], f32[4,4]{1,0}) tuple(%s, %x)
}

ENTRY %main (p: f32[8,128], q: bf16[4,64]) -> f32[4,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %q = bf16[4,64]{1,0} parameter(1)
  %one = bf16[8,64]{1,0} fusion(%q), kind=kCustom, calls=%fused.1
  %two = bf16[8,64]{1,0} fusion(%q), kind=kCustom, calls=%fused.2
  %start = (s32[], f32[4,4]{1,0}) tuple(%p, %p)
  %loop = (s32[], f32[4,4]{1,0}) while(%start), condition=%condition, body=%body
  %out = (f32[2,8,128]{2,1,0}, u32[], token[]) send(%p, %q), channel_id=9, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.5_0"}
  ROOT %end = f32[4,128]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_every_form_is_counted_once_for_each_time_it_runs():
    collectives, problems = read(PROGRAM, MESH)
    found = {(one.axis, one.kind): (one.count, one.payload_bytes, one.sent_bytes) for one in collectives}
    assert found == {
        ("fsdp", "reduce-scatter"): (1, 8 * 128 * 4, 8 * 128 * 2),
        ("tensor", "all-gather"): (1, 8 * 64 * 2, 8 * 64),
        ("data+fsdp", "all-reduce"): (12, 12 * (64 + 8), 12 * (64 + 8) * 3 // 2),
        ("tensor", "collective-permute"): (12, 12 * 64, 12 * 64),
        ("slices", "all-reduce"): (1, 2 * 8 * 128 * 4, 2 * 8 * 128 * 4),
    }
    assert problems == []


def test_a_loop_without_a_trip_count_is_told():
    collectives, problems = read(PROGRAM.replace("constant(12)", "parameter(1)"), MESH)
    assert problems == ["loop loop: no trip count is written; counted once"]
    assert {one.count for one in collectives} == {1}
    known = PROGRAM.replace("constant(12)", "parameter(1)").replace(
        "body=%body", 'body=%body, metadata={op_name="x"}, backend_config={"known_trip_count":{"n":"12"}}'
    )
    assert max(one.count for one in read(known, MESH)[0]) == 12


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.parse("HloModule empty")
    with pytest.raises(ValueError, match="a form that is not known"):
        groups("[2,2]<=")


@pytest.mark.parametrize("text, expected", [
    ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['x'=2,'y'=4] {'x'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['x'=2,'y'=4] {'y':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}", [[0, 2], [1, 3]]),
])  # fmt: skip
def test_groups_are_read_in_each_form(text, expected):
    assert groups(text) == expected


def test_an_axis_within_a_slice_is_the_axis():
    shape = {"data": 4, "tensor": 2}
    inner = [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert axis_name(inner, shape) == "part of data" and axis_name(inner, shape, {"data": 2}) == "data"


@pytest.mark.parametrize("axis, size", [("data", 2), ("tensor", 4)])
def test_a_program_that_jax_compiled_sends_what_it_was_told_to(axis, size):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))

    def step(x):
        def body(total, _):
            return total + jax.lax.psum(x, axis), None

        total, _ = jax.lax.scan(body, jnp.zeros_like(x), None, length=5)
        return jax.lax.all_gather(total, axis)

    spec = PartitionSpec(("data", "tensor"))
    out = PartitionSpec(None, spec[0])
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, spec))
    collectives, _ = read(run.lower(x).compile().as_text(), dict(mesh.shape))
    local = 8 * 32 * 4
    found = {one.kind: one for one in collectives}
    assert {one.axis for one in collectives} == {axis}
    assert found["all-gather"].payload_bytes == size * local
    # XLA may move what does not change out of the loop.
    assert found["all-reduce"].payload_bytes in (local, 5 * local)
