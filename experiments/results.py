"""What a card has measured: numbers by name, arm and seed, stored as JSON beside the card."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maskformer.checks import choose, require

Value = float | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Results:
    """The numbers that verdicts, table and plot are made of. They name no commit, date or machine.

    >>> results = Results({"small": {}, "large": {"model.width": 64}}, (0, 1), {
    ...     "loss": {"small": [3.0, 3.5], "large": [2.0, 3.0]}})
    >>> results["loss", "large"], results.difference("loss", "small", "large")
    (array([2., 3.]), array([1. , 0.5]))
    >>> results.array("loss").shape
    (2, 2)

    Attributes:
      arms: name -> what was changed for it, as the card says it.
      seeds: of the runs of each arm.
      measured: name -> arm -> a number for each seed, or a list of numbers (a curve) for each.

    Raises:
      ValueError: a name, arm or seed without its value, or one that is not finite.
    """

    arms: Mapping[str, Any]
    seeds: Sequence[int]
    measured: Mapping[str, Mapping[str, Sequence[Value]]]

    def __post_init__(self) -> None:
        for name, by_arm in self.measured.items():
            for arm in self.arms:
                field = f"results: {name!r} of arm {arm!r}"
                require(arm in by_arm and len(by_arm[arm]) == len(self.seeds), field, by_arm.get(arm), "a value a seed")
                for seed, value in zip(self.seeds, by_arm[arm]):
                    numbers = value if isinstance(value, Sequence) else [value]
                    finite = all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
                    require(finite, f"{field}, seed {seed}", value, "finite numbers; of runs that diverge, how often")

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        """The values of one name and arm: [seed], or [seed, point] for curves."""
        name, arm = key
        choose("measured", name, self.measured)
        choose("arm", arm, self.arms)
        return np.array(self.measured[name][arm])

    def array(self, name: str) -> np.ndarray:
        """The values of one name: [seed, arm], or [seed, arm, point] for curves of one length."""
        return np.stack([self[name, arm] for arm in self.arms], axis=1)

    def difference(self, name: str, arm: str, other: str) -> np.ndarray:
        """`arm` minus `other`, paired by seed: [seed], or [seed, point] for curves."""
        return self[name, arm] - self[name, other]

    def numbers(self) -> list[str]:
        """The names under which one number a run was measured.

        Raises:
          ValueError: there is none.
        """
        names = [
            name
            for name, by_arm in self.measured.items()
            if not any(isinstance(value, Sequence) for values in by_arm.values() for value in values)
        ]
        if not names:
            raise ValueError("results: only curves were measured; give the card a table and a plot of its own")
        return names

    def save(self, path: pathlib.Path) -> None:
        """As JSON, with the values of all seeds of an arm on one line."""
        blocks = [
            f"  {json.dumps(name)}: {{\n"
            + ",\n".join(f"   {json.dumps(arm)}: {json.dumps(list(values))}" for arm, values in by_arm.items())
            + "\n  }"
            for name, by_arm in self.measured.items()
        ]
        arms = ",\n".join(f"  {json.dumps(arm)}: {json.dumps(change)}" for arm, change in self.arms.items())
        path.write_text(
            f'{{\n "arms": {{\n{arms}\n }},\n "seeds": {json.dumps(list(self.seeds))},\n "measured": {{\n'
            + ",\n".join(blocks)
            + "\n }\n}\n"
        )

    @classmethod
    def load(cls, path: pathlib.Path) -> Results:
        """The results in a file.

        Raises:
          ValueError: no such file, or no results in it; the file is named.
        """
        if not path.is_file():
            raise ValueError(f"{path}: no such file; run the card first, without --write")
        try:
            stored = json.loads(path.read_text())
            return cls(stored["arms"], stored["seeds"], stored["measured"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not the results of a card ({error!r}); run the card again") from error

    def require_arms(self, arms: Mapping[str, Any]) -> None:
        """Refuse results of other arms than a card has now.

        Raises:
          ValueError: names the first arm that differs.
        """
        now = json.loads(json.dumps(dict(arms)))
        for arm in [*now, *self.arms]:
            has, had = now.get(arm, "no such arm"), self.arms.get(arm, "no such arm")
            if has != had:
                raise ValueError(f"results: arm {arm!r}: expected {has!r}, measured was {had!r}; run the card again")
