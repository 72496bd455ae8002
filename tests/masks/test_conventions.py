"""Masks of other libraries, written from their definitions in NumPy, and ours for them (docs/masks.md)."""

import numpy as np
import pytest

from maskformer import masks


def ours(text, q_len, kv_len=None, q_offset=0, **arrays):
    matrix = masks.parse(text, **arrays).dense(q_len, kv_len or q_len, q_offset)
    return np.asarray(matrix)


def theirs(rule, q_len, kv_len=None):
    q, k = np.arange(q_len)[:, None], np.arange(kv_len or q_len)[None, :]
    return np.broadcast_to(rule(q, k), (q_len, kv_len or q_len))


IMAGE = np.array([0, 1, 1, 1, 0, 2, 2, 0])
GROUPED = dict(ids=np.array([0, 0, 1, 2, 2, 0, 3, 3]), groups=np.array([1, 1, 1, 1, 1, 2, 2, 2]))
PROMPT, FRAME = 2, 3
DOCUMENTS = dict(
    segment_ids=np.array([1, 1, 1, 2, 2, 3, 3, 3, 3]),
    place=np.array([0, 1, 2, 0, 1, 0, 1, 2, 3]),
    early=lambda q, k, place: place[k] < 2,
)
CHOSEN = np.array([[1, 0], [0, 0], [1, 1], [0, 1], [1, 0], [1, 1]], bool)


def grouped_shared_prefix(q, k):
    document = np.array([0, 0, 1, 2, 2, 3, 4, 4])
    prompt = np.array([0, 0, 0, 0, 0, 3, 3, 3])
    return ((document[q] == document[k]) & (k <= q)) | ((document[q] != prompt[q]) & (document[k] == prompt[q]))


def tiled_natten(q, k):
    def at(i):
        tile, inside = i // 4, i % 4
        return tile % 3 * 2 + inside % 2, tile // 3 * 2 + inside // 2

    (q_x, q_y), (k_x, k_y) = at(q), at(k)
    return (abs(np.clip(q_x, 1, 4) - k_x) <= 1) & (abs(np.clip(q_y, 1, 2) - k_y) <= 1)


