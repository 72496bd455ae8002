"""Recipes: Python files with `get_config(arg)` and `sweep()`, and the command-line flags that change them."""

from __future__ import annotations

import ast
import inspect
import os
import pathlib
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_collections

from maskformer.checks import nearest, one_line, require, shown
from maskformer.training import sweeps


class ArgumentError(ValueError):
    """The part behind the recipe's colon is wrong: a mistake of the command line, not of the recipe."""


def parse_arg(
    arg: str | None, choices: Sequence[str] = (), default: str = "", **options: Any
) -> tuple[str, types.SimpleNamespace]:
    """The structure argument of a recipe, `[choice][,option=value...]`, with the types of the defaults.

    Raises:
      ValueError: an unknown choice or option (naming the nearest), or a value of the wrong type.

    >>> parse_arg("tiny,seq=64", choices=("tiny", "base"), default="base", seq=128, vocab=8192)
    ('tiny', namespace(seq=64, vocab=8192))
    >>> parse_arg("tinny", choices=("tiny", "base"), default="base")
    Traceback (most recent call last):
        ...
    maskformer.training.recipes.ArgumentError: config argument 'tinny': expected one of tiny, base; did you mean 'tiny'?
    """
    choice, values = default, dict(options)
    for part in filter(None, (arg or "").split(",")):
        key, equals, text = part.partition("=")
        if not equals:
            if key not in choices:
                raise ArgumentError(f"config argument {shown(key)}: expected {_choices(key, choices)}")
            choice = key
        elif key not in options:
            raise ArgumentError(f"config argument {shown(key)}: expected {_choices(key, options)}")
        else:
            values[key] = _parse_as(key, text, type(options[key]))
    return choice, types.SimpleNamespace(**values)


