"""The command line: `maskformer train | evaluate | fill | check | mask-report | mask | config | sweep | report`."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

# The exit codes a launcher sees. A usage error is 2, as in argparse; 75 (EX_TEMPFAIL) asks to be run again.
EX_USAGE = 2

CONFIG_HELP = "--config=RECIPE.py[:ARG] and --config.KEY=VALUE change any key; `maskformer config` prints them all"


def train(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """Train a recipe, resuming where its workdir left off."""
    from maskformer.training import EX_TEMPFAIL, Preempted, distributed, loop, recipes, resolve, sweeps
    from maskformer.training.workdir import RunError, prepare_workdir

    config, recipe = recipes.load_config(config_flags)
    if arguments.sweep_index is not None:
        runs = recipes.load_sweep(recipe, arguments.sweep)
        if not 0 <= arguments.sweep_index < len(runs):
            raise ValueError(f"--sweep-index={arguments.sweep_index}: expected 0 to {len(runs) - 1}, the sweep's runs")
        config = sweeps.apply(config, runs[arguments.sweep_index])
    resolve(config)
    # As it was written: a Path would turn the empty string into the current directory.
    prepare_workdir(arguments.workdir)
    workdir = pathlib.Path(arguments.workdir)
    if arguments.sweep_index is not None:
        workdir = workdir / f"{arguments.sweep_index:03d}"
    distributed.initialize()
    try:
        loop.train_and_evaluate(config, workdir)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return EX_TEMPFAIL
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    import jax

    if jax.process_index() == 0:
        print(f"checkpoints  {workdir / 'checkpoints'}\nmetrics      {workdir / 'metrics.jsonl'}")
        print(f"curves       maskformer report {workdir}    (or tensorboard --logdir {workdir})")
    return 0


def evaluate(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """Evaluate runs on a split: one run as JSON, several runs or rates as a table."""
    from maskformer.training import comparison, distributed

    columns = _evaluation_columns(arguments)
    distributed.initialize()
    compared = comparison.compare(
        arguments.workdir, columns, arguments.split, overrides=config_flags, checkpoint=arguments.checkpoint
    )
    if len(arguments.workdir) > 1 or arguments.rates:
        print(compared.table())
        results: dict[str, Any] = compared.to_dict()
    else:
        (run,) = compared.to_dict()["runs"]
        cells = run.pop("results")
        # One measure's results stand beside the run; several keep their names, which they share in part.
        results = {**run, "split": arguments.split, **(cells if len(cells) > 1 else next(iter(cells.values())))}
        print(json.dumps(results, indent=2))
        if run["rows"] < run["split_rows"]:
            print(
                f"{run['rows']:,} of {run['split_rows']:,} rows: evaluation.max_batches (None for all)", file=sys.stderr
            )
        for column, cell in compared.cells[run["workdir"]].items():
            said = cell if isinstance(cell, str) else comparison.summary(cell)
            print(comparison.named(column, said), file=sys.stderr)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


METRICS = ("loss", "nll", "nll_bound", "pseudo_perplexity")


def _evaluation_columns(arguments: argparse.Namespace) -> dict[str, Any]:
    """What to do with each run, by name; every flag is used or refused."""
    from maskformer.training import comparison

    metrics = list(dict.fromkeys(arguments.metric))
    split = arguments.split
    options: dict[str, dict[str, Any]] = {metric: {} for metric in METRICS}
    for flag, value, metric, option in (
        ("--samples", arguments.samples, "nll_bound", "samples"),
        ("--estimator", arguments.estimator, "nll_bound", "estimator"),
        ("--every", arguments.every, "pseudo_perplexity", "every"),
        ("--within-word-l2r", arguments.within_word_l2r or None, "pseudo_perplexity", "within_word_l2r"),
        ("--objective", arguments.objective, "loss", "objective"),
        ("--rates", arguments.rates, "loss", "rates"),
    ):
        if value is None:
            continue
        if metric not in metrics:
            raise ValueError(f"{flag}: belongs to --metric={metric}, and only {', '.join(metrics)} is asked for")
        options[metric][option] = value
    objective = {} if arguments.objective is None else {"name": arguments.objective}
    columns: dict[str, Any] = {}
    if "loss" in metrics and arguments.rates:
        columns |= comparison.rate_columns(arguments.rates, split, objective)
    elif "loss" in metrics:
        columns[arguments.objective or "loss"] = lambda run: run.evaluate(split, objective)
    if "nll" in metrics:
        columns["nll"] = lambda run: run.nll(split)
    if "nll_bound" in metrics:
        columns["nll_bound"] = lambda run: run.nll_bound(split, **options["nll_bound"])
    if "pseudo_perplexity" in metrics:
        columns["pseudo_perplexity"] = lambda run: run.pseudo_perplexity(split, **options["pseudo_perplexity"])
    return columns


def fill(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """Predict the [MASK] tokens of a text, or of sentences from the test split."""
    from maskformer.training import runs

    run = runs.load(arguments.workdir, overrides=config_flags, checkpoint=arguments.checkpoint)
    texts = arguments.text or run.example_texts(arguments.examples)
    for text in texts:
        _print_fill(run, text, arguments.top)
    return 0


def config(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """Print the config as it would run, checked."""
    from maskformer.training import recipes, resolve
    from maskformer.training.config import plain

    values, _ = recipes.load_config(config_flags)
    resolve(values)
    print(json.dumps(plain(values), indent=2))
    return 0


def sweep(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """List the runs of a recipe's sweep, or run them one after another, each in its own process."""
    import subprocess

    from maskformer.training import recipes, resolve, sweeps

    values, recipe = recipes.load_config(config_flags)
    runs = recipes.load_sweep(recipe, arguments.sweep)
    for overrides in runs:
        resolve(sweeps.apply(values, overrides))
    for index, overrides in enumerate(runs):
        print(f"{index:03d}  " + "  ".join(f"{key}={value}" for key, value in overrides.items()), flush=True)
        if not arguments.list:
            command = [sys.executable, "-m", "maskformer.cli", "train", *config_flags, f"--workdir={arguments.workdir}"]
            code = subprocess.call([*command, f"--sweep={arguments.sweep}", f"--sweep-index={index}"])
            if code:
                return code
    return 0


