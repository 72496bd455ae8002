"""Time to find a mask's tiles: maskformer's interval analysis beside splash attention's and FlexAttention's.

    python benchmarks/block_map.py                                     # torch in the same environment, or without it
    python benchmarks/block_map.py --peer-python ~/peers/bin/python    # torch in another one

Same mask, length and tile size in each comparison, measured in turns, medians over rounds. Splash's `process_mask`
ships with jax and is timed on a plain causal mask, the one it computes lazily; `create_block_mask` needs torch and
is timed on causal & window & documents. Each peer also gives its peak memory. Ours is timed eagerly (arrays known)
and traced (under jit, the compilation apart, since any number of packings share it).
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

LONG = 1 << 20

FLEX = """
import resource, statistics, sys, time, numpy, torch
from torch.nn.attention.flex_attention import create_block_mask
length, window, block, rounds = map(int, sys.argv[1:5])
ids = torch.from_numpy(numpy.load(sys.argv[5]))
def mask_mod(b, h, q, k):
    return (k <= q) & (q - k <= window) & (ids[q] == ids[k])
def make():
    return create_block_mask(mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=block)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
times = []
for _ in range(rounds):
    start = time.perf_counter(); made = make(); times.append(time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(statistics.median(times), peak * 1024, float(made.sparsity()))
"""


def documents(length: int, mean: int = 1500) -> np.ndarray:
    """Segment ids of documents packed one after another."""
    lengths = np.random.default_rng(0).integers(mean // 10, 2 * mean, 2 * length // mean + 10)
    return np.repeat(np.arange(1, lengths.size + 1), lengths)[:length].astype(np.int32)


def median_time(function: Callable[[], object], rounds: int) -> float:
    """Seconds, after one call to warm up."""
    import jax

    jax.block_until_ready(function())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ours(text: str, length: int, block: int, rounds: int) -> tuple[float, float, float, float]:
    """Seconds eager, seconds traced, bytes of the traced computation, share of tiles skipped."""
    import jax

    from maskformer import masks

    mask = masks.parse(text)
    if mask.unbound:
        mask = mask.bind(segment_ids=documents(length))
    eager = median_time(lambda: mask.block_map(length, length, block), rounds)
    compiled = jax.jit(lambda mask: mask.block_map(length, length, block)).lower(mask).compile()
    traced = median_time(lambda: compiled(mask), rounds) if jax.tree.leaves(mask) else float("nan")
    usage = compiled.memory_analysis()
    memory = usage.temp_size_in_bytes + usage.output_size_in_bytes
    return eager, traced, memory, mask.block_map(length, length, block).sparsity()


def splash_causal(length: int, block: int) -> float:
    """Seconds of splash attention's host-side mask processing, once: it keeps what it has computed."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    mask = splash.MultiHeadMask([splash.CausalMask((length, length))])
    start = time.perf_counter()
    info.process_mask(mask, (block, block))
    info.process_mask(mask, (block, block), is_dkv=True)
    return time.perf_counter() - start


def flex(python: str, length: int, window: int, block: int, rounds: int) -> tuple[float, float] | None:
    """Seconds and peak bytes of FlexAttention's create_block_mask, in a process of its own."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file.name, documents(length))
        command = [python, "-c", FLEX, *map(str, (length, window, block, rounds)), file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"  FlexAttention did not run: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}")
        return None
    seconds, memory, _ = map(float, done.stdout.split()[-3:])
    return seconds, memory


def main() -> None:
    """Prints each comparison as one block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--splash-length", type=int, default=16384)
    parser.add_argument("--flex-length", type=int, default=16384)
    options = parser.parse_args()

    text = "causal & window(4096) & segments"
    for block in (512, 1024):
        eager, traced, memory, skipped = ours(text, LONG, block, options.rounds)
        print(f"{text} at {LONG:,} tokens, tiles {block} x {block} ({skipped:.2%} skipped)")
        print(f"  eager {eager * 1e3:.1f} ms, traced {traced * 1e3:.1f} ms, {memory / 1e6:.1f} MB; goal: under 100 ms")

    length, block = options.splash_length, 512
    eager, *_ = ours("causal", length, block, options.rounds)
    peer = splash_causal(length, block)
    print(f"causal at {length:,} tokens, tiles {block} x {block}, forward and backward lists")
    print(f"  maskformer {eager * 1e3:.1f} ms, splash process_mask {peer * 1e3:.1f} ms: {peer / eager:.0f} times")

    length, block = options.flex_length, 128
    text = "causal & window(1024) & segments"
    if options.peer_python == sys.executable and importlib.util.find_spec("torch") is None:
        print("FlexAttention: torch is not installed here; give --peer-python a Python that has it")
        return
    eager, traced, memory, _ = ours(text, length, block, options.rounds)
    result = flex(options.peer_python, length, 1024, block, 1)
    if result is not None:
        print(f"{text} at {length:,} tokens, tiles {block} x {block}")
        print(
            f"  maskformer eager {eager * 1e3:.1f} ms, traced {traced * 1e3:.1f} ms, {memory / 1e6:.1f} MB; "
            f"create_block_mask {result[0] * 1e3:.0f} ms, {result[1] / 1e6:.0f} MB: "
            f"{result[0] / eager:.0f} times as long as eager, {result[0] / traced:.0f} as traced"
        )
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
