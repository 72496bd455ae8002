"""What can be measured of a run: functions by name that declare their options. `evaluation/measures/` holds ours."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from maskformer import checks
from maskformer.data import DataConfig, PackedDataset, Tokenizer
from maskformer.evaluation.bound import Batch
from maskformer.evaluation.metrics import Sums
from maskformer.objectives import Objective

Results = dict[str, float]


class Measurable(Protocol):
    """What a measure may ask of a run: `training.runs.Run`, short of how it was loaded and where its parameters are."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def model(self) -> Any:
        """Its `config` and its `apply(params, **corrupted.inputs(mask))`."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def seed(self) -> int:
        """Of what an evaluation draws."""

    @property
    def objective(self) -> Objective:
        """What the run was trained on."""

    @property
    def predicts_tokens(self) -> bool:
        """Whether its model gives logits over the vocabulary."""

    def evaluated(self, changes: Mapping[str, Any] | None = None) -> Objective:
        """What it is evaluated on: its objective with those changes, of which `name` makes it another one."""

    def metrics(self, split: str, changes: Mapping[str, Any] | None = None) -> Results:
        """The metrics of the task that trains on `evaluated(changes)`: its losses and accuracies."""

    def dataset(self, split: str) -> PackedDataset: ...

    def sums(self, step: Callable[[Any, Batch], Sums], split: str) -> dict[str, np.ndarray]:
        """The sums of `step(params, batch)` over the rows of `split` that are evaluated; `step` is jitted here."""


@dataclasses.dataclass(frozen=True)
class Help:
    """What there is to say of an option beside its type and default.

    Attributes:
      text: one line for `maskformer evaluate --help`.
      metavar: what stands for its value there.
      each: the flag is in the plural and takes several values, each of which is a column of the table.
      names_column: its value is the name of the column.
    """

    text: str
    metavar: str | None = None
    each: bool = False
    names_column: bool = False


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a measure, as its function declares it.

    Attributes:
      name: the parameter's name.
      kind: `int`, `float`, `str` or `bool`; None for what only Python can give.
      choices: the values allowed; empty for all of its kind.
      default: as in the function; where it is None, so may the option be.
      help: None for an option that has no flag.
    """

    name: str
    kind: type | None
    choices: tuple[Any, ...]
    default: Any
    help: Help | None

    @property
    def argument(self) -> str:
        """The name on the command line, with underscores: `rates` for an option `rate` of which each is a column."""
        return f"{self.name}s" if self.help and self.help.each else self.name

    def check(self, value: Any) -> None:
        """ValueError for a value of another kind."""
        if self.kind is None or (value is None and self.default is None):
            return
        if self.choices:
            checks.choose(self.name, value, self.choices)
        accepted = (int, float) if self.kind is float else self.kind
        fits = isinstance(value, accepted) and isinstance(value, bool) == (self.kind is bool)
        checks.require(fits, self.name, value, f"{_ARTICLES[self.kind]} {self.kind.__name__}")


_ARTICLES = {int: "an", float: "a", str: "a", bool: "a"}


@dataclasses.dataclass(frozen=True)
class Measure:
    """A function `(run, split, **options) -> results` and what it declares.

    Attributes:
      name: the function's.
      summary: the first line of its docstring.
      function: what is called.
      options: its keyword parameters.
      shows: phrases for a table's cell, filled in from the results; one whose results are not all there is left out.
    """

    name: str
    summary: str
    function: Callable[..., Results]
    options: dict[str, Option]
    shows: tuple[str, ...] = ()

    def __call__(self, run: Measurable, split: str = "test", **options: Any) -> Results:
        """Measure `split` of `run`.

        Raises:
          ValueError: an unknown option or a bad value; or the measure is not defined for this run, and why.
        """
        for name, value in options.items():
            self._known(name, self.options)
            self.options[name].check(value)
        return self.function(run, split, **options)

    def columns(self, **options: Any) -> dict[str, Column]:
        """A column for a table of runs; one for each value of an option that is given in the plural.

        Raises:
          ValueError: as for a call.
        """
        spread = {option.argument: option for option in self.options.values() if option.argument != option.name}
        for name in options:
            self._known(name, {**self.options, **spread})
        given = {option.name: options.pop(key, None) for key, option in spread.items()}
        many = [[(self.options[name], value) for value in values] for name, values in given.items() if values]
        title = self.name
        for name, value in options.items():
            self.options[name].check(value)
            said = self.options[name].help
            if said and said.names_column and value is not None:
                title = str(value)
        columns = {}
        for chosen in itertools.product(*many):
            for option, value in chosen:
                option.check(value)
            heading = ", ".join(f"{option.name} {_short(value)}" for option, value in chosen)
            values = {option.name: value for option, value in chosen}
            columns[heading or title] = Column(self, {**options, **values}, spread=bool(chosen))
        return columns

    def say(self, results: Mapping[str, float]) -> str:
        """The results in a few words."""
        if not self.shows:
            return ", ".join(f"{name} {value:.4f}" for name, value in results.items())
        filled = []
        for phrase in self.shows:
            try:
                filled.append(phrase.format_map(results))
            except KeyError:  # bits per byte, of a text without bytes
                continue
        return ", ".join(filled)

    def _known(self, name: str, known: Mapping[str, Any]) -> None:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"measure {self.name!r} has no option {name!r} ({takes}){checks.nearest(name, known)}")


