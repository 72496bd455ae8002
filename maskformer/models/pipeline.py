"""Pipeline parallelism: the layer stack in stages, each on devices of its own along the mesh axis `stage`.

A batch is cut into microbatches that follow each other through the stages. With `rounds` of 1 each stage has one run of
successive layers, as in GPipe (Huang et al. 2019); with more it has `rounds` of them, `stages` blocks apart, and every
microbatch passes each device so many times (the interleaved schedule of Narayanan et al. 2021, "circular" in praxis
and MaxText). Differentiating the schedule gives the mirrored one: all forward passes, then all backward passes. What
waits between the two is what `model.remat` keeps, of the whole batch; parts of `train.accumulation_steps` need less.

Here is which schedule it is; `models.stages` runs it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator

from jax.sharding import Mesh

AXIS = "stage"
# Microbatches where nobody says how many, for each stage: the bubble is then below a fifth.
MICROBATCHES_PER_STAGE = 4


def bubble(stages: int, microbatches: int, rounds: int = 1) -> float:
    """The share of time that a stage waits: `(S - 1) / (M R + S - 1)`, the same forward and backward.

    Each stage has `M R` pieces of work of `1 / (S R)` of the layers, and the last stage gets its first one `S - 1`
    pieces later than the first stage (Huang et al. 2019, section 2.3; Narayanan et al. 2021, section 2.2, who divide by
    the working time alone).

    >>> bubble(4, 12), bubble(4, 12, rounds=3), bubble(1, 8)
    (0.2, 0.07692307692307693, 0.0)
    """
    return (stages - 1) / (microbatches * rounds + stages - 1)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How stacks of layers run over the axis `stage` of a mesh.

    Attributes:
      mesh: the mesh.
      batch: the mesh axes that split the rows of a batch, slowest first: `data`, what is before it and does not split a
        parameter either, and those that do. Every stage has all of them.
      microbatches: how many a batch is cut into, a multiple of the stages; a batch that does not divide takes the most
        below that it does. None for `MICROBATCHES_PER_STAGE` for each stage.
      rounds: how often a microbatch passes each device.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    microbatches: int | None = None
    rounds: int = 1

    @property
    def stages(self) -> int:
        return self.mesh.shape[AXIS]

    @property
    def replicas(self) -> tuple[str, ...]:
        """The axes of `batch` along which parameters are the same."""
        return self.batch[: self.batch.index("data") + 1]

    @property
    def shards(self) -> int:
        """Parts that the rows of a batch are split in along the axes of `batch`."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch)

    def cut(self, rows: int, name: str = "batch") -> int:
        """Microbatches of a batch of `rows` rows.

        Raises:
          ValueError: not even one row for each stage; `name` is what the batch is called.

        >>> from jax.sharding import AbstractMesh
        >>> mesh = AbstractMesh((4, 2), ("stage", "data"))
        >>> pipeline = Pipeline(mesh, ("data",), microbatches=8)
        >>> pipeline.cut(32), pipeline.cut(24), pipeline.cut(8)
        (8, 4, 4)
        >>> pipeline.cut(12)
        Traceback (most recent call last):
            ...
        ValueError: batch=12: does not divide over 2 shards of the batch x mesh.stage=4; use a multiple of 8
        """
        if rows % (self.shards * self.stages):
            raise ValueError(
                f"{name}={rows}: does not divide over {self.shards} shards of the batch x mesh.stage={self.stages}; "
                f"use a multiple of {self.shards * self.stages}"
            )
        most = self.microbatches or MICROBATCHES_PER_STAGE * self.stages
        per_stage = rows // self.shards // self.stages
        return self.stages * max(
            count for count in range(1, per_stage + 1) if per_stage % count == 0 and count * self.stages <= most
        )

    def check_microbatches(self, rows: int, name: str) -> None:
        """ValueError where a batch of `rows`, called `name`, is not cut into as many microbatches as was asked for."""
        cut = self.cut(rows, name)
        if self.microbatches not in (None, cut):
            raise ValueError(
                f"mesh.microbatches={self.microbatches}: does not divide the {rows // self.shards} rows that each of "
                f"{self.shards} shards has of {name}={rows}; set --config.mesh.microbatches={cut}"
            )

    def check_layers(self, layers: int, name: str = "model.layers") -> None:
        """ValueError where a stack of `layers`, called `name`, does not divide into the stages and rounds."""
        blocks = self.stages * self.rounds
        if layers % blocks:
            by = f" x mesh.rounds={self.rounds}" if self.rounds > 1 else ""
            below, above = layers // blocks * blocks, -(-layers // blocks) * blocks
            near = " or ".join(str(count) for count in (below, above) if count)
            raise ValueError(
                f"{name}={layers}: does not divide into mesh.stage={self.stages}{by} blocks of equal depth; use {near} "
                "layers, or another mesh.stage"
            )

    def check_pattern(self, layers: int, period: int, name: str) -> None:
        """ValueError where what repeats after `period` layers, called `name`, does not fall on those of every block
        alike."""
        depth = layers // (self.stages * self.rounds)
        if depth % period:
            raise ValueError(
                f"{name} does not divide the {depth} layers that "
                f"model.layers={layers} over mesh.stage={self.stages} and mesh.rounds={self.rounds} gives each block; "
                "use fewer stages or rounds, or more layers"
            )

    def describe(self, rows: int) -> str:
        """The schedule of a batch of `rows` rows, and its bubble, on one line."""
        count = self.cut(rows)
        rounds = f" x {self.rounds} rounds" if self.rounds > 1 else ""
        return (
            f"{self.stages} stages{rounds}, {count} microbatches of {rows // count} rows: "
            f"bubble {bubble(self.stages, count, self.rounds):.1%}"
        )


_pipeline: contextvars.ContextVar[Pipeline | None] = contextvars.ContextVar("pipeline", default=None)


def current() -> Pipeline | None:
    """The pipeline in force."""
    return _pipeline.get()


@contextlib.contextmanager
def use(pipeline: Pipeline | None) -> Iterator[None]:
    """Makes a pipeline hold for every encoder traced inside; None, or one of one stage, runs the layers in order.

    It needs `logical_rules` and an attention `Placement` of the same mesh around it.
    """
    token = _pipeline.set(pipeline if pipeline is not None and pipeline.stages > 1 else None)
    try:
        yield
    finally:
        _pipeline.reset(token)
