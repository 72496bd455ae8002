"""What an objective costs, as a share of the training step that it is part of.

    python -m benchmarks.objectives [--length 128 512]

For each objective: the time of `objective(key, batch)` alone, jitted, over that of a whole update of a BERT mini
(4 layers x 256, vocabulary 8192) on the same 4,096 tokens with the same objective. Interleaved medians in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax

from benchmarks.packed_step import VOCABULARY, packed_batch
from maskformer import models, objectives
from maskformer.training import tasks
from maskformer.training.optimizer import create_optimizer
from maskformer.training.sections import OptimizerConfig
from maskformer.training.state import create_state
from maskformer.training.step import create_train_step, masking_key

TOKENS = 4096
CASES: dict[str, dict[str, Any]] = {
    "mlm (bert)": {"name": "mlm"},
    "mlm (whole words)": {"name": "mlm", "whole_word": True},
    "span_mlm": {"name": "span_mlm"},
    "diffusion": {"name": "diffusion"},
    "causal_lm": {"name": "causal_lm"},
}


def measure(parameters: dict[str, Any], length: int, rounds: int) -> tuple[float, float]:
    """Median seconds of the objective alone and of the whole step."""
    batch = packed_batch(TOKENS // length, length, length)
    name, options = parameters["name"], {key: value for key, value in parameters.items() if key != "name"}
    objective = objectives.create(name, VOCABULARY, length, **options)
    shape = {"vocab_size": VOCABULARY.size, "max_length": length, "layers": 4, "width": 256, "heads": 4}
    task = tasks.create({}, objective, models.EncoderConfig(**shape))
    optimizer = create_optimizer(OptimizerConfig(), lambda step: 1e-4, task.model.logical_axes())
    state = jax.jit(lambda key: create_state(key, task, optimizer))(jax.random.key(0))
    step = jax.jit(create_train_step(task, optimizer, lambda step: 1e-4, seed=0), donate_argnums=0)
    alone = jax.jit(lambda batch, number: objective(masking_key(0), batch, step=number))
    on_device = jax.tree.map(jax.numpy.asarray, batch)
    state = jax.block_until_ready(step(state, on_device))
    jax.block_until_ready(alone(on_device, 0))
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        start = time.perf_counter()
        for repeat in range(10):
            jax.block_until_ready(alone(on_device, number + repeat))
        middle = time.perf_counter()
        state = jax.block_until_ready(step(state, on_device))
        times[0].append((middle - start) / 10)
        times[1].append(time.perf_counter() - middle)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for length in arguments.length:
        for name, parameters in CASES.items():
            alone, step = measure(parameters, length, arguments.rounds)
            print(
                f"{name:18} {TOKENS // length:3} x {length:3}: {alone * 1e3:6.2f} ms "
                f"of a step of {step * 1e3:7.1f} ms, {alone / step:.2%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