@dataclasses.dataclass(frozen=True)
class Column:
    """A measure with its options: what a table has below one heading.

    Attributes:
      spread: it is of one of the values of an option that was given in the plural.
    """

    measure: Measure
    options: Mapping[str, Any]
    spread: bool = False

    def __call__(self, run: Measurable, split: str) -> Results:
        return self.measure(run, split, **self.options)


MEASURES: dict[str, Measure] = {}


def builder(*, shows: tuple[str, ...] = ()) -> Callable[[Callable[..., Results]], Callable[..., Results]]:
    """Registers a measure under its function's name.

    Args:
      shows: see `Measure`; without it a table's cell has all results.

    The function is `(run: Measurable, split, *, options...) -> results`. Its keyword parameters are its options, each
    with a type, a default and a line of help: `every: Annotated[int, "score every K-th token"] = 1`. Such an option is
    a flag of `maskformer evaluate`; `Help` says more of it, and one without any help is for Python alone. Types are
    `int`, `float`, `str`, `bool` and a `Literal` of them, or None where that is the default.

    Raises:
      ValueError: the name is taken by one of ours, or a parameter cannot be an option.

    >>> @builder(shows=("{rows:.0f} rows",))
    ... def size(run, split, *, every: typing.Annotated[int, "count each K-th row"] = 1):
    ...     '''How many rows there are.'''
    ...     return {"rows": len(run.dataset(split)) / every}
    >>> get("size").say({"rows": 12.0}), get("size").options["every"].default
    ('12 rows', 1)
    >>> get("size").columns(evry=2)
    Traceback (most recent call last):
        ...
    ValueError: measure 'size' has no option 'evry' (it takes every); did you mean 'every'?
    >>> del MEASURES["size"]
    """

    def register(function: Callable[..., Results]) -> Callable[..., Results]:
        name = function.__name__
        if name in MEASURES and MEASURES[name].function.__module__.startswith("maskformer."):
            raise ValueError(f"measure {name!r} is there already: give the function another name")
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = list(inspect.signature(function).parameters.values())
        if len(parameters) < 2 or any(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in parameters[2:]):
            raise ValueError(f"measure {name!r}: expected a function (run, split, *, options...)")
        options = {p.name: _option(name, p, hints.get(p.name)) for p in parameters[2:]}
        for option in options.values():
            _agrees(name, option)
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        MEASURES[name] = Measure(name, summary, function, options, shows)
        return function

    return register


def get(name: str) -> Measure:
    """The measure `name`; ValueError, with the nearest, where there is none.

    >>> get("nl_bound")
    Traceback (most recent call last):
        ...
    ValueError: measure='nl_bound': expected one of ...; did you mean 'nll_bound'?
    """
    checks.choose("measure", name, MEASURES)
    return MEASURES[name]


def _option(measure: str, parameter: inspect.Parameter, hint: Any) -> Option:
    said: Help | None = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, note = typing.get_args(hint)[:2]
        said = Help(note) if isinstance(note, str) else note
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    members = tuple(member for member in members if member is not types.NoneType)
    choices = typing.get_args(members[0]) if typing.get_origin(members[0]) is typing.Literal else ()
    kind = type(choices[0]) if choices else members[0]
    plain = len(members) == 1 and kind in _ARTICLES
    if parameter.default is inspect.Parameter.empty or (said and not plain):
        raise ValueError(
            f"measure {measure!r}: option {parameter.name!r}: expected a default, and the type int, float, str, bool "
            "or a Literal of them"
        )
    return Option(parameter.name, kind if plain else None, choices, parameter.default, said)


def _agrees(measure: str, option: Option) -> None:
    """Raise where another measure's flag of this name means something else."""
    for name, other in MEASURES.items():
        for theirs in other.options.values():
            one_flag = theirs.help and option.help and theirs.argument == option.argument
            same = (theirs.name, theirs.kind, theirs.choices) == (option.name, option.kind, option.choices)
            if name != measure and one_flag and not same:
                raise ValueError(
                    f"measure {measure!r}: its option {option.name!r} is of another type than that of {name!r}; give "
                    "it another name"
                )


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
