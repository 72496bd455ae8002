"""Masks given by edges: graphs, trees, and the random blocks of BigBird."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import shown
from maskformer.masks.builder_arguments import LARGEST, array, is_concrete, whole_number
from maskformer.masks.builders import builder
from maskformer.masks.expression import Mask, leaf, take
from maskformer.masks.intervals import BOTH, Interval
from maskformer.masks.positions import chunked, dilated_window, sliding_window
from maskformer.masks.sequences import global_tokens
from maskformer.masks.tiles import Reading


@leaf(edges=2)
class Graph(Mask):
    """``[q // node_size, k // node_size]`` is one of ``edges``, int ``[edges, 2]`` in lexicographic order."""

    edges: Any
    node_size: int = 1

    def attend(self, q: Any, k: Any) -> Any:
        edges = jnp.asarray(self.edges)
        q, k = jnp.broadcast_arrays(jnp.asarray(q) // self.node_size, jnp.asarray(k) // self.node_size)
        count = edges.shape[0]
        if count == 0:
            return jnp.zeros(q.shape, bool)

        def halve(_: Any, span: Any) -> Any:
            low, high = span
            middle = (low + high) // 2
            row, column = take(edges[:, 0], middle), take(edges[:, 1], middle)
            before = (row < q) | ((row == q) & (column < k))
            return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)

        start = jnp.zeros(q.shape, jnp.int32), jnp.full(q.shape, count, jnp.int32)
        found, _ = jax.lax.fori_loop(0, count.bit_length(), halve, start)
        there = (found < count) & (take(edges[:, 0], found) == q) & (take(edges[:, 1], found) == k)
        # Under an offset positions may be negative, and must not meet the padding.
        return there & (q >= 0) & (k >= 0)

    def tile_bounds(self, reading: Reading) -> Interval:
        """Counts the distinct edges in each tile, by sorting (edge, tile) pairs: no matrix, no analysis of a search."""
        analysis, tiles, size = reading.analysis, reading.tiles, self.node_size
        xp = tiles.xp
        edges = analysis.constant(self.edges)
        if not edges.exact:
            return Interval(np.asarray(False), np.asarray(True))
        shape = tiles.shape(BOTH)
        if edges.lo.shape[0] == 0:
            return Interval(xp.zeros(shape, bool), xp.zeros(shape, bool), BOTH)
        listed = xp.asarray(edges.lo)
        distinct = xp.concatenate([np.ones(1, bool), (listed[1:] != listed[:-1]).any(-1)])
        distinct = distinct & (listed >= 0).all(-1)
        touched, inside, known = [], [], np.asarray(True)
        for axis, blocks, length in ((0, tiles.q, tiles.block[0]), (1, tiles.k, tiles.block[1])):
            begin = listed[:, axis] * size
            first = xp.searchsorted(xp.asarray(blocks.hi), begin, side="left")
            last = xp.searchsorted(xp.asarray(blocks.lo), begin + (size - 1), side="right") - 1
            # A node lies in at most this many blocks.
            at = first[:, None] + np.arange((size + length - 2) // length + 1)
            touched.append(at)
            inside.append(at <= last[:, None])
            known = known & xp.all(xp.asarray(blocks.lo)[1:] > xp.asarray(blocks.hi)[:-1])
        columns = tiles.k.lo.shape[0]
        keys = touched[0][:, :, None] * columns + touched[1][:, None, :]
        real = inside[0][:, :, None] & inside[1][:, None, :] & distinct[:, None, None]
        keys = xp.sort(xp.where(real, keys, -1).ravel())
        wanted = xp.asarray(tiles.rows * columns + tiles.columns)
        count = xp.searchsorted(keys, wanted, side="right") - xp.searchsorted(keys, wanted, side="left")
        count = xp.reshape(count, shape)
        nodes = [
            analysis.expand(Interval(b.hi // size - b.lo // size + 1, b.hi, b.depends), BOTH).lo
            for b in (tiles.q, tiles.k)
        ]
        full = (count // nodes[0] == nodes[1]) & (count % nodes[0] == 0)
        return Interval(full & known, (count > 0) | ~known, BOTH)


@leaf(parents=1, enter=1, leave=1, context=0)
class Tree(Mask):
    """Ancestors and oneself, after a causal ``context``; ``enter`` and ``leave`` number the tree depth first."""

    parents: Any
    enter: Any
    leave: Any
    context: Any = 0

    def attend(self, q: Any, k: Any) -> Any:
        q_node, k_node = q - self.context, k - self.context
        count = np.shape(self.parents)[-1]
        at = take(self.enter, q_node)
        ancestor = (take(self.enter, k_node) <= at) & (at < take(self.leave, k_node))
        in_tree = (q_node >= 0) & (q_node < count)
        return jnp.where(k_node < 0, k <= q, in_tree & (k_node < count) & ancestor)


@builder(edges="edges")
def graph(edges: Any, node_size: int = 1, directed: bool = True) -> Mask:
    """Tokens are nodes; a query sees the keys it has an edge to. Memory is O(edges).

    For an adjacency matrix use ``dense(adjacency)``. A node sees itself only if it has that edge: add
    ``| chunked(1)`` for self-loops.

    Args:
      edges: int ``[edges, 2]``, pairs ``(query node, key node)`` in any order; ``[batch, edges, 2]`` for a graph
        per batch entry, padded with -1.
      node_size: tokens per node (2 or more for a graph over blocks).
      directed: False to let edges work both ways.

    >>> import numpy as np
    >>> from maskformer import masks
    >>> ring = np.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    >>> print((masks.graph(ring, directed=False) | masks.chunked(1)).to_string(4, 4))
    █ █ · █
    █ █ █ ·
    · █ █ █
    █ · █ █
    """
    edges = array("graph", "edges", edges, 2)
    if not isinstance(directed, bool):
        raise ValueError(f"graph: directed={shown(directed)}, expected True or False")
    if edges.shape[-1] != 2:
        raise ValueError(f"graph: edges has shape {edges.shape}, expected [edges, 2] with (query, key) pairs")
    xp = np if isinstance(edges, np.ndarray) else jnp
    if not directed:
        edges = xp.concatenate([edges, edges[..., ::-1]], axis=-2)
    order = xp.lexsort((edges[..., 1], edges[..., 0]), axis=-1)
    return Graph(xp.take_along_axis(edges, order[..., None], axis=-2), whole_number("graph", "node_size", node_size, 1))


@builder(parents="parents", context="context")
def tree(parents: Any, context: Any = 0) -> Mask:
    """Speculative decoding (Medusa, SpecInfer): a node of a draft tree sees its ancestors, itself, and the context.

    Args:
      parents: int ``[nodes]`` or ``[batch, nodes]``, each node's parent, which comes before it; -1 for a child of
        the context.
      context: the number of positions before the tree, int or ``[batch]``; they are causal among themselves.
        Node ``n`` is position ``context + n``.

    Raises:
      ValueError: if a parent does not come before its child.

    >>> import numpy as np
    >>> from maskformer import masks
    >>> print(masks.tree(np.array([-1, 0, 0, 1, 2]), context=2).to_string(7, 7))
    █ · · · · · ·
    █ █ · · · · ·
    █ █ █ · · · ·
    █ █ █ █ · · ·
    █ █ █ · █ · ·
    █ █ █ █ · █ ·
    █ █ █ · █ · █
    """
    parents = array("tree", "parents", parents, 1)
    if parents.shape[-1] == 0:
        raise ValueError("tree: parents is empty; expected at least one node")
    if isinstance(context, (int, np.integer)) and not isinstance(context, bool):
        context = whole_number("tree", "context", context, 0)
    else:
        context = array("tree", "context", context, 0)
    if is_concrete(parents):
        known = np.asarray(parents)
        if (known >= np.arange(known.shape[-1])).any():
            raise ValueError("tree: parents[n] must be less than n (a parent comes before its children), or -1")
    number = functools.reduce(lambda f, _: jax.vmap(f), range(parents.ndim - 1), _depth_first)
    enter, leave = number(jnp.asarray(parents))
    return Tree(parents, enter, leave, context)


def _depth_first(parents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers nodes so that the descendants of ``n``, itself included, are ``enter[n] .. leave[n] - 1``."""
    count = parents.shape[0]
    # Children of the context hang on one extra node behind the last.
    parents = jnp.where(parents < 0, count, parents)

    def add_up(step: Any, sizes: Any) -> Any:
        node = count - 1 - step
        return sizes.at[parents[node]].add(sizes[node])

    sizes = jax.lax.fori_loop(0, count, add_up, jnp.ones(count + 1, jnp.int32))

    def place(node: Any, state: Any) -> Any:
        enter, free = state
        at = free[parents[node]]
        free = free.at[parents[node]].add(sizes[node])
        return enter.at[node].set(at), free.at[node].set(at + 1)

    start = jnp.zeros(count, jnp.int32), jnp.zeros(count + 1, jnp.int32)
    enter, _ = jax.lax.fori_loop(0, count, place, start)
    return enter, enter + sizes[:count]


@builder()
def bigbird(
    length: int, block: int = 64, window: int = 3, random: int = 3, global_blocks: int = 2, seed: int = 0
) -> Mask:
    """BigBird (arXiv:2007.14062): a window of blocks, global first blocks, and random blocks.

    Args:
      length: the sequence length, which the random blocks are drawn for.
      block: tokens in a block.
      window: blocks around one's own, odd, one's own included.
      random: random key blocks for each query block, drawn without replacement.
      global_blocks: the first blocks, which see and are seen by all.
      seed: of the draw; the same on every machine.

    >>> from maskformer import masks
    >>> print(masks.bigbird(12, block=2, window=1, random=1, global_blocks=1).to_string(12, 12))
    █ █ █ █ █ █ █ █ █ █ █ █
    █ █ █ █ █ █ █ █ █ █ █ █
    █ █ █ █ █ █ · · · · · ·
    █ █ █ █ █ █ · · · · · ·
    █ █ █ █ █ █ · · · · · ·
    █ █ █ █ █ █ · · · · · ·
    █ █ · · · · █ █ · · █ █
    █ █ · · · · █ █ · · █ █
    █ █ · · █ █ · · █ █ · ·
    █ █ · · █ █ · · █ █ · ·
    █ █ · · █ █ · · · · █ █
    █ █ · · █ █ · · · · █ █
    """
    block = whole_number("bigbird", "block", block, 1)
    window = whole_number("bigbird", "window", window, 1)
    if window % 2 == 0:
        raise ValueError(f"bigbird: window={window}, expected an odd number of blocks")
    length = whole_number("bigbird", "length", length, 1)
    random = whole_number("bigbird", "random", random, 0)
    first = whole_number("bigbird", "global_blocks", global_blocks, 0, LARGEST // block)
    mask = chunked(block, window // 2, window // 2)
    if first:
        mask = mask | global_tokens(first * block)
    edges = _draw("bigbird", length, block, random, seed, first, window // 2)
    return mask | graph(edges, node_size=block) if random else mask


@builder()
def random_blocks(length: int, block: int, count: int, seed: int = 0, skip: int = 0, near: int = -1) -> Mask:
    """``count`` random key blocks for each query block, seeded: the random part of BigBird.

    Args:
      length, block: as in ``bigbird``.
      count: key blocks drawn for each query block.
      seed: of the draw.
      skip: the first blocks, as rows and as columns, are left out (BigBird's global ones).
      near: blocks at most this far from the query's are left out (BigBird's window).

    >>> from maskformer import masks
    >>> print(masks.random_blocks(8, block=2, count=1).to_string(8, 8))
    █ █ · · · · · ·
    █ █ · · · · · ·
    █ █ · · · · · ·
    █ █ · · · · · ·
    · · · · · · █ █
    · · · · · · █ █
    · · █ █ · · · ·
    · · █ █ · · · ·
    """
    length, block = (whole_number("random_blocks", *pair, 1) for pair in (("length", length), ("block", block)))
    count, skip = whole_number("random_blocks", "count", count, 0), whole_number("random_blocks", "skip", skip, 0)
    near = whole_number("random_blocks", "near", near, -1)
    return graph(_draw("random_blocks", length, block, count, seed, skip, near), node_size=block)


MOST_DRAWN = 2**22
"""Random blocks of one mask, at most."""


def _draw(builder: str, length: int, block: int, count: int, seed: int, skip: int, near: int) -> np.ndarray:
    """The edges of ``random_blocks``, int32 ``[edges, 2]``."""
    generator = np.random.Generator(np.random.Philox(whole_number(builder, "seed", seed, 0, None)))
    blocks = -(-length // block)
    rows = range(skip, blocks)
    if len(rows) * min(count, len(rows)) > MOST_DRAWN:
        raise ValueError(
            f"{builder}: length={length} has {blocks} blocks of {block}, and {min(count, blocks)} are drawn for each; "
            f"expected at most {MOST_DRAWN} in all: take larger blocks"
        )
    if len(rows) <= 4096:
        columns = [_from_all(generator, row, count, skip, blocks, near) for row in rows]
    elif 4 * near + 2 <= len(rows):
        columns = _from_many(generator, count, skip, blocks, near)
    else:
        raise ValueError(f"{builder}: near={near} leaves out more than half of {blocks} blocks; expected less")
    drawn = np.concatenate([*columns, []])
    return np.stack([np.repeat(rows, list(map(len, columns))), drawn], axis=1).astype(np.int32)


def _from_all(
    generator: np.random.Generator, row: int, count: int, skip: int, blocks: int, near: int
) -> Sequence[int]:
    """The columns of one row, out of a list of all that it may have."""
    columns = np.arange(skip, blocks)
    free = columns[np.abs(columns - row) > near]
    return generator.choice(free, size=min(count, free.size), replace=False) if free.size else []


def _from_many(generator: np.random.Generator, count: int, skip: int, blocks: int, near: int) -> list[list[int]]:
    """The columns of all rows. Few are drawn from many: one that is left out or drawn before is drawn again."""

    def stream() -> Iterator[int]:
        while True:
            yield from generator.integers(skip, blocks, size=2**16).tolist()

    columns, numbers = [], stream()
    for row in range(skip, blocks):
        drawn: dict[int, None] = {}
        while len(drawn) < count:
            column = next(numbers)
            if abs(column - row) > near:
                drawn[column] = None
        columns.append(list(drawn))
    return columns


@builder(marked="global_tokens")
def longformer(window: int, global_count: int = 0, marked: Any = None, dilation: int = 1) -> Mask:
    """Longformer (arXiv:2004.05150): a two-sided window, dilated or not, and global tokens.

    Args:
      window: keys on each side (the paper's attention window is twice this); layers and heads may differ, through
        a pattern of masks or ``per_head``.
      global_count: the first tokens are global (``[CLS]`` is 1).
      marked: bool ``[batch, length]``, True for a global token.
      dilation: see ``dilated_window``.

    >>> from maskformer import masks
    >>> print(masks.longformer(1, global_count=1).to_string(6, 6))
    █ █ █ █ █ █
    █ █ █ · · ·
    █ █ █ █ · ·
    █ · █ █ █ ·
    █ · · █ █ █
    █ · · · █ █
    """
    window = whole_number("longformer", "window", window, 0)
    global_count = whole_number("longformer", "global_count", global_count, 0)
    dilation = whole_number("longformer", "dilation", dilation, 1)
    local = sliding_window(window, window) if dilation == 1 else dilated_window(window, window, dilation)
    return local | global_tokens(global_count or None, marked) if global_count or marked is not None else local
