"""What the constants of blockwise attention rest on: the cost of its tile sizes, and the length from which it pays.

    python benchmarks/tiles.py [--rounds 7]

1. Time per query-key pair of the visited area for each edge of a tile, tiles visited one by one (`blocks.LIST_COST`)
   and a row's band at once (`blocks.BAND_COST`), relative to tiles of 512 one by one; geometric mean over windows and
   chunks.
2. Milliseconds of the dense reference and of blockwise on 4,096 tokens in short packed rows (`reference.SMALL`).

Contestants take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import maskformer as mf
from maskformer import masks
from maskformer.attention import blocks, blockwise_layout

LENGTH, EDGES = 4096, (512, 256, 128, 64)
MASKS = [masks.causal() & masks.sliding_window(window) for window in (64, 128, 256, 384, 512)]
MASKS += [masks.causal() & masks.chunked(chunk) for chunk in (256, 512)]


def arrays(batch: int, length: int, heads: int) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), (batch, length, heads, 64)) for i in range(3)]


def compiled(mask: masks.Mask, implementation: str, train: bool, qkv: list[jax.Array]) -> Callable[[], Any]:
    """One call, forward or forward and backward, ready to be timed. The mask's arrays are known at run time only."""

    def forward(q, k, v, mask):
        return mf.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

    step = jax.grad(lambda *a: forward(*a).sum(), argnums=(0, 1, 2)) if train else forward
    function = jax.jit(step).lower(*qkv, mask).compile()
    return lambda: jax.block_until_ready(function(*qkv, mask))


def medians(contestants: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Seconds of each contestant."""
    times: dict[Any, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def tile_costs(train: bool, rounds: int) -> dict[tuple[str, int], float]:
    """Relative time per visited pair, by way of visiting and edge."""
    qkv = arrays(1, LENGTH, 8)
    ratios: dict[tuple[str, int], list[float]] = {}
    kept = blocks.choose, blockwise_layout.BAND
    for mask in MASKS:
        contestants, areas = {}, {}
        for edge in EDGES:
            block_map = mask.block_map(LENGTH, LENGTH, edge)
            visited = {
                "list": int(block_map.partial.count.sum() + block_map.full.count.sum()),
                "band": block_map.band.first.size * block_map.band.reach,
            }
            for way, tiles in visited.items():
                if way == "band" and block_map.band.reach * edge > kept[1]:
                    continue
                blocks.choose = lambda call, edge=edge: (edge, edge)
                blockwise_layout.BAND = kept[1] if way == "band" else 0
                contestants[way, edge] = compiled(mask, "blockwise", train, qkv)
                areas[way, edge] = tiles * edge * edge
        blocks.choose, blockwise_layout.BAND = kept
        seconds = medians(contestants, rounds)
        per_pair = {name: seconds[name] / areas[name] for name in contestants}
        for name, cost in per_pair.items():
            ratios.setdefault(name, []).append(cost / per_pair["list", 512])
    return {name: float(np.exp(np.mean(np.log(found)))) for name, found in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"{jax.default_backend()}, jax {jax.__version__}, 8 heads of 64, {LENGTH} tokens, {len(MASKS)} masks")
    for train in (False, True):
        print("forward and backward" if train else "forward")
        for (way, edge), cost in sorted(tile_costs(train, rounds).items(), reverse=True):
            print(f"  {way} {edge:4}: {cost:.2f}")
    print("short rows, 4 heads of 64, segments: reference / blockwise, ms forward, ms forward and backward")
    for length in (64, 128, 192, 256, 512):
        qkv = arrays(4096 // length, length, 4)
        mask = masks.segments(jnp.arange(length) // (length // 2))
        names = [(name, train) for train in (False, True) for name in ("reference", "blockwise")]
        found = medians({name: compiled(mask, *name, qkv) for name in names}, rounds)
        print(
            f"  {length:4}: "
            + ", ".join("{:.1f} / {:.1f}".format(*(found[n] * 1e3 for n in names[i : i + 2])) for i in (0, 2))
        )


if __name__ == "__main__":
    main()
