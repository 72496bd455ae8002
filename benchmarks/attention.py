"""Attention beside `jax.nn`, PyTorch SDPA and compiled FlexAttention: time, ratios, and memory by length.

    python benchmarks/attention.py                                     # torch in the same environment, or without it
    python benchmarks/attention.py --peer-python ~/peers/bin/python    # torch in another one
    python benchmarks/attention.py --quick                             # a quarter of the lengths

The contestants of a comparison are measured in turns, the second of two calls each (of one, if it takes a second),
medians over rounds; torch runs in a process of its own that waits between its turns. Ratios are peer / ours: above 1,
ours is faster. On a GPU everything runs there in bfloat16, cuDNN through `jax.nn` joins, and rates are TFLOP/s over
the mask's active area.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import maskformer as mf
from maskformer import masks

# One line in: "case length train"; one line out: seconds. Everything is compiled and warmed up at first sight.
TORCH = '''
import sys, time, torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
heads, dim, threads, path = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
import numpy
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(threads)
ids = torch.from_numpy(numpy.load(path)).to(device)
flex = torch.compile(flex_attention)
made = {}
def tensors(length, train):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [torch.randn(1, heads, length, dim, device=device, dtype=dtype, requires_grad=train) for _ in range(3)]
def build(case, length, train):
    q, k, v = tensors(length, train)
    if case == "sdpa":
        call = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mods = {
            "window": lambda b, h, i, j: (j <= i) & (i - j <= 256),
            "packed": lambda b, h, i, j: (j <= i) & (ids[i] == ids[j]),
        }
        block_mask = create_block_mask(mods[case], None, None, length, length, device=device)
        call = lambda: flex(q, k, v, block_mask=block_mask)
    def run():
        with torch.set_grad_enabled(train):
            output = call()
            if train:
                output.sum().backward()
                q.grad = k.grad = v.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
    run()
    run()
    return run
print("ready", flush=True)
for line in sys.stdin:
    case, length, train = line.split()
    key = case, int(length), train == "1"
    try:
        if key not in made:
            made[key] = build(*key)
        start = time.perf_counter()
        made[key]()
        print(time.perf_counter() - start, flush=True)
    except Exception as error:
        print("failed", repr(error)[:200].replace("\\n", " "), flush=True)
'''


class Torch:
    """A torch process that runs one call per request."""

    def __init__(self, python: str, heads: int, dim: int, threads: int, ids: np.ndarray, folder: str):
        path = f"{folder}/ids.npy"
        np.save(path, ids)
        command = [python, "-c", TORCH, str(heads), str(dim), str(threads), path]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.alive = self.process.stdout.readline().strip() == "ready"

    def timer(self, case: str, length: int, train: bool) -> Callable[[], float]:
        def once() -> float:
            self.process.stdin.write(f"{case} {length} {int(train)}\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline().strip()
            if not answer or answer.startswith("failed"):
                raise RuntimeError(answer or "torch's process ended")
            return float(answer)

        return once


def documents(length: int, mean: int = 600) -> np.ndarray:
    lengths = np.random.default_rng(0).integers(mean // 10, 2 * mean, 4 * length // mean + 10)
    return np.repeat(np.arange(1, lengths.size + 1), lengths)[:length].astype(np.int32)


def jax_timer(function: Callable, *arrays: jax.Array) -> Callable[[], float]:
    jax.block_until_ready(function(*arrays))

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        return time.perf_counter() - start

    return once


def compare(title: str, timers: dict[str, Callable[[], float]], rounds: int, active_flops: float) -> None:
    """Prints medians of interleaved rounds, and each peer's ratio to the first contestant."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for name in list(timers):
        try:
            timers[name]()
        except Exception as error:
            print(f"  {name}: not measured ({error})")
            del timers[name]
    for _ in range(rounds):
        for name, once in timers.items():
            if not seconds[name] or seconds[name][-1] < 1:
                once()  # not counted: caches are the last contestant's, whose worker threads may still be spinning
            seconds[name].append(once())
    print(title)
    ours = None
    for name in timers:
        median = statistics.median(seconds[name])
        ours = median if ours is None else ours
        rate = active_flops / median / 1e9
        shown = f"{rate / 1000:.1f} TFLOP/s" if rate > 1e4 else f"{rate:.0f} GFLOP/s"
        ratio = "" if median == ours else f"  ratio {median / ours:.2f}"
        least = min(seconds[name])
        print(f"  {name:34s} {median:9.4f} s  (min {least:.4f})  {shown} of active area{ratio}", flush=True)


