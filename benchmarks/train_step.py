"""Training tokens per second of one BERT: maskformer beside Hugging Face Transformers on PyTorch, on this machine.

    python benchmarks/train_step.py                              # torch and transformers in the same environment
    python benchmarks/train_step.py --peer-python ~/peers/bin/python   # or in another one

Equal work: the same shape (4 layers x 256, 4 heads, vocabulary 8192), the same batches of 32 x 128 tokens with the
same 15% of positions to predict, float32, dropout 0.1 on hidden states and attention probabilities, AdamW, all
threads of the machine. Each side lives in a process of its own; they take turns, one round each, so that whatever
else the machine does falls on both, and the figures are medians over rounds. Only the ratio means something.

Without torch and transformers it prints our figure alone and says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

LAYERS, WIDTH, HEADS, VOCABULARY = 4, 256, 4, 8192
BATCH, LENGTH, RATE, DROPOUT = 32, 128, 0.15, 0.1
MASK_TOKEN, SPECIAL = 4, 5
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


def batches() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Input tokens [batch, length], positions to predict and their targets [batch, predicted]; forever."""
    random = np.random.default_rng(0)
    predicted = round(RATE * LENGTH)
    while True:
        tokens = random.integers(SPECIAL, VOCABULARY, (BATCH, LENGTH))
        positions = np.sort(random.permuted(np.tile(np.arange(LENGTH), (BATCH, 1)), axis=1)[:, :predicted])
        targets = np.take_along_axis(tokens, positions, axis=1)
        inputs = tokens.copy()
        np.put_along_axis(inputs, positions, MASK_TOKEN, axis=1)
        yield inputs, positions, targets


def maskformer_step(options: argparse.Namespace) -> Callable[[], float]:
    """One update with maskformer; returns the loss."""
    import jax
    import jax.numpy as jnp
    import optax

    from maskformer import masks, models, objectives

    config = models.EncoderConfig(
        vocab_size=VOCABULARY,
        max_length=LENGTH,
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        token_types=2,
        hidden_dropout=DROPOUT,
        attention_dropout=DROPOUT,
        **json.loads(options.model),
    )
    model = models.create(config)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def step(params, state, number, inputs, positions, targets):
        def loss(params):
            # Rows without padding, but masked like any packed batch.
            mask = masks.segments(jnp.ones_like(inputs))
            key = jax.random.fold_in(jax.random.key(0), number)
            logits = model.apply(params, inputs, mask=mask, predict_positions=positions, dropout_key=key)
            loss_sum, weight_sum = objectives.cross_entropy(logits, targets, jnp.ones(targets.shape))
            return loss_sum / weight_sum

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.jit(model.init)(jax.random.key(0))
    state = jax.jit(optimizer.init)(params)
    data = batches()
    number = 0

    def update() -> float:
        nonlocal params, state, number
        arrays = [jnp.asarray(array, jnp.int32) for array in next(data)]
        params, state, value = step(params, state, number, *arrays)
        number += 1
        return float(value)

    return update


def transformers_step(options: argparse.Namespace) -> Callable[[], float]:
    """One update with Hugging Face's `BertForMaskedLM`; returns the loss."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=DROPOUT,
            attention_probs_dropout_prob=DROPOUT,
            attn_implementation=options.peer_attention,
        )
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    forward = torch.compile(model) if options.peer_compile else model
    data = batches()
    attention_mask = torch.ones(BATCH, LENGTH, dtype=torch.long)

    def update() -> float:
        inputs, positions, targets = next(data)
        labels = np.full(inputs.shape, -100)
        np.put_along_axis(labels, positions, targets, axis=1)
        output = forward(
            input_ids=torch.from_numpy(inputs), attention_mask=attention_mask, labels=torch.from_numpy(labels)
        )
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        optimizer.step()
        return output.loss.item()

    return update


SIDES = {"maskformer": maskformer_step, "transformers": transformers_step}


def work(options: argparse.Namespace) -> None:
    """A side's process: for each line on stdin runs that many steps and answers with seconds and the loss."""
    update = SIDES[options.work](options)
    loss = [update() for _ in range(2)][-1]
    print(json.dumps({"ready": loss}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            loss = update()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)


class Side:
    """One library in a process of its own, which sleeps while the other runs."""

    def __init__(self, name: str, python: str, options: argparse.Namespace):
        command = [python, __file__, "--work", name, "--model", options.model]
        command += ["--peer-attention", options.peer_attention] + ["--peer-compile"] * options.peer_compile
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def run(self, steps: int) -> float:
        """Tokens per second over `steps` updates."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return steps * BATCH * LENGTH / self._answer()["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, float]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("a side of the benchmark died; its message is above")


def has_peer(python: str) -> bool:
    if python == sys.executable:
        return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    probe = [python, "-c", "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"]
    return subprocess.run([*probe, "torch", "transformers"], check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="updates of each side in a round")
    parser.add_argument("--model", default="{}", help='fields of EncoderConfig to change, as JSON: {"remat": "full"}')
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has torch and transformers")
    parser.add_argument("--peer-attention", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--peer-compile", action="store_true", help="torch.compile the peer")
    parser.add_argument("--work", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options)

    sides = {"maskformer": Side("maskformer", sys.executable, options)}
    if has_peer(options.peer_python):
        sides["transformers"] = Side("transformers", options.peer_python, options)
    else:
        print(f"no peer: torch and transformers are not installed for {options.peer_python}; see --peer-python")
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            rates[name].append(side.run(options.steps))
    for side in sides.values():
        side.close()

    print(
        f"BERT {LAYERS} x {WIDTH}, vocabulary {VOCABULARY}, batch {BATCH} x {LENGTH}, float32, {os.cpu_count()} cores"
    )
    for name, values in rates.items():
        low, high = min(values), max(values)
        print(f"  {name:13s} {statistics.median(values):8,.0f} tokens/s   ({low:,.0f} to {high:,.0f})")
    if len(rates) == 2:
        ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
        low, high = min(ratios), max(ratios)
        print(f"  ratio         {statistics.median(ratios):8.2f}x           ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
