"""Random mistakes in the recipes: a value of the wrong kind or size, a key misspelt, a section that is none."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

from maskformer import objectives
from maskformer.training import load_config
from maskformer.training.experiment import plain

RECIPES = (
    "adaptive", "bert", "diffusion", "electra", "fim", "gpt", "prefix_lm", "span_bert", "swap", "ul2",
)
SMALL = ("--config.model.layers=2", "--config.model.width=32", "--config.model.heads=2")

# What a slip of the hand, of the shell, of a unit or of a converter leaves behind.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 7, -1, 15, 100, 1000, 10**6, 2**31 - 1, 2**31, 2**32, 2**40, 2**63, 10**30, 10**400,
    0.0, -0.0, 0.15, 0.5, 1.0, 1.5, 15.0, -0.1, 1e-8, 1e-45, 1e-320, 1e6, 1e30, 1e39, 1e300,
    float("inf"), float("-inf"), float("nan"),
    "", " ", "50%", "None", "True", "0.15", "1e-3", "causal", "nope", "mlm", "two\nlines", "\x1b[31mred", "\0",
    "ＭＡＳＫ", "-" * 1000, "[" * 1000, "x" * 3000, "(" * 300, "~" * 300 + "causal",
    [], [None], [1], [0.8, 0.1, 0.1], ["causal"], [[]], [[1, 2], [3]], [0.5] * 3000,
    {}, {"a": 1}, {"": None}, {"name": "mlm"}, {"name": None}, {"name": ["mlm"]},
    {"schedule": "linear", "start": 0.3, "end": 0.15, "steps": 100}, {"schedule": "linear", "start": 0.3},
    {"schedule": "linear", "start": 0.0, "end": 0.0, "steps": "50%"}, {"schedule": ["step"]},
    {"schedule": "cosine", "start": 0.3, "end": 0.1, "steps": 2**70}, {"schedule": "linear", "start": "a"},
    {"schedule": "step", "values": {"0": 0.3, "50%": 0.15}}, {"schedule": "step", "values": {"0": 0.3, "9999999": 0.1}},
    {"schedule": "step", "values": [0.1]}, {"schedule": "step", "values": {"x": 0.1}}, {"schedule": "step"},
    {"schedule": "step", "values": {"0": None}}, {"schedule": "step", "values": {"0": 0.1, "1e5%": 0.1}},
)  # fmt: skip
# As one would type them, for what no Python value writes itself as.
TEXTS = ("{[]: 1}", "[1, 2", "lambda: 0", "1_0", "0x10", "-" * 1000 + "1", "[" * 1000 + "]" * 1000, "9" * 5000, "1e999")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A recipe with one thing wrong, perhaps.

    Attributes:
      recipe: its name.
      key: the dotted key that was changed.
      value: what stands there now.
      config: the whole, as `config.json` would hold it; None where `flag` makes it.
      flag: the change as the command line says it.
    """

    recipe: str
    key: str
    value: Any
    config: dict[str, Any] | None = None
    flag: str | None = None


def flags(recipe: str) -> list[str]:
    length = 64 if recipe == "ul2" else 32  # UL2's longest spans are 64 tokens
    return [f"--config=configs/{recipe}.py:tiny,seq={length},vocab=1024", *SMALL]


def mutations(seed: int, count: int) -> Iterator[Mutation]:
    """The same ones for the same seed."""
    generator = random.Random(seed)
    originals = {recipe: plain(load_config(flags(recipe))[0]) for recipe in RECIPES}
    for _ in range(count):
        recipe = generator.choice(RECIPES)
        config = copy.deepcopy(originals[recipe])
        if generator.random() < 0.3:
            path = _path(generator, config)
            text = generator.choice(TEXTS) if generator.random() < 0.2 else str(_value(generator, config, path))
            key = ".".join(map(str, path))
            yield Mutation(recipe, key, text, flag=f"--config.{key}={text}")
            continue
        if generator.random() < 0.4:
            path = _another_objective(generator, config)
        else:
            path = _path(generator, config)
        holder, value = config, _value(generator, config, path)
        for part in path[:-1]:
            holder = holder[part]
        act = generator.random()
        if act < 0.03 and isinstance(holder, dict):
            del holder[path[-1]]
        elif act < 0.06 and isinstance(holder, dict):
            holder[f"{path[-1]}q"] = holder.pop(path[-1])
        else:
            holder[path[-1]] = value
        yield Mutation(recipe, ".".join(map(str, path)), value, config=config)


def _another_objective(generator: random.Random, config: dict[str, Any]) -> tuple[str, str]:
    """Any objective in place of the recipe's, and which of its parameters to get wrong."""
    name = generator.choice([*objectives.BUILDERS, *objectives.COMPAT])
    builder = objectives.COMPAT[name].objective if name in objectives.COMPAT else name
    known = objectives.parameters(builder)
    parameter = generator.choice(list(known))
    config["objective"] = {"name": name, parameter: plain(known[parameter].default)}
    config["data"]["sentinels"] = generator.choice((0, 40))
    return ("objective", parameter)


def _path(generator: random.Random, config: dict[str, Any]) -> tuple[Any, ...]:
    """A place in the config: a leaf of a section mostly, sometimes the section, sometimes inside of a leaf."""
    section = generator.choice(list(config))
    if not isinstance(config[section], dict) or not config[section] or generator.random() < 0.08:
        return (section,)
    path = (section, generator.choice(list(config[section])))
    inside = config[section][path[-1]]
    while inside and isinstance(inside, dict | list) and generator.random() < 0.7:
        step = generator.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        path, inside = (*path, step), inside[step]
    return path


def _value(generator: random.Random, config: dict[str, Any], path: tuple[Any, ...]) -> Any:
    """Something else for the place: any value, that of another place, or a near one."""
    value: Any = config
    for part in path:
        value = value[part]
    kind = generator.random()
    if kind < 0.15:
        other: Any = config
        for part in _path(generator, config):
            other = other[part]
        return copy.deepcopy(other)
    if kind < 0.35 and isinstance(value, int | float) and not isinstance(value, bool):
        return generator.choice((value + 1, value * 2, -value, value / 2, value * 10**6, str(value), [value]))
    if kind < 0.35 and isinstance(value, str) and value:
        at = generator.randrange(len(value))
        return generator.choice((value[:at] + value[at + 1 :], value[:at] + "\n" + value[at:], value * 500))
    return copy.deepcopy(generator.choice(VALUES))
