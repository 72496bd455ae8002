"""Small packed batches and a vocabulary, shared by the objective tests."""

import numpy as np

from maskformer import objectives


def make_vocabulary(size=64, sentinels=4):
    return objectives.Vocabulary(
        size=size, pad=0, unk=1, cls=2, sep=3, mask=4, bos=5, eos=6,
        sentinels=tuple(range(size - 1, size - 1 - sentinels, -1)), special=(7, 8, 9),
    )


def make_batch(batch_size, length, *, lengths=None, size=64, seed=0, epoch=0, markers=True, words=0.6):
    """Rows of one segment each, `[CLS] text [SEP] padding`; text ids lie in [10, size - 4)."""
    random = np.random.default_rng(seed)
    lengths = np.full(batch_size, length) if lengths is None else np.asarray(lengths)
    tokens = random.integers(10, size - 4, (batch_size, length)).astype(np.int32)
    valid = np.arange(length) < lengths[:, None]
    starts = random.random((batch_size, length)) < words
    if markers:
        tokens[:, 0] = 2
        starts[:, 0] = False
        starts[:, 1] = True
        last = np.maximum(lengths - 1, 0)
        tokens[np.arange(batch_size), last] = np.where(lengths > 1, 3, tokens[np.arange(batch_size), last])
        starts[np.arange(batch_size), last] = False
    else:
        starts[:, 0] = True
    return {
        "tokens": np.where(valid, tokens, 0),
        "segment_ids": valid.astype(np.int32),
        "positions": np.where(valid, np.arange(length), 0).astype(np.int32),
        "word_starts": starts & valid,
        "example_id": np.arange(batch_size, dtype=np.int32),
        "epoch": np.full(batch_size, epoch, np.int32),
    }