def load_config(argv: Sequence[str]) -> tuple[ml_collections.ConfigDict, str]:
    """The config that flags describe: `--config=configs/bert.py:mini --config.optimizer.learning_rate=1e-3`.

    Returns:
      The config with its overrides, and the recipe as given (`configs/bert.py:mini`).

    Raises:
      ValueError: one line that names the flag, its value and the fix.
    """
    recipes, changes = split_flags(argv)
    if not recipes:
        raise ValueError("--config is missing: expected a recipe, such as --config=configs/bert.py:mini")
    recipe = recipes[-1]
    path, colon, arg = recipe.partition(":")
    get_config = _load_recipe(path).get("get_config")
    if not callable(get_config):
        raise ValueError(f"--config={recipe}: {path} has no get_config(arg=None)")
    try:
        config = _called(path, get_config, arg if colon else None)
    except ArgumentError as error:
        raise ArgumentError(str(error)) from None  # without the line of the recipe that read it, which is not to mend
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"{path}:{_first_line(get_config)}: get_config returned {shown(config)}: expected the ConfigDict that "
            "default_config() gives, changed; end it with `return config`"
        )
    return override(config, changes), recipe


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The recipes that `--config=` flags name, and the flags that change keys.

    >>> split_flags(["--config=mine.py:tiny", "--config.seed=1"])
    (['mine.py:tiny'], ['--config.seed=1'])
    """
    recipes = [flag.partition("=")[2] for flag in argv if flag.startswith("--config=")]
    return recipes, [flag for flag in argv if not flag.startswith("--config=")]


def register(recipe: str) -> None:
    """Make known what a recipe registers when it is read, such as masks of its own; its config is not asked for."""
    _load_recipe(recipe.partition(":")[0])


def override(config: ml_collections.ConfigDict, flags: Sequence[str]) -> ml_collections.ConfigDict:
    """A copy of `config` changed by flags such as `--config.train.steps=10`; text is read as the type of its key."""
    changes: dict[str, Any] = {}
    for flag in flags:
        key, equals, text = flag.partition("=")
        if not key.startswith("--config."):
            raise ValueError(f"argument {shown(flag)}: no such flag; expected --config.KEY=VALUE")
        key = key.removeprefix("--config.")
        if not equals:
            raise ValueError(f"argument {shown(flag)}: expected {shown(flag + '=VALUE')}, with an equals sign")
        kind = sweeps.key_type(config, key)
        changes[key] = text if kind is str and text != "None" else _literal(text)
    return sweeps.apply(config, changes)


def load_sweep(recipe: str, name: str = "sweep") -> list[dict[str, Any]]:
    """The override dicts of a recipe's `sweep()`, or of `sweep_<name>()`.

    Raises:
      ValueError: the recipe has no such function; the ones it has are named.
    """
    path, _, arg = recipe.partition(":")
    module = _load_recipe(path)
    function = name if name == "sweep" else f"sweep_{name}"
    if function not in module:
        named = sorted(key.removeprefix("sweep_") for key in module if key.startswith("sweep_"))
        known = [*(["sweep"] if "sweep" in module else []), *named]
        if not known:
            raise ValueError(
                f"{path} has no sweep: give it a function sweep(), or sweep_NAME() for --sweep=NAME, that yields dicts "
                "of config keys and values"
            )
        asked = "no sweep() of its own" if name == "sweep" else f"no {function}()"
        raise ValueError(f"--sweep={name}: {path} has {asked}; use --sweep={' or --sweep='.join(known)}")
    takes_arg = bool(inspect.signature(module[function]).parameters)
    sweep = _called(path, module[function], *([arg] if takes_arg else []))
    told = f"{path}:{_first_line(module[function])}: {function}()"
    require(isinstance(sweep, Iterable), f"{told} gives", sweep, "an iterable of dicts of config keys and values")
    runs = _called(path, list, sweep)
    for changes in runs:
        require(isinstance(changes, dict), f"{told} yields", changes, "a dict of config keys and values")
    return runs


def _load_recipe(path: str) -> dict[str, Any]:
    file = pathlib.Path(path)
    if not file.is_file():
        near = sorted(file.parent.glob("*.py")) if file.parent.is_dir() else []
        hint = nearest(path, near) or ", such as configs/bert.py:mini"
        raise ValueError(f"--config={one_line(path)}: no such file; expected the path of a recipe{hint}")
    # As with `python -m`: a recipe may import the project it lies in, from wherever the command was installed; and its
    # neighbours, as `configs/mine.py` imports `configs.bert`, from wherever the command is run.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    around = str(file.resolve().parent.parent)
    if around not in sys.path:
        sys.path.append(around)
    return _called(path, runpy.run_path, path)


def _called(path: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the recipe's `function` returns; whatever it raises is one line that names the recipe's file and line."""
    try:
        return function(*arguments)
    except ArgumentError:
        raise
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--config={path}: the recipe imports {error.name!r}, which is not found; run from the folder that holds "
            "it, or put that folder on PYTHONPATH"
        ) from error
    except SyntaxError as error:
        raise ValueError(f"{error.filename or path}:{error.lineno}: {error.msg}; expected Python") from error
    except Exception as error:
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if _same_file(frame.filename, path)]
        line = own[-1] if own else _first_line(function)
        said = one_line(str(error)) or "no message"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}:{line}: {kind}{said}") from error


def _same_file(one: str, other: str) -> bool:
    return os.path.abspath(one) == os.path.abspath(other)


def _first_line(function: Any) -> int:
    return getattr(getattr(function, "__code__", None), "co_firstlineno", 1)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        # No literal, such as {[]: 1}, or nested deeper than Python reads: it is text.
        return text


def _parse_as(key: str, text: str, kind: type) -> Any:
    if kind is bool and text in ("True", "False", "true", "false"):
        return text in ("True", "true")
    try:
        return kind(text)
    except ValueError as error:
        raise ArgumentError(f"config argument {key}={shown(text)}: expected {kind.__name__}") from error


def _choices(key: str, known: Sequence[str] | dict[str, Any]) -> str:
    return f"one of {', '.join(known)}{nearest(key, known)}"
