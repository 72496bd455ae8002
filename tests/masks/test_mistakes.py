"""Texts and arguments that are wrong: one line, and a ValueError, whatever they are."""

import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskformer import masks
from maskformer.masks.builders import BUILDERS
from maskformer.masks.draw import EXAMPLES

TEXTS = [
    "causal & (window(1024) | sinks(4)) & segments",
    "causal & window(left=3, right=2) | ~strided(3)",
    "(causal | prefix(marked=inputs)) & segments(segment_ids, padding=0)",
    "per_head([causal, window(1)], ) & key_padding(lengths=n)",
    "natten((4, 6), (3, 5), dilation=1, causal=(True, False))",
    "tiles((4, 8), (2, 2), window=1) | global_tokens(2)",
    "block_diagonal((1, 2), (2, 3), (0, 4), align='end', right=0)",
    "shift(causal & chunked(4, left=1), q_offset=-2, k_offset=start)",
    "bigbird(512, block=16, window=3, random=2, global_blocks=1, seed=7)",
    "random_blocks(64, block=8, count=2, near=1) | longformer(2, global_count=1, dilation=2)",
    "tree((-1, 0, 0, 1), context=2) & graph(((0, 1), (1, 2)), node_size=2, directed=False)",
    "query_ranges((0, 1), (2, 3)) | key_ranges(begin, end) | dense(((1, 0), (0, 1)))",
    "block_diffusion(2, length=8) & dilated_window(4, 0, 2) & documents & predicate(fn, table, batch_dims=1)",
    "to_last_image & query_padding & shared_prefix(ids, shared_id=1) & nothing() | full",
]  # fmt: skip
PIECES = [
    *"&|~(),=[]-.'\"\\ \n\t\x00é٣", "''", "()", "((", "[[", "~~", "&&", "1e5", "-1", "0", "3.5", "1e999", "2147483647",
    "2147483648", "9" * 40, "9" * 5000, "-" * 1000, "[" * 1000, "(" * 1000, "~" * 1000, "True", "None", "causal", "q",
    "and", "not", "lambda", "segments", "window(", "left=", "q_offset=", "*", "**", "causal, causal", "x" * 3000,
]  # fmt: skip


def mutate(rng: random.Random, text: str) -> str:
    """One to three edits: characters, words, and pieces of other texts."""
    for _ in range(rng.randint(1, 3)):
        at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        words = re.findall(r"\w+|\W", text) or [""]
        word = rng.randrange(len(words))
        match rng.randrange(6):
            case 0:
                text = text[:at] + text[min(end, at + rng.randint(1, 8)) :]
            case 1:
                text = text[:at] + rng.choice(PIECES) + text[at:]
            case 2:
                text = "".join(words[:word] + [rng.choice(PIECES)] + words[word + 1 :])
            case 3:
                text = "".join(words[:word] + words[word + 1 :])
            case 4:
                text = text[:at] + text[at:end] * 2 + text[end:]
            case 5:
                text = text[:at] + rng.choice(TEXTS)[rng.randrange(20) :]
    return text


def broken(text: str) -> str | None:
    """What is wrong with how a text ends: in a mask that can be used, or an error of one line."""
    try:
        mask = masks.parse(text)
        arrays = {name: EXAMPLES[name](8) for name in mask.unbound if name in EXAMPLES}
        mask = mask.bind(**arrays)
        if masks.parse(repr(mask), **mask.bindings()) != mask:
            return f"{text!r} prints as {mask!r}, which is another mask"
        if not mask.unbound:
            jax.eval_shape(lambda: mask.select(0, 0).dense(8, 8))
    except ValueError as error:
        message = str(error)
        if not message.isprintable() or len(message) > 500:
            return f"{text!r} ends in {message!r}"
        if isinstance(error, masks.MaskSyntaxError) and not message.startswith("mask "):
            return f"{text!r} ends in {message!r}, which does not name the mask"
    except Exception as error:
        return f"{text!r} ends in {type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_text_that_is_wrong_ends_in_one_line(count):
    rng = random.Random(0)
    texts = [mutate(rng, rng.choice(TEXTS)) for _ in range(count)]
    assert [found for found in map(broken, texts) if found] == []


GOOD = {
    "left": 1, "right": 0, "dilation": 2, "stride": 2, "count": 1, "size": 2, "block": 2, "length": 8, "window": 1,
    "random": 1, "global_blocks": 1, "seed": 0, "skip": 0, "near": 0, "global_count": 1, "q_ids": np.ones(4, int),
    "ids": np.ones(4, int), "valid": np.ones(4, bool), "lengths": np.array(2), "segment_ids": np.ones(4, int),
    "shared_id": 0, "image_starts": np.ones(4, bool), "key_images": np.ones(4, int), "begin": np.zeros(4, int),
    "end": np.ones(4, int), "q_lengths": np.array([2, 2]), "align": "start", "grid": (4, 4), "kernel": 1,
    "causal": False, "tile": (2, 2), "edges": np.array([[0, 1]]), "node_size": 1, "directed": True,
    "parents": np.array([-1, 0]), "context": 0, "array": np.ones((4, 4), bool), "fn": lambda q, k: q > k,
    "batch_dims": 0, "mask": masks.causal(), "q_offset": 0, "k_offset": 0,
}  # fmt: skip
BAD = [
    None, -5, 2.5, float("nan"), "x" * 3000, "-" * 1000, b"x", True, (), [1, 2], [[1, 2], [3]], [[[1]]], {}, {1},
    object(), 2**40, 10**30, (2,) * 99, np.ones(3), np.array(["a"]), np.float32(3), np.int64(-7), jnp.ones((2,) * 6),
    jnp.array(1 + 2j), jax.random.key(0), masks.causal(), masks.causal, lambda q: q,
]  # fmt: skip
OURS = [entry for entry in BUILDERS.values() if entry.function.__module__.startswith("maskformer.")]


@pytest.mark.parametrize("name", [entry.name for entry in OURS if entry.parameters])
def test_a_bad_argument_of_a_builder_is_an_error_of_one_line(name):
    parameters = BUILDERS[name].parameters
    for bad in BAD:
        for parameter in parameters.values():
            given = {key: GOOD[key] for key in parameters.keys() & GOOD.keys() - {parameter.name}}
            variadic = parameter.kind is parameter.VAR_POSITIONAL
            positional = (given.pop("fn"), bad) if variadic and "fn" in given else (bad,) if variadic else ()
            named = given if variadic else {**given, parameter.name: bad}
            try:
                mask = BUILDERS[name].function(*positional, **named)
                jax.eval_shape(lambda mask=mask: mask.select(0, 0).dense(4, 4))
            except ValueError as error:
                assert str(error).isprintable() and len(str(error)) <= 400, (name, parameter.name, bad)
