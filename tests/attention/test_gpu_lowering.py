"""The GPU backends lowered for CUDA on a machine that has none: what they ask of the GPU, not what it computes."""

import types

import absl.flags
import jax
import jax.numpy as jnp
import pytest

import maskformer as mf
from maskformer import masks
from maskformer.attention import platform

# 256 long: nothing is filled up.
SHAPES = [jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)] * 3


def lowered(mask, implementation, shapes=SHAPES, **options):
    def loss(query, key, value):
        output = mf.dot_product_attention(query, key, value, mask=mask, implementation=implementation, **options)
        return output.astype(jnp.float32).sum()

    return export(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))), shapes)


def export(step, shapes):
    """The module lowered for CUDA, as text."""
    calls = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", "mosaic_gpu_v2", "mosaic_gpu")
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(call) for call in calls]
    return jax.export.export(step, platforms=["cuda"], disabled_checks=unchecked)(*shapes).mlir_module()


CUDNN_MASKS = {
    "none": None,
    "causal": masks.causal(),
    "causal window": masks.causal() & masks.sliding_window(32),
    "causal lengths": masks.causal() & masks.key_padding(lengths=jnp.array([256, 100])),
}


@pytest.fixture
def cudnn_is_there(monkeypatch):
    """jax.nn asks for the version of a library that only a GPU machine has."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False, raising=False)


@pytest.mark.parametrize("name", CUDNN_MASKS)
def test_cudnn_lowers_forward_and_backward_without_a_dense_mask(cudnn_is_there, name):
    module = lowered(CUDNN_MASKS[name], "cudnn")
    assert "__cudnn$fmhaSoftmax" in module
    assert "__cudnn$fmhaSoftmaxBackward" in module
    assert "256x256x" not in module  # a mask turned into a bias would be [1, 1, 256, 256]


# How queries and keys are mapped: the library's own rule wants everything mapped over its first axis.
MAPPED = {"all": (0, 0, 0), "queries": (0, None, None), "keys": (None, 0, 0), "another axis": (1, 0, 0)}


def lowered_under_vmap(mask, implementation, axes):
    def loss(query, key, value):
        attend = jax.checkpoint(lambda *a: mf.dot_product_attention(*a, mask=mask, implementation=implementation))
        return attend(query, key, value).astype(jnp.float32).sum()  # its cotangent is not mapped

    step = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=axes))
    shapes = [list(SHAPES[0].shape) for _ in axes]
    for shape, axis in zip(shapes, axes):
        if axis is not None:
            shape.insert(axis, 3)
    return export(step, [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes])


@pytest.mark.parametrize("name", MAPPED)
def test_cudnn_lowers_under_vmap_and_remat_whatever_is_mapped(cudnn_is_there, name):
    for mask in (masks.causal(), CUDNN_MASKS["causal lengths"]):
        assert "__cudnn$fmhaSoftmaxBackward" in lowered_under_vmap(mask, "cudnn", MAPPED[name])


def test_cudnn_lowers_under_vmap_of_vmap_with_another_operand_mapped_in_each(cudnn_is_there):
    def loss(query, key, value):
        return mf.dot_product_attention(query, key, value, implementation="cudnn").astype(jnp.float32).sum()

    step = jax.vmap(jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(0, None, None)), in_axes=(None, 0, 0))
    shapes = [jax.ShapeDtypeStruct((size, *SHAPES[0].shape), jnp.bfloat16) for size in (3, 5, 5)]
    assert "__cudnn$fmhaSoftmaxBackward" in export(jax.jit(step), shapes)


@pytest.mark.parametrize("lengths", [(37, 45), (45, 45), (1, 1)], ids=lambda lengths: "x".join(map(str, lengths)))
def test_cudnn_lowers_forward_and_backward_at_odd_lengths(cudnn_is_there, lengths):
    shapes = [jax.ShapeDtypeStruct((2, length, 4, 64), jnp.bfloat16) for length in (lengths[0], lengths[1], lengths[1])]
    for mask in (None, masks.causal() & masks.sliding_window(9) if lengths[0] == lengths[1] else None):
        assert "__cudnn$fmhaSoftmaxBackward" in lowered(mask, "cudnn", shapes)


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_the_plain_backends_lower_for_cuda_with_every_option(implementation):
    table = jnp.zeros((4, 9))
    module = lowered(
        masks.causal() & masks.segments(jnp.zeros((2, 256), jnp.int32)),
        implementation,
        bias=jnp.zeros((1, 4, 1, 256)),
        score_mod=mf.attention.score_mods.relative_bias(table),
        sink_logits=jnp.zeros(4),
        dropout_rate=0.1,
        dropout_key=jax.random.key(0),
    )
    assert "dot_general" in module


TOKAMAX_MASKS = {
    "causal": masks.causal(),
    "window": masks.sliding_window(32, 16),
    "packed": masks.segments(jnp.repeat(jnp.arange(4), 64)) & masks.causal(),
}


@pytest.fixture
def tokamax_is_there(monkeypatch):
    pytest.importorskip("tokamax", reason="needs the extra [gpu]")
    absl.flags.FLAGS(["test"])  # tokamax reads flags that nobody has parsed
    gpu_utils = pytest.importorskip("tokamax._src.gpu_utils")
    monkeypatch.setattr(gpu_utils, "has_mosaic_gpu_support", lambda device=None: True)
    monkeypatch.setattr(gpu_utils, "_compute_capability", lambda device=None: 9.0)
    # From 0.0.17 on its schedule asks how many cores the GPU has.
    mosaic = pytest.importorskip("tokamax._src.mosaic_gpu")
    hopper = types.SimpleNamespace(get_default_device=lambda: types.SimpleNamespace(core_count=132))
    monkeypatch.setattr(mosaic, "backend", hopper, raising=False)


@pytest.mark.parametrize("name", TOKAMAX_MASKS)
def test_tokamax_lowers_its_kernels_for_cuda(tokamax_is_there, name):
    assert "mosaic_gpu" in lowered(TOKAMAX_MASKS[name], "tokamax")


def test_packed_documents_of_ids_known_only_at_run_time_run_in_tokamaxs_kernels(tokamax_is_there):
    def loss(query, key, value, ids):
        mask = masks.causal() & masks.sliding_window(64) & masks.documents(ids)
        assert mf.explain(mask, query, key, value).backend == "tokamax"
        return mf.dot_product_attention(query, key, value, mask=mask).astype(jnp.float32).sum()

    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    with platform.assume("gpu"):
        module = export(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), [*SHAPES, ids])
    assert "mosaic_gpu" in module


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.sliding_window(9, 4)], ids=["none", "causal", "window"])
def test_tokamax_lowers_its_kernels_at_odd_lengths(tokamax_is_there, mask):
    shapes = [jax.ShapeDtypeStruct((2, length, 4, 64), jnp.bfloat16) for length in (37, 45, 45)]
    assert "mosaic_gpu" in lowered(mask, "tokamax", shapes)


@pytest.mark.parametrize("name", MAPPED)
def test_tokamax_lowers_under_vmap_and_remat_whatever_is_mapped(tokamax_is_there, name):
    assert "mosaic_gpu" in lowered_under_vmap(masks.causal(), "tokamax", MAPPED[name])


def test_a_gpu_platform_prefers_its_fused_kernel_and_says_why_it_passes_it_over():
    query = jax.ShapeDtypeStruct((2, 4096, 4, 64), jnp.bfloat16)
    with platform.assume("gpu"):
        fused = mf.explain(masks.causal(), query, query, query)
        odd = mf.explain(masks.causal() & ~masks.sliding_window(8), query, query, query)
    assert fused.backend == "cudnn"
    assert odd.backend == "blockwise"
    assert "dense bias" in odd.passed_over["cudnn"]
    assert "one run of keys" in odd.passed_over["tokamax"] or "not installed" in odd.passed_over["tokamax"]
