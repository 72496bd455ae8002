"""One training step over long packed rows: documents skipped by the block map, beside the same step with a dense mask.

    python benchmarks/packed_step.py [--length 2048] [--document 256]

The same BERT (4 layers x 256, vocabulary 8192), batch, objective and parameters; only `model.attention_implementation`
differs: None (the dispatcher's choice, blockwise) and "reference" (all logits at once). The two take turns in one
process; figures are medians over rounds. The losses are printed, since equal work must give equal losses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from maskformer import models, objectives
from maskformer.training import tasks
from maskformer.training.optimizer import create_optimizer
from maskformer.training.sections import OptimizerConfig
from maskformer.training.state import create_state
from maskformer.training.step import create_train_step

VOCABULARY = objectives.Vocabulary(size=8192, pad=0, unk=1, cls=2, sep=3, mask=4)


def packed_batch(rows: int, length: int, document: int) -> dict[str, np.ndarray]:
    """Rows of documents whose lengths vary around `document`."""
    random = np.random.default_rng(0)
    segment_ids = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        start, segment = 0, 1
        while start < length:
            stop = min(length, start + int(random.integers(document // 2, 3 * document // 2)))
            segment_ids[row, start:stop] = segment
            positions[row, start:stop] = np.arange(stop - start)
            start, segment = stop, segment + 1
    return {
        "tokens": random.integers(5, VOCABULARY.size, (rows, length)).astype(np.int32),
        "segment_ids": segment_ids,
        "positions": positions,
        "word_starts": np.ones((rows, length), bool),
        "example_id": np.arange(rows, dtype=np.int32),
        "epoch": np.zeros(rows, np.int32),
    }


def create_update(implementation: str | None, length: int) -> Callable[[dict[str, np.ndarray]], float]:
    """A function that runs one update and returns the sum of the losses so far."""
    config = models.EncoderConfig(
        vocab_size=VOCABULARY.size,
        max_length=length,
        layers=4,
        width=256,
        heads=4,
        attention_implementation=implementation,
    )
    task = tasks.create({}, objectives.create("mlm", VOCABULARY, length, rate=0.15), config)
    optimizer = create_optimizer(OptimizerConfig(), lambda step: 1e-4, task.model.logical_axes())
    state = jax.jit(lambda key: create_state(key, task, optimizer))(jax.random.key(0))
    step = jax.jit(create_train_step(task, optimizer, lambda step: 1e-4, seed=0), donate_argnums=0)

    def update(batch: dict[str, np.ndarray]) -> float:
        nonlocal state
        state = step(state, batch)
        return float(state.window.sums["loss"] / state.window.weights["loss"])

    return update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--document", type=int, default=256, help="mean tokens of a document")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    batch = packed_batch(arguments.rows, arguments.length, arguments.document)
    arms = {"skipped": create_update(None, arguments.length), "dense": create_update("reference", arguments.length)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    losses = {name: update(batch) for name, update in arms.items()}  # compiles
    for _ in range(arguments.rounds):
        for name, update in arms.items():
            start = time.perf_counter()
            losses[name] = update(batch)
            times[name].append(time.perf_counter() - start)
    tokens = arguments.rows * arguments.length
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:8}  {median:.3f} s a step, {tokens / median:,.0f} tokens/s, loss {losses[name]:.5f}")
    ratios = [dense / skipped for dense, skipped in zip(times["dense"], times["skipped"], strict=True)]
    print(
        f"dense / skipped: {statistics.median(ratios):.2f}x (rounds {min(ratios):.2f} to {max(ratios):.2f}) on "
        f"{arguments.rows} x {arguments.length} tokens in documents of about {arguments.document}"
    )


if __name__ == "__main__":
    main()
