"""The layer stack run in the stages of a `Pipeline`, as one program on all devices.

It is mapped by `jax.shard_map` over `stage` and `data`. The other axes stay with the compiler, and attention maps them
itself inside, on the device's own microbatch: no backend knows of the pipeline. The alternative, `jax.vmap` over the
stages of a buffer that the compiler shifts, would batch every kernel over an axis of length one, and its scalars (block
maps, dropout seeds) into arrays. `data` is mapped so that gradients add up on each device and are reduced over it once;
the compiler would reduce them at every tick, as it gathers and reduces over `fsdp`.

What crosses stages is one microbatch of hidden states a tick, to the next stage, and one, to the stage before, on its
way into the pipeline or out of it: `collective-permute`, never a reduction. With several rounds the weights, stored in
the order of the layers, are sent to the devices of their rounds first, and their gradients back. Embeddings and head
are no part of a stage: their rows are split over `stage` too, so that they cost each device its share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from maskformer.attention import placements
from maskformer.models.partitioning import active_rules, logical_rules
from maskformer.models.pipeline import AXIS, Pipeline


class Place(NamedTuple):
    """Which piece of work a device has at a tick.

    Attributes:
      round: int32 scalar; None where there is one.
      microbatch: int32 scalar, in the order of the rows.
      first: int32 scalar, the row of the batch that is the first one here.
      rows: int32 [rows of the microbatch], which rows of the batch they are.
    """

    round: jax.Array | None
    microbatch: jax.Array
    first: jax.Array
    rows: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["leaves"], meta_fields=["treedef", "cut"])
@dataclasses.dataclass(frozen=True)
class Rows:
    """A pytree some of whose arrays lead with the rows of a batch, cut into microbatches.

    A layer picks its microbatch itself, so that what is kept for the backward pass is an index and not, at every tick,
    the arrays.
    """

    leaves: tuple[jax.Array, ...]
    treedef: Any
    cut: tuple[bool, ...]

    @classmethod
    def of(cls, tree: Any, leads: Any, shards: int, microbatches: int) -> Rows:
        """`leads`: the tree with True in the place of each array that leads with the rows."""
        leaves, treedef = jax.tree.flatten(tree)
        cut = tuple(lead is True for lead in jax.tree.leaves(leads))
        return cls(
            tuple(
                leaf.reshape(shards, microbatches, -1, *leaf.shape[1:]) if lead else leaf
                for leaf, lead in zip(leaves, cut, strict=True)
            ),
            treedef,
            cut,
        )

    def specs(self, axes: tuple[str, ...]) -> Rows:
        """Where its arrays lie if their rows are split over `axes`."""
        leaves = tuple(PartitionSpec(axes) if lead else PartitionSpec() for lead in self.cut)
        return dataclasses.replace(self, leaves=leaves)

    def at(self, microbatch: jax.Array) -> Any:
        """The tree of one microbatch."""

        def pick(leaf: jax.Array) -> jax.Array:
            rows = jax.lax.dynamic_index_in_dim(leaf, microbatch, axis=1, keepdims=False)
            return rows.reshape(-1, *rows.shape[2:])

        return self.treedef.unflatten([pick(leaf) if lead else leaf for leaf, lead in zip(self.leaves, self.cut)])


def of_round(tree: Any, place: Place) -> Any:
    """What a layer has of a tree whose leaves lead with the rounds, where there are several."""
    if place.round is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, place.round, keepdims=False), tree)


Block = Callable[[Any, Any, jax.Array, Any, Place], tuple[jax.Array, Any]]


def run(pipeline: Pipeline, block: Block, layers: Any, keys: Any, x: jax.Array, shared: Any) -> tuple[jax.Array, Any]:
    """The hidden states after all layers, and the sums of what the layers say beside them.

    Args:
      pipeline: in force.
      block: `(layers, keys, x, shared, place) -> (x, sums)` runs one block of layers on one microbatch. `layers` and
        `keys` lead with the layers of the block and then, if there are several, with the rounds: see `of_round`. `sums`
        is a pytree, None for none, whose arrays lead with the layers of the block and add up over rows.
      layers: the parameters, a pytree whose arrays lead with all layers, which are split over the stages.
      keys: as `layers`, of what is small and has no gradient; every stage has all of it.
      x: [batch, length, width], rows split over the axes of `pipeline.batch` and then `stage`.
      shared: a pytree without gradients that every stage has, such as `Rows`.

    Returns:
      [batch, length, width], with the rows where those of `x` are, and the sums, whose arrays lead with all layers.
    """
    stages, rounds, shards = pipeline.stages, pipeline.rounds, pipeline.shards
    microbatches = pipeline.cut(x.shape[0])
    groups, work = microbatches // stages, microbatches * rounds
    each = x.shape[0] // shards
    size = each // microbatches
    state = active_rules()
    placement = placements.current()
    if state is None or placement is None:
        raise ValueError("pipeline: expected the rules and the attention placement of its mesh in force around it")
    replicas = pipeline.replicas
    inner = pipeline.batch[len(replicas) :]
    rules = {**state[1], "batch": inner}
    inner_shards = shards // math.prod(pipeline.mesh.shape[axis] for axis in replicas)

    def on_stage(layers: Any, keys: Any, x: jax.Array, shared: Any) -> tuple[jax.Array, Any]:
        stage = jax.lax.axis_index(AXIS)
        layers = jax.tree.map(functools.partial(_blocks, stage=stage, stages=stages, rounds=rounds), layers)
        keys = jax.tree.map(functools.partial(_own_keys, stage=stage, stages=stages, rounds=rounds), keys)

        def place(tick: jax.Array) -> Place:
            # Microbatches go in groups as large as the pipeline is long: the last stage hands the first of a group back
            # to the first stage, for its next round, just when that has passed on the last of them.
            done = jnp.clip(tick - stage, 0, work - 1)
            group, within = done // (rounds * stages), done % (rounds * stages)
            microbatch = within % stages * groups + group
            first = jax.lax.axis_index(replicas) * (inner_shards * each) + microbatch * size
            rows = first + (jnp.arange(inner_shards)[:, None] * each + jnp.arange(size)).reshape(-1)
            return Place(
                None if rounds == 1 else within // stages, microbatch, first.astype(jnp.int32), rows.astype(jnp.int32)
            )

        def pass_on(x: jax.Array, step: int) -> jax.Array:
            return jax.lax.ppermute(x, AXIS, [(source, (source + step) % stages) for source in range(stages)])

        def swap(tick: jax.Array, stream: jax.Array, ring: jax.Array) -> tuple[jax.Array, jax.Array]:
            # The first stage takes the next microbatch from the stream and leaves the finished one that has come round.
            takes = (stage == 0) & (tick % (rounds * stages) < stages)
            return jnp.where(takes, stream, ring), jnp.where(takes, ring, stream)

        def store(waiting: jax.Array, stream: jax.Array, group: jax.Array, ready: jax.Array) -> jax.Array:
            group = jnp.maximum(group, 0)
            before = jax.lax.dynamic_index_in_dim(waiting, group, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(waiting, jnp.where(ready, stream, before), group, 0)

        def tick(carry: tuple[jax.Array, ...], tick: jax.Array) -> tuple[tuple[jax.Array, ...], Any]:
            waiting, stream, ring = carry
            # At the start of a group the stream, once round, has brought the group before the last back, finished, and
            # takes up the next one: every stage holds the microbatch of its own number.
            group, starts = tick // (rounds * stages), tick % (rounds * stages) == 0
            waiting = store(waiting, stream, group - 2, starts & (group >= 2))
            following = jax.lax.dynamic_index_in_dim(waiting, jnp.minimum(group, groups - 1), keepdims=False)
            x, stream = swap(tick, jnp.where(starts, following, stream), ring)
            x, sums = block(layers, keys, x, shared, place(tick))
            return (waiting, pass_on(stream, -1), pass_on(x, 1)), sums

        # [shards, 1, groups, size, ...] -> [groups, shards * size, ...], of this device's replica
        waiting = jnp.moveaxis(x[:, 0], 1, 0)
        waiting = waiting.reshape(groups, -1, *x.shape[4:])
        # Stages without work yet compute something ordinary, which nothing reads.
        carry = (waiting, waiting[0], jax.lax.stop_gradient(waiting[0]))
        ticks = jnp.arange(work + stages - 1)
        (waiting, stream, ring), said = jax.lax.scan(tick, carry, ticks)
        stream = pass_on(swap(jnp.int32(stages - 1), stream, ring)[1], -1)
        waiting = store(waiting, stream, jnp.int32(groups - 1), jnp.bool_(True))
        waiting = waiting.reshape(groups, inner_shards, size, *x.shape[4:])
        sums = jax.tree.map(
            functools.partial(_sums_of_work, ticks=ticks, stage=stage, stages=stages, rounds=rounds, work=work), said
        )
        return jnp.moveaxis(waiting, 0, 1)[:, None], jax.lax.psum(sums, replicas)

    def under_rules(*arguments: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()  # knows which axes are mapped already
        mapped = dataclasses.replace(placement, mesh=mesh, batch=inner, apart=each)
        with logical_rules(mesh, rules), placements.use(mapped):
            return on_stage(*arguments)

    # The gradient of a parameter is a sum over microbatches and `data`: as everywhere, rounded once.
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), layers)
    by_row = PartitionSpec(replicas, AXIS)
    specs = jax.tree.map(
        lambda node: node.specs(replicas) if isinstance(node, Rows) else PartitionSpec(),
        shared,
        is_leaf=lambda node: isinstance(node, Rows),
    )
    run_stages = jax.shard_map(
        under_rules,
        mesh=pipeline.mesh,
        axis_names={AXIS, *replicas},
        in_specs=(PartitionSpec(AXIS), PartitionSpec(), by_row, specs),
        out_specs=(by_row, PartitionSpec(AXIS)),
        check_vma=False,  # as in attention, whose kernels state no varying axes
    )
    out, sums = run_stages(wide, keys, x.reshape(shards, stages, groups, size, *x.shape[1:]), shared)
    return out.reshape(x.shape), sums


def _own_keys(keys: jax.Array, stage: jax.Array, stages: int, rounds: int) -> jax.Array:
    """[layers, ...] -> those of the stage, as `_blocks` has them."""
    own = keys.reshape(rounds, stages, -1, *keys.shape[1:])[:, stage]
    return own[0] if rounds == 1 else jnp.swapaxes(own, 0, 1)


def _blocks(parameter: jax.Array, stage: jax.Array, stages: int, rounds: int) -> jax.Array:
    """A stage's successive layers -> [layers of a block, rounds, ...] of the blocks that it runs; without the rounds
    where there is one."""
    if rounds == 1:
        return parameter
    held = parameter.reshape(rounds, -1, *parameter.shape[1:])
    return jnp.swapaxes(_exchange(held, stage, stages, rounds), 0, 1)


def _sums_of_work(
    said: jax.Array, ticks: jax.Array, stage: jax.Array, stages: int, rounds: int, work: int
) -> jax.Array:
    """[ticks, layers of a block, ...], some of idle ticks -> sums of the stage's successive layers."""
    done = ticks - stage
    busy = (done >= 0) & (done < work)
    said = jnp.where(busy.reshape(-1, *(1,) * (said.ndim - 1)), said, jnp.zeros((), said.dtype))
    if rounds == 1:
        return said.sum(0)
    of_round = jnp.clip(done, 0, work - 1) % (rounds * stages) // stages
    summed = jnp.zeros((rounds, *said.shape[1:]), said.dtype).at[of_round].add(said)
    return _exchange(summed, stage, stages, rounds, back=True).reshape(-1, *said.shape[2:])