def attend(mask, train: bool, ids=None, **options) -> Callable:
    """A jitted call, or its gradients in q, k and v, under ``mask``; ``ids`` makes the mask depend on an argument."""
    build = mask if callable(mask) and not isinstance(mask, masks.Mask) else lambda ids: mask

    def forward(q, k, v, ids):
        return mf.dot_product_attention(q, k, v, mask=build(ids), **options)

    if not train:
        return jax.jit(forward)
    return jax.jit(jax.grad(lambda *a: forward(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2)))


def backend_of(mask, q, k, v, ids) -> str | None:
    """The backend of `attend`, whose mask may be known at run time only."""
    found = []
    build = mask if callable(mask) and not isinstance(mask, masks.Mask) else lambda ids: mask
    jax.eval_shape(lambda ids: found.append(mf.explain(build(ids), q, k, v).backend), ids)
    return found[0]


def plain(train: bool, **options) -> Callable:
    """The same for `jax.nn.dot_product_attention`."""

    def forward(q, k, v, ids):
        return jax.nn.dot_product_attention(q, k, v, **options)

    if not train:
        return jax.jit(forward)
    return jax.jit(jax.grad(lambda *a: forward(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has torch; default: this one, if it has")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(__import__("os").sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="comparisons whose title contains this text")
    parser.add_argument("--quick", action="store_true", help="a quarter of the lengths")
    options = parser.parse_args()
    short, long = (1024, 2048) if options.quick else (4096, 8192)
    on_gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    print(f"{jax.devices()[0].device_kind}, {options.heads} heads of {options.dim}, {jnp.dtype(dtype).name}, batch 1")

    def arrays(length):
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (1, length, options.heads, options.dim)
        return *(jax.random.normal(key, shape, dtype) for key in keys), jnp.asarray(documents(length)[None])

    def flops(mask, length, train):
        return mask.block_map(length, length, 64).active_flops(options.dim, 1, options.heads, backward=train)

    python = options.peer_python or (sys.executable if importlib.util.find_spec("torch") else None)
    torch = None
    if python is not None:
        import tempfile

        torch = Torch(python, options.heads, options.dim, options.threads, documents(short), tempfile.mkdtemp())
        torch = torch if torch.alive else None
    if torch is None:
        print("no torch: its columns are left out (pip install torch, or --peer-python)")

    def contest(title, mask, length, train, peers, build=None):
        if options.only not in title:
            return
        given = arrays(length)
        backend = backend_of(build or mask, *given)
        timers = {f"maskformer, {backend}": jax_timer(attend(build or mask, train), *given)}
        for name, function in peers.items():
            if not isinstance(function, str):
                try:
                    timers[name] = jax_timer(function, *given)
                except Exception as error:
                    print(f"  {name}: not measured ({type(error).__name__}: {str(error).splitlines()[0][:100]})")
            elif torch is not None:
                timers[name] = torch.timer(function, length, train)
        compare(f"{title}, {length} tokens", timers, options.rounds, flops(mask, length, train))

    causal, window = masks.causal(), masks.causal() & masks.sliding_window(1024)
    narrow = masks.causal() & masks.sliding_window(256)
    packed = lambda ids: masks.causal() & masks.segments(ids)
    fused = lambda train, **kw: {"jax.nn, cudnn": plain(train, implementation="cudnn", **kw)} if on_gpu else {}

    contest(
        "causal & window(1024), forward and backward", window, long, True,
        {"jax.nn": plain(True, is_causal=True, local_window_size=(1024, 0)),
         **fused(True, is_causal=True, local_window_size=(1024, 0))},
    )  # fmt: skip
    contest(
        "causal, forward and backward", causal, short, True, {"torch SDPA": "sdpa", **fused(True, is_causal=True)}
    )
    # A contest of its own: jax.nn frees gigabytes, and who comes next in its process pays for fresh pages.
    contest("causal, forward and backward, beside jax.nn", causal, short, True, {"jax.nn": plain(True, is_causal=True)})
    contest("causal, forward", causal, short, False, {"torch SDPA": "sdpa", **fused(False, is_causal=True)})
    contest("causal & window(256), forward", narrow, short, False, {"torch FlexAttention, compiled": "window"})
    contest(
        "causal & packed documents, forward", packed(jnp.asarray(documents(short)[None])), short, False,
        {"torch FlexAttention, compiled": "packed"}, build=packed,
    )  # fmt: skip

    if options.only not in "temporary memory":
        return
    print("causal & window(1024), forward and backward: temporary memory")
    for factor in (1, 2, 4):
        length = long * factor
        shapes = [jax.ShapeDtypeStruct((1, length, options.heads, options.dim), dtype)] * 3
        compiled = attend(window, True).lower(*shapes, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        logits = options.heads * length**2 * 4
        print(f"  {length:7d} tokens: {temporary / 2**20:8.1f} MiB  (logits alone would be {logits / 2**20:.0f} MiB)")


if __name__ == "__main__":
    main()
