"""Masks written a second time, in NumPy alone, and random masks in both forms.

Nothing here uses the package's own predicates: an oracle takes the whole ``q`` column and ``k`` row and gives the
boolean matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from maskformer import masks

LENGTHS = (1, 7, 32, 33, 65)
REACH = 100  # arrays cover every position that a test asks for


@dataclasses.dataclass
class Pair:
    """A mask, and a function of NumPy index arrays that says the same."""

    mask: masks.Mask
    oracle: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def matrix(self, q_len: int, kv_len: int, q_offset: int = 0) -> np.ndarray:
        q = np.arange(q_len, dtype=np.int32)[:, None] + np.int32(q_offset)
        k = np.arange(kv_len, dtype=np.int32)[None, :]
        with np.errstate(all="ignore"):
            return np.broadcast_to(self.oracle(q, k), (q_len, kv_len)).astype(bool)


# --- leaves ---------------------------------------------------------------------------------------------------

sizes = st.integers(0, 40)
seeds = st.integers(0, 2**31 - 1)


def random_ids(seed: int, order: str) -> np.ndarray:
    """Segment ids in no order, sorted, or sorted with padding (0) at the end, as packing makes them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, rng.integers(2, 12), REACH).astype(np.int32)
    if order == "none":
        return ids
    ids = np.sort(ids)
    if order == "packed":
        ids[-rng.integers(1, REACH // 2) :] = 0
        if seed % 3 == 0:
            ids[rng.integers(0, REACH)] = np.iinfo(np.int32).max
    return ids


def segments_pair(seed: int, order: str, padding: Any) -> Pair:
    ids = random_ids(seed, order)

    def oracle(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        same = ids[q] == ids[k]
        return same if padding is None else same & (ids[q] != padding)

    return Pair(masks.segments(ids, padding=padding), oracle)


def documents_pair(seed: int, order: str) -> Pair:
    ids = random_ids(seed, order)
    # The number of changes up to each position.
    document = np.concatenate([[0], np.cumsum(ids[1:] != ids[:-1])])
    return Pair(masks.documents(ids), lambda q, k: document[q] == document[k])


def window_pair(left: int, right: int) -> Pair:
    return Pair(masks.sliding_window(left, right), lambda q, k: (k >= q - left) & (k <= q + right))


def dilated_pair(left: int, right: int, dilation: int) -> Pair:
    def oracle(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        allowed = np.zeros(np.broadcast_shapes(q.shape, k.shape), bool)
        for distance in range(-right, left + 1):
            if distance % dilation == 0:
                allowed |= q - k == distance
        return allowed

    return Pair(masks.dilated_window(left, right, dilation), oracle)


def graph_pair(seed: int, node_size: int) -> Pair:
    rng = np.random.default_rng(seed)
    nodes = REACH // node_size + 1
    adjacency = rng.random((nodes, nodes)) < rng.choice([0.0, 0.02, 0.5, 1.0])
    edges = np.argwhere(adjacency).astype(np.int32)
    edges = np.concatenate([edges, edges[: len(edges) // 3], -np.ones((3, 2), np.int32)])
    rng.shuffle(edges)
    return Pair(
        masks.graph(edges, node_size=node_size), lambda q, k: adjacency[q // node_size, k // node_size]
    )


def dense_pair(seed: int) -> Pair:
    rng = np.random.default_rng(seed)
    matrix = np.repeat(np.repeat(rng.random((13, 13)) < 0.4, 8, 0), 8, 1)[:REACH, :REACH]
    return Pair(masks.dense(matrix), lambda q, k: matrix[q, k])


def padding_pair(seed: int, of_query: bool) -> Pair:
    rng = np.random.default_rng(seed)
    valid, length = rng.random(REACH) < 0.8, int(rng.integers(0, REACH))
    valid[: REACH // 2] |= bool(rng.integers(2))
    build = masks.query_padding if of_query else masks.key_padding
    return Pair(
        build(valid, lengths=np.int32(length)),
        lambda q, k: (valid[q] & (q < length)) if of_query else (valid[k] & (k < length)),
    )


def diffusion_pair(block: int, length: int) -> Pair:
    def one(q: int, k: int) -> bool:
        if q < length and k < length:
            return q // block == k // block
        if q < length <= k:
            return (k - length) // block < q // block
        return q >= length and k >= length and (k - length) // block <= (q - length) // block

    def oracle(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return np.array([[one(int(i), int(j)) for j in k.ravel()] for i in q.ravel()])

    return Pair(masks.block_diffusion(block, length), oracle)


def tree_pair(seed: int, context: int) -> Pair:
    rng = np.random.default_rng(seed)
    parents = np.array([rng.integers(-1, n) for n in range(REACH)], np.int32)

    def ancestors(node: int) -> set[int]:
        found = set()
        while node >= 0:
            found.add(node)
            node = int(parents[node])
        return found

    lines = [ancestors(node) for node in range(REACH)]

    def one(q: int, k: int) -> bool:
        if k < context:
            return k <= q
        return q >= context and (k - context) in lines[q - context]

    def oracle(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return np.array([[one(int(i), int(j)) for j in k.ravel()] for i in q.ravel()])

    return Pair(masks.tree(parents, context), oracle)


def neighborhood_pair(grid: tuple, kernel: tuple, dilation: tuple, causal: tuple, tile: Any) -> Pair:
    rows = range(0, grid[0], tile[0]) if tile else [0]
    columns = range(0, grid[1], tile[1]) if tile else [0]
    side = tile or grid
    # The points in the order of the sequence.
    points = [
        (top + i, start + j) for top in rows for start in columns for i in range(side[0]) for j in range(side[1])
    ]

    def along(axis: int, i: int, j: int) -> bool:
        step, count = dilation[axis], kernel[axis]
        if i % step != j % step:
            return False
        line = list(range(i % step, grid[axis], step))
        place = line.index(i)
        if causal[axis]:
            return j in line[max(place - count + 1, 0) : place + 1]
        start = min(max(place - count // 2, 0), len(line) - count)
        return j in line[start : start + count]

    def one(q: int, k: int) -> bool:
        if max(q, k) >= len(points):
            return False
        return all(along(axis, points[q][axis], points[k][axis]) for axis in (0, 1))

    def oracle(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return np.array([[one(int(i), int(j)) for j in k.ravel()] for i in q.ravel()])

    return Pair(masks.neighborhood(grid, kernel, dilation, causal, tile), oracle)


def tiles_pair(grid: tuple, tile: tuple, window: tuple) -> Pair:
    counts = [size // side for size, side in zip(grid, tile)]
    tiles = [(i, j) for i in range(counts[0]) for j in range(counts[1])]
    order = [point for point in tiles for _ in range(tile[0] * tile[1])]

    def near(axis: int, i: int, j: int) -> bool:
        start = min(max(i - window[axis] // 2, 0), counts[axis] - window[axis])
        return j in range(start, start + window[axis])

    def one(q: int, k: int) -> bool:
        return max(q, k) < len(order) and all(near(axis, order[q][axis], order[k][axis]) for axis in (0, 1))

    def oracle(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return np.array([[one(int(i), int(j)) for j in k.ravel()] for i in q.ravel()])

    return Pair(masks.tiles(grid, tile, window), oracle)


def ranges_pair(seed: int, of_query: bool) -> Pair:
    rng = np.random.default_rng(seed)
    begin, end = (np.sort(rng.integers(0, REACH, REACH)).astype(np.int32) for _ in range(2))
    if of_query:
        return Pair(masks.query_ranges(begin, end), lambda q, k: (k >= begin[q]) & (k < end[q]))
    return Pair(masks.key_ranges(begin, end), lambda q, k: (q >= begin[k]) & (q < end[k]))


def block_diagonal_pair(seed: int) -> Pair:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    q_lengths, kv_lengths = (rng.integers(0, 25, count).astype(np.int32) for _ in range(2))
    gaps = rng.integers(0, 4, count)
    starts = (np.cumsum(kv_lengths + gaps) - kv_lengths).astype(np.int32)
    align = ["start", "end"][rng.integers(2)]
    left, right = (None if rng.integers(2) else int(rng.integers(0, 9)) for _ in range(2))
    matrix = np.zeros((4 * REACH, 4 * REACH), bool)
    row = 0
    for n in range(count):
        for i in range(q_lengths[n]):
            middle = i if align == "start" else i + kv_lengths[n] - q_lengths[n]
            for j in range(kv_lengths[n]):
                near = (left is None or j >= middle - left) and (right is None or j <= middle + right)
                matrix[row + i, starts[n] + j] = near
        row += q_lengths[n]
    mask = masks.block_diagonal(q_lengths, kv_lengths, starts, align, left, right)
    return Pair(mask, lambda q, k: matrix[q, k])


leaves = st.one_of(
    st.just(Pair(masks.causal(), lambda q, k: q >= k)),
    st.just(Pair(masks.everything(), lambda q, k: (q >= 0) & (k >= 0))),
    st.just(Pair(masks.nothing(), lambda q, k: (q < 0) & (k < 0))),
    st.builds(window_pair, sizes, sizes),
    st.builds(dilated_pair, sizes, sizes, st.integers(1, 9)),
    st.integers(1, 40).map(lambda n: Pair(masks.strided(n), lambda q, k: (q - k) % n == 0)),
    sizes.map(lambda n: Pair(masks.sinks(n), lambda q, k: (k < n) & (q == q))),
    st.tuples(st.integers(1, 40), st.integers(0, 2), st.integers(0, 2)).map(
        lambda c: Pair(
            masks.chunked(*c), lambda q, k: (q // c[0] - c[1] <= k // c[0]) & (k // c[0] <= q // c[0] + c[2])
        )
    ),
    st.builds(segments_pair, seeds, st.sampled_from(["none", "sorted", "packed"]), st.sampled_from([None, 0])),
    st.builds(documents_pair, seeds, st.sampled_from(["none", "packed"])),
    st.builds(padding_pair, seeds, st.booleans()),
    st.builds(graph_pair, seeds, st.sampled_from([1, 2, 5, 8, 16])),
    st.builds(dense_pair, seeds),
    st.builds(block_diagonal_pair, seeds),
    st.builds(ranges_pair, seeds, st.booleans()),
    sizes.map(lambda n: Pair(masks.prefix(lengths=np.int32(n)), lambda q, k: (q < n) & (k < n))),
    sizes.map(lambda n: Pair(masks.global_tokens(n), lambda q, k: (q < n) | (k < n))),
    seeds.map(
        lambda seed: (
            lambda ids: Pair(masks.shared_prefix(ids), lambda q, k: (ids[k] == 0) | (ids[q] == ids[k]))
        )(random_ids(seed, "sorted"))
    ),
)

slow_leaves = st.one_of(
    st.builds(diffusion_pair, st.integers(1, 9), st.integers(1, 40)),
    st.builds(tree_pair, seeds, st.integers(0, 12)),
    st.sampled_from(
        [
            ((8, 8), (3, 5), (1, 1), (False, False), None),
            ((6, 11), (3, 3), (2, 3), (False, False), None),
            ((5, 12), (4, 7), (1, 1), (True, False), None),
            ((8, 12), (5, 4), (1, 2), (False, True), (4, 3)),
        ]
    ).map(lambda args: neighborhood_pair(*args)),
    st.sampled_from([((8, 8), (2, 4), (3, 1)), ((6, 12), (3, 2), (1, 4))]).map(lambda args: tiles_pair(*args)),
)

# --- random predicates ------------------------------------------------------------------------------------------

# An integer expression is a nested tuple, evaluated by jax.numpy in the mask and by NumPy in the oracle; int32
# arithmetic wraps in both.
atoms = st.one_of(
    st.just(("q",)), st.just(("k",)), st.integers(-70, 70).map(lambda n: ("n", n)),
    st.sampled_from([("table", "q"), ("table", "k"), ("n", 2**31 - 5), ("n", 123456789)]),
)


def _grow(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        st.tuples(st.sampled_from(["+", "-", "*", "min", "max", "&", "|", "^"]), inner, inner),
        st.tuples(st.sampled_from(["//", "%"]), inner, st.integers(-9, 50).filter(bool).map(lambda n: ("n", n))),
        st.tuples(st.sampled_from(["//", "%"]), inner, inner.map(lambda x: ("+", ("%", x, ("n", 7)), ("n", 1)))),
        st.tuples(st.sampled_from(["abs", "-", "~", "sign", "read", "square"]), inner),
        st.tuples(st.sampled_from([">>", "<<"]), inner, st.integers(0, 6).map(lambda n: ("n", n))),
        st.tuples(st.just("where"), st.sampled_from(["<", "==", "<="]), inner, inner, inner, inner),
        st.tuples(st.just("clip"), inner, inner, inner),
    )


integers = st.recursive(atoms, _grow, max_leaves=7)
conditions = st.tuples(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), integers, integers)


def compute(xp: Any, tree: tuple, q: Any, k: Any, table: Any) -> Any:
    kind, *rest = tree
    if kind in "qk":
        return {"q": q, "k": k}[kind]
    if kind == "n":
        return xp.asarray(rest[0], dtype=np.int32)
    if kind == "table":
        return table[{"q": q, "k": k}[rest[0]]]
    if kind == "where":
        compare, a, b, c, d = rest[0], *[compute(xp, part, q, k, table) for part in rest[1:]]
        return xp.where(_compare(compare, a, b), c, d)
    values = [compute(xp, part, q, k, table) for part in rest]
    if kind == "read":
        return table[xp.clip(values[0], 0, REACH - 1)]
    if kind == "clip":
        return xp.minimum(xp.maximum(values[0], values[1]), values[2])
    if len(values) == 1:
        functions = {"abs": xp.abs, "-": xp.negative, "~": xp.invert, "sign": xp.sign, "square": xp.square}
        return functions[kind](values[0])
    a, b = values
    if kind in ("min", "max"):
        return {"min": xp.minimum, "max": xp.maximum}[kind](a, b)
    return {
        "+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "//": lambda: a // b, "%": lambda: a % b,
        "&": lambda: a & b, "|": lambda: a | b, "^": lambda: a ^ b, ">>": lambda: a >> b, "<<": lambda: a << b,
    }[kind]()


def _compare(kind: str, a: Any, b: Any) -> Any:
    return {
        "<": lambda: a < b, "<=": lambda: a <= b, ">": lambda: a > b, ">=": lambda: a >= b,
        "==": lambda: a == b, "!=": lambda: a != b,
    }[kind]()


def predicate_pair(condition: tuple, seed: int) -> Pair:
    rng = np.random.default_rng(seed)
    table = rng.integers(-50, 50, REACH).astype(np.int32)
    table = np.sort(table) if seed % 2 else table
    compare, left, right = condition

    def fn(q: Any, k: Any, table: Any) -> Any:
        return _compare(compare, compute(jnp, left, q, k, table), compute(jnp, right, q, k, table))

    def oracle(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return _compare(compare, compute(np, left, q, k, table), compute(np, right, q, k, table))

    return Pair(masks.predicate(fn, table), oracle)


predicates = st.builds(predicate_pair, conditions, seeds)

# --- expressions --------------------------------------------------------------------------------------------------


def _both(a: Pair, b: Pair) -> Pair:
    return Pair(a.mask & b.mask, lambda q, k: a.oracle(q, k) & b.oracle(q, k))


def _either(a: Pair, b: Pair) -> Pair:
    return Pair(a.mask | b.mask, lambda q, k: a.oracle(q, k) | b.oracle(q, k))


def _neither(a: Pair) -> Pair:
    return Pair(~a.mask, lambda q, k: ~a.oracle(q, k))


@st.composite
def expressions(draw: Any, depth: int, leaf: st.SearchStrategy, at: int = 0) -> Pair:
    """Masks ``depth`` operators deep along one path, and up to that along the others."""
    if at == depth:
        return draw(leaf)
    kind = draw(st.sampled_from(["and", "or", "not"]))
    deep = draw(expressions(depth, leaf, at + 1))
    if kind == "not":
        return _neither(deep)
    other = draw(expressions(depth, leaf, draw(st.integers(at + 1, depth))))
    return (_both if kind == "and" else _either)(*([deep, other] if draw(st.booleans()) else [other, deep]))


problems = st.tuples(
    st.sampled_from(LENGTHS), st.sampled_from(LENGTHS), st.sampled_from([1, 4, 8, 16, 50]),
    st.sampled_from([4, 8, 16, 50]), st.sampled_from([0, 0, 3, 32]),
)


def broken_tiles(block_map: masks.BlockMap, matrix: np.ndarray) -> list[str]:
    """What a block map gets wrong about the matrix of one batch entry and head; empty if it is sound."""
    complaints = []
    for turned, partial, full, band in (
        (False, block_map.partial, block_map.full, block_map.band),
        (True, block_map.partial_t, block_map.full_t, block_map.band_t),
    ):
        view = matrix.T if turned else matrix
        rows, columns = (block_map.block_q, block_map.block_kv)[:: -1 if turned else 1]
        first, reach = (None, 0) if band is None else (band.first, band.reach)
        if first is not None and ((first < 0).any() or (first + reach > -(-view.shape[1] // columns)).any()):
            complaints.append(f"the band {band} leaves the grid")
        for i in range(-(-view.shape[0] // rows)):
            listed = {}
            for name, lists in (("partial", partial), ("full", full)):
                start, count = int(lists.start[0, 0, i]), int(lists.count[0, 0, i])
                entries = np.asarray(lists.index[0, 0, start : start + count]).tolist()
                if count > lists.width or len(entries) != count:
                    complaints.append(f"{name} row {i} has {count} of {lists.width} columns: {entries}")
                if entries != sorted(set(entries)):
                    complaints.append(f"{name} row {i} is not ascending: {entries}")
                padded = np.asarray(lists.padded()[0, 0, i]).tolist()
                if padded != entries + [entries[-1] if entries else 0] * (len(padded) - count):
                    complaints.append(f"{name} row {i} is {entries}, and padded {padded}")
                for entry in entries:
                    if first is not None and not first[0, 0, i] <= entry < first[0, 0, i] + reach:
                        complaints.append(f"tile {i},{entry} lies outside the band")
                    if entry in listed:
                        complaints.append(f"tile {i},{entry} is listed twice")
                    listed[entry] = name
            for j in range(-(-view.shape[1] // columns)):
                tile = view[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                if j not in listed and tile.any():
                    complaints.append(f"tile {i},{j} (turned={turned}) attends but is in no list")
                if listed.get(j) == "full" and (not tile.all() or tile.shape != (rows, columns)):
                    complaints.append(f"tile {i},{j} (turned={turned}) is called full but is not")
    return complaints
