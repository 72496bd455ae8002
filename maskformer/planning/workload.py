"""What a program asks of each device, from its config alone: arrays that are kept for the backward pass, by their axes.

The loss is traced once, without a device and at sizes that are prime numbers where a mesh may split them: rows, heads,
feed-forward width and vocabulary. Each array that `jax.vjp` keeps then tells by its factors which axes it has, and what
a device of any mesh holds of it follows by arithmetic. Nothing here is written for one model: whatever a task computes,
under whatever rematerialisation and attention backend, is what is counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from maskformer import data
from maskformer.attention import platform
from maskformer.objectives import Vocabulary
from maskformer.training.experiment import ExperimentConfig, vocabulary_to_be
from maskformer.training.program import Placed, Program

# Sizes that stand for what a mesh splits; no size of a model is a multiple of one of them by design.
_MARKS = {"rows": 1009, "heads": 1013, "mlp": 10_007}


@dataclasses.dataclass(frozen=True)
class Planned(Program):
    """A program whose vocabulary is what the config says: no tokenizer is trained and no text is read.

    A trained tokenizer may come out smaller where the text is too small for as many pieces; a plan is then for more.

    Attributes:
      vocabulary_size: another size than the config's; None for that one.
    """

    vocabulary_size: int | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        vocabulary = vocabulary_to_be(self.experiment.data)
        if self.vocabulary_size is None:
            return vocabulary
        return dataclasses.replace(vocabulary, size=self.vocabulary_size)

    def placed(self, sizes: Mapping[str, int]) -> Placed:
        """The program on a mesh of these axis sizes that has no devices."""
        return self.on(AbstractMesh(tuple(sizes.values()), tuple(sizes)))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Kept:
    """Arrays of one shape that the backward pass needs.

    Attributes:
      kind: "layers" where the scanned layers stack it, "logits" where it has an entry for each token of the vocabulary,
        "weights" where it has no rows, "ends" for the rest: embeddings, the head, and layers that are not scanned.
      dtype: numpy's.
      size: elements without the marked axes.
      powers: how often each marked axis is in it.
      outer: the last two axes are heads and their channels.
      shape: as traced.
      sorted: tokens are sorted by their experts: rows and positions are one axis.
    """

    kind: str
    dtype: Any
    size: int
    powers: Mapping[str, int]
    outer: bool
    shape: tuple[int, ...]
    sorted: bool = False

    def bytes(self, sizes: Mapping[str, float], itemsize: int | None = None) -> float:
        """Bytes with these sizes of the marked axes."""
        scale = math.prod(sizes[axis] ** power for axis, power in self.powers.items())
        return self.size * scale * (self.dtype.itemsize if itemsize is None else itemsize)

    @property
    def floating(self) -> bool:
        # By kind: numpy takes bfloat16 for no floating-point number.
        return bool(jax.numpy.issubdtype(self.dtype, jax.numpy.floating))


@dataclasses.dataclass(frozen=True)
class Workload:
    """A program's demands, whatever the mesh.

    Attributes:
      program: the program.
      kept: what the forward pass keeps.
      layer: what one layer would keep if nothing were recomputed, which is what its backward pass works on.
      sizes: the real sizes of the marked axes of the whole batch; "heads" are key heads.
      splits_heads: whether heads and feed-forward width were marked; where not (a pair of networks, masks of each
        head), a plan counts them whole on each device along `tensor`.
    """

    program: Planned
    kept: tuple[Kept, ...]
    layer: tuple[Kept, ...]
    sizes: Mapping[str, int]
    splits_heads: bool

    @property
    def experiment(self) -> ExperimentConfig:
        return self.program.experiment

    @property
    def parameters(self) -> int:
        return self.program.model.num_params()

    @property
    def tokens(self) -> int:
        """Of a step: positions of the batch, padding included."""
        return self.experiment.train.batch_size * self.experiment.data.length

    @property
    def flops(self) -> float:
        """Of a step on all devices, without what rematerialisation repeats."""
        return self.program.task.flops_per_token * self.tokens

    def under(self, experiment: ExperimentConfig) -> Workload:
        """The workload of an experiment that has the same model and rows of the same length: nothing is traced anew."""
        program = Planned(experiment, self.program.vocabulary_size)
        return dataclasses.replace(self, program=program, sizes={**self.sizes, "rows": experiment.train.batch_size})

    @functools.cached_property
    def repeated_share(self) -> float:
        """Forward passes of the layers that the backward pass repeats: 1 with remat "full", else their elementwise
        part, which is not counted."""
        return 1.0 if self.experiment.model.get("remat") == "full" else 0.0

    def counting_passes(self, parts: int) -> int:
        """Forward passes before the step's own: the tokens of each expert are counted over the whole batch first, which
        takes one where it runs in parts."""
        return int(bool(self.experiment.model.get("experts")) and parts > 1)


def trace(program: Planned, target: str) -> Workload:
    """The workload of a program on "tpu" or "gpu", whose attention backends are not the same."""
    experiment = program.experiment
    pair = bool(experiment.model.get("generator"))
    if not pair:
        try:
            return _trace(program, target, heads=True)
        except ValueError:
            # Masks that are written for each head fix their number.
            pass
    return _trace(program, target, heads=False)


def _trace(program: Planned, target: str, heads: bool) -> Workload:
    experiment, config = program.experiment, program.model_config
    axes = config.axis_sizes
    vocabulary = _prime(program.vocabulary.size)
    model = {**experiment.model, "vocab_multiple": 1}
    marks = {"rows": _MARKS["rows"], "vocab": vocabulary}
    sizes = {"rows": experiment.train.batch_size, "vocab": axes["vocab"]}
    if heads:
        groups = axes["heads"] // axes["kv_heads"]
        model |= {
            "heads": _MARKS["heads"] * groups, "kv_heads": _MARKS["heads"], "mlp_width": _MARKS["mlp"],
            "head_dim": config.resolved_head_dim,
        }  # fmt: skip
        marks |= {"heads": _MARKS["heads"], "mlp": _MARKS["mlp"]}
        sizes |= {"heads": axes["kv_heads"], "mlp": axes["mlp"]}
    kept = _kept(_changed(program, vocabulary, model), marks, target)
    # Layers whose masks differ are one body of the loop, but each is rematerialised by itself.
    # A mixture's layers come in groups, of which the last has experts.
    group = model.get("moe_period", 1) if model.get("experts") else 1
    one = {**model, "layers": group, "mask": config.mask_pattern[-1], "remat": "none", "scan_layers": True}
    layer = tuple(
        array for array in _kept(_changed(program, vocabulary, one), marks, target) if array.kind == "layers"
    )
    return Workload(program, kept, layer, sizes, heads)


def _changed(program: Planned, vocabulary: int, model: Mapping[str, Any]) -> Planned:
    return Planned(dataclasses.replace(program.experiment, model=model), vocabulary)


def _kept(program: Planned, marks: Mapping[str, int], target: str) -> tuple[Kept, ...]:
    """What `jax.vjp` of the loss keeps; nothing is computed."""
    layout = data.batch_layout(marks["rows"], program.experiment.data.length)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in layout.items()}
    task = program.task

    def backward(params: Any, batch: Any) -> Any:
        example = task.corrupt(jax.random.key(0), batch, 0, task.initial_state())
        loss = lambda params: sum(task.sums(params, example, jax.random.key(1)).terms.values())
        return jax.vjp(loss, params)[1]

    with platform.assume(target):
        arrays = jax.tree.leaves(jax.eval_shape(backward, program.model.param_shapes(), batch))
    scanned = program.experiment.model.get("scan_layers", True)
    model, in_one = program.model_config, None
    if program.experiment.model.get("experts") and model.expert_capacity is None:
        # As many as `models.expert_dispatch.dropless` sorts.
        in_one = marks["rows"] * model.experts_per_token * program.objective.copies * program.objective.output_length
    keys = jax.dtypes.prng_key
    kept = [_read(array, marks, scanned) for array in arrays if not jax.dtypes.issubdtype(array.dtype, keys)]
    return tuple(dataclasses.replace(one, sorted=in_one in one.shape) for one in kept)


def _read(array: Any, marks: Mapping[str, int], scanned: bool) -> Kept:
    powers: dict[str, int] = {}
    size, first = 1, None
    for place, length in enumerate(array.shape):
        for axis, mark in marks.items():
            while length and length % mark == 0:
                length //= mark
                powers[axis] = powers.get(axis, 0) + 1
                first = place if axis == "rows" and first is None else first
        size *= length
    if "rows" not in powers:
        kind = "weights"
    elif "vocab" in powers:
        kind = "logits"
    else:
        kind = "layers" if scanned and first else "ends"
    heads = marks.get("heads")
    outer = heads is not None and len(array.shape) > 3 and array.shape[-2] % heads == 0
    return Kept(kind, np.dtype(array.dtype), size, powers, outer, tuple(array.shape))


def _prime(least: int) -> int:
    """The first prime of at least `least` that is none of the other marks."""
    number = max(least, 5)
    while number in _MARKS.values() or any(number % factor == 0 for factor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number
