"""The baseline that ignores the context: every position is guessed by how often tokens occur at all."""

from __future__ import annotations

import numpy as np

from maskformer.data import PackedDataset

# Rows that are counted; frequencies of frequent tokens need no more, and a corpus may hold a billion.
SAMPLE_ROWS = 20_000


def unigram_baseline(dataset: PackedDataset) -> np.ndarray:
    """Log-probabilities [vocabulary] from up to `SAMPLE_ROWS` evenly spaced rows of a training split."""
    counts = np.zeros(dataset.vocabulary.size, np.int64)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), SAMPLE_ROWS)).round().astype(np.int64))
    for part in np.array_split(chosen, -(-len(chosen) // 1024)):
        rows = dataset.rows.read(part)
        counts += np.bincount(rows["tokens"][rows["segment_ids"] > 0], minlength=len(counts))
    return unigram_log_probs(counts, dataset.vocabulary.special_ids)


def unigram_log_probs(counts: np.ndarray, special_ids: tuple[int, ...]) -> np.ndarray:
    """Log-probabilities of a context-free model with add-one smoothing.

    Args:
      counts: occurrences of each token id in the training split, [vocabulary].
      special_ids: ids counted as never seen: [CLS] and [SEP] are frequent in rows, and never hidden.

    >>> (np.exp(unigram_log_probs(np.array([9, 2, 1, 0]), special_ids=(0,))) * 7).round(3)
    array([1., 3., 2., 1.], dtype=float32)
    """
    seen = counts.astype(np.float64)
    seen[list(special_ids)] = 0.0
    return np.log((seen + 1.0) / (seen + 1.0).sum()).astype(np.float32)
