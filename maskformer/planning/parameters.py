"""The parameters of a program by the names of their axes: what a mesh splits of each, and which products read it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax

from maskformer.models.partitioning import Rules, partition_spec
from maskformer.planning.workload import Planned

# Axes that name rows of a table which is looked up.
TABLES = ("vocab", "positions", "token_types")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of parameters on a mesh.

    Attributes:
      path: where it is in the model, such as ("layers", "attention", "query", "kernel").
      axes: logical names of its axes.
      shape: of the whole array.
      itemsize: bytes of an element as it is stored.
      split: mesh axes that split it.
      local: elements that a device holds.
    """

    path: tuple[str, ...]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    itemsize: int
    split: tuple[str, ...]
    local: int

    @property
    def stacked(self) -> bool:
        """Whether it is of the layers, one after the other."""
        return self.axes[0] == "layers"

    @property
    def layers(self) -> int:
        return self.shape[0] if self.stacked else 1

    @property
    def wide(self) -> bool:
        """Whether it is used in its own dtype: norms compute in float32."""
        return set(self.axes) <= {"norm", "layers"}

    @property
    def matrix(self) -> bool:
        """Whether a product reads it, or rows are looked up in it."""
        rest = [axis for axis in self.axes if axis not in ("layers", "experts")]
        return len(rest) > 1 and not set(rest) <= {"heads", "kv_heads", "head_dim"}

    def size(self, axis: str) -> int:
        return self.shape[self.axes.index(axis)]


def parameters(program: Planned, sizes: Mapping[str, int], rules: Rules) -> list[Parameter]:
    """All parameters of a program on a mesh of these axis sizes."""
    shapes = jax.tree_util.tree_leaves_with_path(program.model.param_shapes())
    names = jax.tree.leaves(program.model.logical_axes(), is_leaf=lambda node: isinstance(node, tuple))
    found = []
    for (keys, shape), axes in zip(shapes, names, strict=True):
        path = tuple(str(key.key) for key in keys)
        split: list[str] = []
        for entry in partition_spec(axes, rules):
            split += [entry] if isinstance(entry, str) else list(entry or ())
        split = [axis for axis in split if sizes[axis] > 1]
        local = math.prod(shape.shape) // math.prod(sizes[axis] for axis in split)
        found.append(Parameter(path, axes, tuple(shape.shape), shape.dtype.itemsize, tuple(split), local))
    return found