def sliding_tiles(q, k):
    """Canvas 4 x 8, tiles 2 x 2, kernel 2 x 4 (one tile by two), then 3 tokens of text."""
    q_tile, k_tile = q // 4, k // 4
    centre = np.clip(q_tile % 4, 1, 3)
    vision = (q < 32) & (k < 32) & (q_tile // 4 == k_tile // 4) & (k_tile % 4 >= centre - 1) & (k_tile % 4 <= centre)
    return vision | (q >= 32) | (k >= 32)


CASES = {
    "Hugging Face causal window of w keys": (
        lambda: ours("causal & window(2)", 8), lambda: theirs(lambda q, k: (k <= q) & (k > q - 3), 8)),
    "Hugging Face chunked": (
        lambda: ours("causal & chunked(3)", 8), lambda: theirs(lambda q, k: (k <= q) & (q // 3 == k // 3), 8)),
    "ModernBERT local attention": (
        lambda: ours("window(2, 2)", 8), lambda: theirs(lambda q, k: abs(q - k) <= 4 // 2, 8)),
    "Gemma 3 image spans": (
        lambda: ours("causal | segments(image, padding=0)", 8, image=IMAGE),
        lambda: theirs(lambda q, k: (k <= q) | ((IMAGE[q] == IMAGE[k]) & (IMAGE[q] > 0)), 8)),
    "attention-gym sliding window": (
        lambda: ours("causal & window(3)", 8), lambda: theirs(lambda q, k: (q >= k) & (q - k <= 3), 8)),
    "attention-gym dilated window": (
        lambda: ours("dilated_window(4, 4, 2)", 8),
        lambda: theirs(lambda q, k: (abs(q - k) <= 4) & (abs(q - k) % 2 == 0), 8)),
    "attention-gym sinks": (
        lambda: ours("causal & (window(2) | sinks(1))", 8),
        lambda: theirs(lambda q, k: ((k < 1) | (q - k <= 2)) & (q >= k), 8)),
    "attention-gym prefix-LM": (
        lambda: ours("causal | prefix(n)", 8, n=np.int32(3)), lambda: theirs(lambda q, k: (k < 3) | (q >= k), 8)),
    "attention-gym shared prefixes in groups": (
        lambda: ours("causal & shared_prefix(ids) & segments(groups)", 8, **GROUPED),
        lambda: theirs(grouped_shared_prefix, 8)),
    "attention-gym tiled NATTEN": (
        lambda: ours("natten((4, 6), 3, tile=(2, 2))", 24), lambda: theirs(tiled_natten, 24)),
    "attention-gym sliding tiles with text": (
        lambda: ours("tiles((4, 8), (2, 2), (1, 2)) | global_tokens(marked=words)", 35, words=np.arange(35) >= 32),
        lambda: theirs(sliding_tiles, 35)),
    "attention-gym vision cross-attention": (
        lambda: ours("key_ranges(b, e)", 6, 4, b=np.array([0, 0, 1, 1]), e=np.array([3, 3, 6, 6])),
        lambda: theirs(lambda q, k: (q >= np.array([0, 1])[k // 2]) & (q < np.array([3, 6])[k // 2]), 6, 4)),
    "attention-gym JetSpec training": (
        lambda: ours("sinks(3) | shift(causal & chunked(4), -3, -3)", 8, 11, q_offset=3),
        lambda: theirs(
            lambda q, k: (k < 3) | ((k >= 3) & (q // 4 == (k - 3) // 4) & ((k - 3) % 4 <= q % 4)), 8, 11)),
    "attention-gym spatial heads of Sparse VideoGen": (
        lambda: ours("window(5, 5) | sinks(5) | query_padding(lengths=n)", 14, n=np.int32(PROMPT)),
        lambda: theirs(lambda q, k: (k < PROMPT + FRAME) | (q < PROMPT) | (abs(q - k) < 2 * FRAME), 14)),
    "xformers lower triangle from the bottom right, local": (
        lambda: ours("causal & window(2)", 3, 7, q_offset=4),
        lambda: np.tril(np.ones((3, 7)), 4) * np.triu(np.ones((3, 7)), 4 - 3 + 1) > 0),
    "xformers block diagonal, causal from the bottom right": (
        lambda: ours("block_diagonal((2, 1), (3, 2), align='end', right=0)", 3, 5),
        lambda: np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]], bool)),
    "xformers block diagonal, causal, local": (
        lambda: ours("block_diagonal((3, 2), left=1, right=0)", 5),
        lambda: np.array(
            [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]], bool)),
    "attention-gym documents with a prefix each": (
        lambda: ours("(causal | predicate(early, place)) & segments", 9, **DOCUMENTS),
        lambda: theirs(
            lambda q, k: (DOCUMENTS["segment_ids"][q] == DOCUMENTS["segment_ids"][k])
            & ((k <= q) | (DOCUMENTS["place"][k] < 2)), 9)),
    "attention-gym NATTEN": (
        lambda: ours("natten((6, 6), (3, 5))", 36),
        lambda: theirs(
            lambda q, k: (abs(np.clip(q // 6, 1, 4) - k // 6) <= 1) & (abs(np.clip(q % 6, 2, 3) - k % 6) <= 2), 36)),
    "MaxText block diffusion": (
        lambda: ours("chunked(3, left=2)", 8),
        lambda: theirs(lambda q, k: q // 3 >= k // 3, 8)),
    "MaxText compressed keys": (
        lambda: ours("(causal & window(2) & sinks(6)) | predicate(f, chosen)", 6, 8, chosen=CHOSEN,
                     f=lambda q, k, chosen: (k >= 6) & chosen[q, k - 6]),
        lambda: np.concatenate([theirs(lambda q, k: (q - k < 3) & (q >= k), 6), CHOSEN], axis=1)),
    "MaxText MoBA": (
        lambda: ours("causal & predicate(f, chosen)", 6, chosen=CHOSEN, f=lambda q, k, chosen: chosen[q, k // 3]),
        lambda: theirs(lambda q, k: (k <= q) & CHOSEN[q, k // 3], 6)),
    "xformers block diagonal with padded keys, not causal": (
        lambda: ours("block_diagonal((1, 2), (2, 1), (0, 3))", 3, 6),
        lambda: np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]], bool)),
    "xformers block diagonal with padded keys": (
        lambda: ours("block_diagonal((1, 2), (2, 1), (0, 3), align='end', right=0)", 3, 6),
        lambda: np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]], bool)),
    "Sparse Transformer, strided": (
        lambda: ours("causal & (window(2) | strided(3))", 9),
        lambda: theirs(lambda q, k: (k <= q) & ((q - k < 3) | ((q - k) % 3 == 0)), 9)),
    "Sparse Transformer, fixed": (
        lambda: ours("causal & (chunked(3) | predicate(f))", 9, f=lambda q, k: k % 3 >= 2),
        lambda: theirs(lambda q, k: (k <= q) & ((q // 3 == k // 3) | (k % 3 >= 2)), 9)),
    "top-k tiles for each head": (
        lambda: ours("graph(edges, node_size=2)", 4, edges=np.array([[[[0, 1]], [[1, 0]]]])),
        lambda: np.kron(np.array([[[[0, 1], [0, 0]], [[0, 0], [1, 0]]]]), np.ones((2, 2))) > 0),
}


@pytest.mark.parametrize("name", CASES)
def test_our_mask_is_the_matrix_of_theirs(name):
    mine, other = CASES[name]
    np.testing.assert_array_equal(mine(), other())