def _routes(stages: int, rounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How blocks of layers get from the stages that hold them, in successive runs, to those that run them.

    Stage `d` holds the blocks `d * rounds + slot`; block `b` is run by stage `b % stages`, as its `b // stages`-th. In
    each of `rounds` exchanges every stage sends one block and gets one.

    Returns:
      Three int arrays [rounds, stages]: the slot that a stage sends, the stage that it sends to, and the slot where
      what a stage gets belongs.
    """
    shared = math.gcd(stages, rounds)
    source = np.arange(stages)
    # Stages that would send to the same one, `stages / shared` apart, take turns.
    sent = (np.arange(rounds)[:, None] + source // (stages // shared)) % rounds
    block = source * rounds + sent
    kept = np.empty_like(block)
    np.put_along_axis(kept, block % stages, block // stages, axis=1)
    return sent, block % stages, kept


def _exchange(blocks: jax.Array, stage: jax.Array, stages: int, rounds: int, back: bool = False) -> jax.Array:
    """[rounds, ...] blocks that a stage holds -> those that it runs; `back`: the other way."""
    sent, to, kept = _routes(stages, rounds)
    if back:
        sent, kept = kept, sent
    got = []
    for exchange in range(rounds):
        pairs = [(source, int(to[exchange, source])) for source in range(stages)]
        block = jax.lax.dynamic_index_in_dim(blocks, jnp.asarray(sent[exchange])[stage], keepdims=False)
        got.append(jax.lax.ppermute(block, AXIS, [pair[::-1] for pair in pairs] if back else pairs))
    # `order[stage, slot]` is the exchange that brought what belongs there.
    order = np.argsort(kept, axis=0).T
    return jnp.take(jnp.stack(got), jnp.asarray(order)[stage], axis=0)


def lead_with_rows(masks: Sequence[Any], rows: int) -> list[Any]:
    """The masks with True in the place of each array that leads with the rows of a batch of `rows`; see `Rows.of`."""

    def leads(array: Any, rank: int) -> bool:
        return array.ndim > rank and array.shape[0] == rows

    return [None if mask is None else placements.map_arrays(mask, leads) for mask in masks]


def attending(place: Place) -> contextlib.AbstractContextManager[None]:
    """While a layer is traced inside, its attention knows which rows of the batch it has."""
    placement = placements.current()
    assert placement is not None
    return placements.use(dataclasses.replace(placement, first=place.first))
