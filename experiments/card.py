"""A card: a paper's claims, tested by runs that differ in what the claims are about, over several seeds.

A card of one's own is a folder with `card.py` and `README.md`; `maskformer card new NAME` writes both, and
`docs/experiments.md` explains them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import plots, running
from experiments.claims import Claim, claims_table
from experiments.plots import curves_plot, default_plot, panels
from experiments.results import Results, Value
from experiments.tables import arm_table, default_table, spread
from experiments.trained import Trained
from maskformer import paths
from maskformer.checks import printable, require
from maskformer.paths import AnyPath
from maskformer.training import Preempted, resolve, sweeps
from maskformer.training.checkpoints import CheckpointError
from maskformer.training.preemption import PreemptionGuard
from maskformer.training.workdir import RunError

__all__ = [
    "Card",
    "Claim",
    "Results",
    "Trained",
    "arm_table",
    "curves_plot",
    "default_plot",
    "panels",
    "spread",
]

BLOCK_BEGIN, BLOCK_END = "<!-- results -->", "<!-- end of results -->"


@dataclasses.dataclass(frozen=True)
class Card:
    """An experiment: what is trained, what is measured, what is claimed.

    Attributes:
      file: the card's own file (`__file__`); results lie beside it, and its folder gives the card its name.
      config: a recipe's `get_config(arg=None)`. The card trains without progress lines and TensorBoard, and keeps the
        latest checkpoint and the best.
      arms: name, as tables show it -> what distinguishes the arm: `{"objective.rate": 0.4}` sets keys of the config,
        a string is the argument of `config`, as behind the colon of `--config=RECIPE.py:ARG`.
      measure: a finished run -> name -> number, or a list of numbers (a curve). Of every run the same names.
      claims: results -> claims, one effect for each seed in each. Called again whenever the card is rendered, so that
        no verdict is ever stored.
      seeds: each arm is trained with each of them. Arms of one seed are paired: they share initialisation, order of
        the data and masks as far as their configs allow.
      table: results -> Markdown. By default a line for each arm, with mean and standard deviation of each number.
      plot: draws results on an empty figure. By default a panel for each number.

    Raises:
      ValueError: no arms, no seeds, an arm with a seed of its own, or two runs that would share a folder.
    """

    file: str
    config: Callable[..., ConfigDict]
    arms: Mapping[str, sweeps.Overrides | str]
    measure: Callable[[Trained], Mapping[str, Value]]
    claims: Callable[[Results], Sequence[Claim]]
    seeds: Sequence[int] = range(5)
    table: Callable[[Results], str] = default_table
    plot: Callable[[Results, Figure], None] = default_plot

    def __post_init__(self) -> None:
        require(len(self.arms) > 0, "card.arms", self.arms, "at least one arm")
        require(len(set(self.seeds)) == len(self.seeds) > 0, "card.seeds", self.seeds, "at least one seed, each once")
        for arm, what in self.arms.items():
            seeded = not isinstance(what, str) and "seed" in what
            require(not seeded, f"card.arms[{arm!r}]", what, "no seed; card.seeds has them")
        folders = [self.folder(arm, seed) for arm in self.arms for seed in self.seeds]
        require(len(set(folders)) == len(folders), "card.arms", list(self.arms), "arms that differ from each other")

    @property
    def home(self) -> pathlib.Path:
        """The folder of the card."""
        return pathlib.Path(self.file).resolve().parent

    def folder(self, arm: str, seed: int) -> str:
        """The name of a run's folder, after what distinguishes the run: `objective.rate=0.4,seed=1`."""
        what = self.arms[arm]
        keys = {"seed": seed, **({"arm": what} if isinstance(what, str) else what)}
        named = ",".join(f"{key}={value}" for key, value in sorted(keys.items()))
        return re.sub(r"[^\w.,=+-]+", "_", named)

    def run_config(self, arm: str, seed: int, steps: int | None = None) -> ConfigDict:
        """What a run is trained with; `steps` shortens it.

        Raises:
          ValueError: an override of the arm is not possible.
        """
        what = self.arms[arm]
        config = running.quiet(self.config(what) if isinstance(what, str) else self.config())
        config = sweeps.apply(config, {"seed": seed, **({} if isinstance(what, str) else what)})
        return config if steps is None else running.shortened(config, steps)

    def sweep(self) -> Iterator[sweeps.Overrides]:
        """The runs as a recipe's `sweep()`, for `maskformer sweep`; arms by argument are chosen behind the colon."""
        changes = [what for what in self.arms.values() if not isinstance(what, str)]
        return sweeps.product(sweeps.arms("seed", self.seeds), changes or [{}])

    def plan(
        self, workdir: AnyPath, seeds: Sequence[int], steps: int | None = None
    ) -> dict[tuple[str, int], ConfigDict]:
        """The runs, checked before any of them starts: (arm, seed) -> config.

        Args:
          workdir: folder of the runs.
          seeds: some of the card's.
          steps: for runs shorter than the config's.

        Raises:
          ValueError: a config is not possible, or a run's folder holds another run.
        """
        # By seed first: what an interrupted card has finished is then complete pairs.
        plan = {}
        for arm, seed in ((arm, seed) for seed in seeds for arm in self.arms):
            try:
                plan[arm, seed] = self.run_config(arm, seed, steps)
                resolve(plan[arm, seed])
            except ValueError as error:
                raise ValueError(f"arm {arm!r}: {error}") from error
            running.refuse_another(plan[arm, seed], workdir / self.folder(arm, seed))
        return plan

    def train(self, workdir: AnyPath, plan: Mapping[tuple[str, int], ConfigDict]) -> None:
        """Train what is not trained yet."""
        if jax.config.jax_compilation_cache_dir is None:
            # Runs that differ in their seed only share their programs.
            jax.config.update("jax_compilation_cache_dir", str((workdir / "xla").absolute()))
        for run, config in plan.items():
            running.train(config, workdir / self.folder(*run))

    def results(self, workdir: AnyPath, plan: Mapping[tuple[str, int], ConfigDict], guard: PreemptionGuard) -> Results:
        """Measure all of it.

        Raises:
          Preempted: the guard says so, after the measurement of the run at hand.
        """
        measured: dict[str, dict[str, list[Any]]] = {}
        names: list[str] | None = None
        for (arm, seed), config in plan.items():
            values = self.measure(Trained(workdir / self.folder(arm, seed), arm, seed, config))
            if guard.requested():
                raise Preempted(config.train.steps, guard.exit_code)
            names = list(values) if names is None else names
            require(list(values) == names, f"measure: names of arm {arm!r}, seed {seed}", list(values), f"{names}")
            for name, value in values.items():
                measured.setdefault(name, {}).setdefault(arm, []).append(_plain(value))
        return Results(self.arms, tuple(dict.fromkeys(seed for _, seed in plan)), measured)

    def render(self, results: Results) -> str:
        """The results in Markdown: the table, and below it the verdicts.

        Raises:
          ValueError: the results are of other arms, or a claim has not one effect for each seed.
        """
        results.require_arms(self.arms)
        claims = self.claims(results)
        for claim in claims:
            count, expected = len(claim.effects), f"{len(results.seeds)}, one for each seed"
            require(count == len(results.seeds), f"claim {claim.statement!r}: effects", count, expected)
        return f"{self.table(results)}\n\n{claims_table(claims)}"

    def write(self, results: Results, output: pathlib.Path) -> str:
        """Render into `output`: the plot, and the block of its README.md or, where there is none, results.md."""
        text = self.render(results)
        readme = output / "README.md"
        if readme.is_file():
            readme.write_text(replace_block(readme, text))
        else:
            (output / "results.md").write_text(f"{text}\n")
        plots.save(self.plot, results, output / "results.png")
        return text

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Run the card from its command line: train its arms, measure them, store and render the results.

        Args:
          argv: flags; None takes the process's own.
        """
        name = self.home.name
        parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}.card")
        parser.add_argument("--workdir", help=f"folder of the runs; complete runs are kept (default: runs/{name})")
        parser.add_argument("--steps", type=int, help="steps of a run, to try the card quickly (default: the config's)")
        parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds (default: all)")
        parser.add_argument(
            "--output",
            help="folder for results.json, results.png and the text (default: the card's; of a trial, the workdir)",
        )
        parser.add_argument(
            "--write", action="store_true", help="train nothing: render the stored results.json of --output again"
        )
        arguments = parser.parse_args(argv)
        seeds = list(self.seeds) if arguments.seeds is None else sorted(set(arguments.seeds))
        if not set(seeds) <= set(self.seeds):
            parser.error(f"--seeds: {seeds}: expected some of {list(self.seeds)}")
        if arguments.steps is not None and arguments.steps < 1:
            parser.error(f"--steps: {arguments.steps}: expected at least 1")
        # A trial leaves the card's own runs and results alone.
        trial = "" if arguments.steps is None else f"-{arguments.steps}-steps"
        if arguments.workdir and (why := paths.why_no_folder(arguments.workdir)) is not None:
            parser.error(f"--workdir: {arguments.workdir}: {why}")
        workdir = paths.given(arguments.workdir or f"runs/{name}{trial}")
        whole = not trial and arguments.seeds is None
        # Of runs in a bucket too, the results are for this machine.
        here = workdir if paths.is_local(workdir) else pathlib.Path(f"runs/{name}{trial}")
        own = self.home if whole or arguments.write else here / "results"
        if arguments.output is not None and not paths.is_local(arguments.output):
            parser.error(
                f"--output: {arguments.output}: expected a folder of this machine; only runs may be in a bucket"
            )
        output = pathlib.Path(arguments.output or own)
        stored = output / "results.json"
        for flag in ("workdir", "steps", "seeds"):
            if arguments.write and getattr(arguments, flag) is not None:
                parser.error(f"--{flag}: has no meaning with --write, which reads {stored}")
        try:
            if (output / "README.md").is_file():
                replace_block(output / "README.md", "")
            if arguments.write:
                results = Results.load(stored)
                results.require_arms(self.arms)
            else:
                plan = self.plan(workdir, seeds, arguments.steps)
        except ValueError as error:
            parser.error(str(error))
        # As of `maskformer`: what the libraries note of every restore says nothing to a reader.
        logging.getLogger("absl").setLevel(logging.ERROR)
        if not arguments.write:
            with _exit_codes(), PreemptionGuard(ends_process=argv is None) as guard:
                try:
                    self.train(workdir, plan)
                except ValueError as error:
                    _refuse(error)
                results = self.results(workdir, plan, guard)
            output.mkdir(parents=True, exist_ok=True)
            results.save(stored)
        print(self.write(results, output))
        print(f"results: {output}")


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Those of `maskformer train`, with one line on stderr. A `measure` that fails shows its author where."""
    try:
        yield
    except Preempted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(stop.exit_code) from stop
    except RunError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(1) from error
    except CheckpointError as error:
        _refuse(error)


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {printable(str(error))}", file=sys.stderr)
    raise SystemExit(2) from error


def replace_block(readme: pathlib.Path, text: str) -> str:
    """A README with `text` in place of its block of results.

    Raises:
      ValueError: the lines that enclose the block are missing, or there are several.
    """
    whole = readme.read_text()
    before, _, rest = whole.partition(f"{BLOCK_BEGIN}\n")
    _, _, after = rest.partition(f"{BLOCK_END}\n")
    found = whole.count(f"{BLOCK_BEGIN}\n"), whole.count(f"{BLOCK_END}\n")
    if found != (1, 1) or whole.index(BLOCK_BEGIN) > whole.index(BLOCK_END):
        raise ValueError(
            f"{readme}: expected one line {BLOCK_BEGIN!r} and below it one line {BLOCK_END!r}, found {found[0]} and "
            f"{found[1]}; the results go between them"
        )
    return f"{before}{BLOCK_BEGIN}\n{text}\n{BLOCK_END}\n{after}"


def _plain(value: Any) -> Any:
    """A measured value as JSON has it."""
    return [float(point) for point in value] if hasattr(value, "__len__") else float(value)