def check(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """Prove on real rows and random weights that no prediction sees its own answer; exit code 1 where one does."""
    from maskformer import objectives
    from maskformer.training import runs

    setup = runs.prepare(config_flags)
    batch = setup.first_batch(arguments.rows)
    report = objectives.check_leaks(setup.objective, batch, model=setup.model, rows=arguments.rows, step=0)
    print(report)
    return 0 if report.ok else 1


def mask_report(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """Count on real batches, before training, what the objective will hide and predict."""
    from maskformer import objectives
    from maskformer.training import runs

    setup = runs.prepare(config_flags)
    report = objectives.mask_report(
        setup.objective,
        (setup.first_batch(setup.experiment.train.batch_size, number) for number in range(arguments.batches)),
        key=setup.objective_key,
        decode=setup.tokenizer.token,
        model=setup.model,
        step=arguments.step,
    )
    print(report.to_text(color=sys.stdout.isatty()))
    if arguments.html:
        pathlib.Path(arguments.html).write_text(report.to_html(), encoding="utf-8")
        print(f"page: {arguments.html}")
    return 0


def mask(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """Draw a mask as text, and as a PNG if asked."""
    from maskformer import masks

    has_recipe = any(flag.startswith("--config") for flag in config_flags)
    if has_recipe:
        from maskformer.training import recipes

        # A recipe registers the masks of its own when it is read.
        recipes.load_config(config_flags)
    else:
        _no_flags(config_flags)
    try:
        picture = masks.picture(
            arguments.expression,
            arguments.length,
            kv_length=arguments.kv_length,
            block=arguments.blocks,
            path=arguments.png,
        )
    except ValueError as error:
        if "unknown mask" in str(error) and not has_recipe:
            raise ValueError(f"{error}; a mask that a recipe registers needs --config=RECIPE.py") from error
        raise
    print(picture)
    return 0


def report(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """Compare runs: a table of their last evaluations and their curves as a PNG."""
    from maskformer import report as reports

    _no_flags(config_flags)
    print(reports.table(arguments.workdirs))
    output = arguments.output or str(pathlib.Path(arguments.workdirs[0]) / "report.png")
    reports.draw_curves(arguments.workdirs, output)
    print(f"curves: {reports.printable(output)}")
    return 0


class UsageError(ValueError):
    """The command line makes no sense; the parser that says so knows the flags that there are."""

    def __init__(self, message: str, parser: Parser):
        super().__init__(message)
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """As argparse has it, but a mistake is an exception of one line that names what was probably meant."""

    def __init__(self, *arguments: Any, **options: Any):
        self.flags: list[str] = []
        super().__init__(*arguments, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        self.flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[-1] if action.option_strings else action.dest
            raise UsageError(f"{name} {value!r}: expected one of {_choices(value, action.choices)}", self)


def _choices(value: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), list(known), n=1)
    return ", ".join(known) + (f"; did you mean {close[0]!r}?" if close else "")


def create_parser() -> Parser:
    parser = Parser(prog="maskformer", description=__doc__.partition("\n")[0])
    parser.add_argument("--verbose", action="store_true", help="show the libraries' own log lines too")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(function: Callable[..., int], epilog: str | None = None) -> Parser:
        summary = (function.__doc__ or "").partition("\n")[0]
        name = function.__name__.replace("_", "-")
        command = commands.add_parser(name, help=summary, description=summary, epilog=epilog)
        command.set_defaults(run=function, parser=command)
        return command

    command = add(train, CONFIG_HELP)
    command.add_argument("--workdir", required=True, help="folder of the run; the same command resumes it")
    command.add_argument("--sweep", default="sweep", metavar="NAME", help="which sweep of the recipe (sweep_NAME)")
    command.add_argument("--sweep-index", type=int, help="train this run of the sweep, in WORKDIR/INDEX")

    registers = "--config=RECIPE.py makes the masks known that the run's recipe registers"
    command = add(evaluate, f"--config.evaluation.KEY=VALUE changes how it is evaluated; {registers}")
    command.add_argument("--workdir", required=True, nargs="+", help="folder of a run; several make a table")
    command.add_argument("--split", default="test")
    command.add_argument("--checkpoint", default="best", choices=("best", "latest"))
    command.add_argument(
        "--metric",
        nargs="+",
        default=["loss"],
        choices=METRICS,
        help="loss: the objective's own, and accuracies; nll: exact, with bits per byte; nll_bound: the diffusion "
        "bound; pseudo_perplexity: every token from all others",
    )
    command.add_argument("--objective", metavar="NAME", help="evaluate under this objective (default: the run's own)")
    command.add_argument("--rates", nargs="+", type=float, metavar="RATE", help="evaluate at each corruption rate")
    command.add_argument("--samples", type=int, help="nll_bound: maskings of each row, an even number (default 8)")
    command.add_argument("--estimator", choices=("count", "time"), help="nll_bound: what is drawn (default count)")
    command.add_argument("--every", type=int, metavar="K", help="pseudo_perplexity: score every K-th token")
    command.add_argument(
        "--within-word-l2r", action="store_true", help="pseudo_perplexity: hide later pieces of the word too"
    )
    command.add_argument("--json", metavar="FILE", help="write the results to a file too")

    command = add(fill, registers)
    command.add_argument("text", nargs="*", help="text with [MASK] in it; default: masked sentences of the test split")
    command.add_argument("--workdir", required=True)
    command.add_argument("--checkpoint", default="best", choices=("best", "latest"))
    command.add_argument("--top", type=int, default=5, help="predictions to show for each [MASK]")
    command.add_argument("--examples", type=int, default=5, help="sentences of the test split when no text is given")

    add(config, CONFIG_HELP)

    command = add(sweep, CONFIG_HELP)
    command.add_argument("--workdir", default="runs/sweep")
    command.add_argument("--sweep", default="sweep", metavar="NAME", help="which sweep of the recipe (sweep_NAME)")
    command.add_argument("--list", action="store_true", help="list and check the runs only")

    command = add(check, CONFIG_HELP)
    command.add_argument("--rows", type=int, default=2, help="rows to look at; each costs a forward pass per token")

    command = add(mask_report, CONFIG_HELP)
    command.add_argument("--batches", type=int, default=8, help="training batches to count over")
    command.add_argument("--step", type=int, default=0, help="training step, for rates that follow a schedule")
    command.add_argument("--html", metavar="FILE", help="write the report as an HTML page too")

    command = add(mask, "--config=RECIPE.py makes the masks known that the recipe registers")
    command.add_argument("expression", help="such as 'causal & window(8)'")
    command.add_argument("--length", type=int, default=32, help="query length (and key length)")
    command.add_argument("--kv-length", type=int, help="key length, when it differs")
    command.add_argument("--blocks", type=int, help="show the block map for tiles of this size")
    command.add_argument("--png", help="write a picture too")

    command = add(report)
    command.add_argument("workdirs", nargs="+")
    command.add_argument("--output", help="PNG file (default: report.png in the first workdir)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a usage error is one line on stderr and exit code 2."""
    try:
        arguments, rest = create_parser().parse_known_args(argv)
        for flag in rest:
            if not flag.startswith(("--config=", "--config.")):
                raise UsageError(f"argument {flag!r}: no such flag here", arguments.parser)
    except UsageError as error:
        print(f"error: {error}{_hint(error.parser, sys.argv[1:] if argv is None else argv)}", file=sys.stderr)
        return EX_USAGE
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    if not arguments.verbose:
        logging.getLogger("absl").setLevel(logging.ERROR)
    from maskformer.training.checkpoints import CheckpointError
    from maskformer.training.distributed import JoinError

    try:
        return arguments.run(arguments, rest)
    except (ValueError, CheckpointError, JoinError) as error:
        if arguments.verbose:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EX_USAGE


def _hint(parser: Parser, argv: Sequence[str]) -> str:
    """The flag that was probably meant by one that the parser does not know."""
    for flag in (argument.partition("=")[0] for argument in argv if argument.startswith("--")):
        close = difflib.get_close_matches(flag, parser.flags, n=1)
        if flag not in parser.flags and not flag.startswith("--config") and close:
            return f"; instead of {flag}, did you mean {close[0]}?"
    return "" if parser.prog == "maskformer" else f"; see {parser.prog} --help"


def _no_flags(rest: Sequence[str]) -> None:
    if rest:
        raise ValueError(f"argument {rest[0]!r}: this command reads no recipe")


def _print_fill(run, text: str, top: int) -> None:  # type: ignore[no-untyped-def]
    print(text)
    for number, guesses in enumerate(run.fill(text, top), start=1):
        shown = "   ".join(f"{guess.token} {guess.probability:.1%}" for guess in guesses)
        print(f"  [MASK] {number}: {shown}")


if __name__ == "__main__":
    sys.exit(main())
