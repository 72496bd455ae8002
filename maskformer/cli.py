"""The command line: `maskformer train | evaluate | fill | check | mask-report | mask | config | sweep | report`."""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence

# The exit codes a launcher sees. A usage error is 2, as in argparse; 75 (EX_TEMPFAIL) asks to be run again.
EX_USAGE = 2

CONFIG_HELP = "--config=RECIPE.py[:ARG] and --config.KEY=VALUE change any key; `maskformer config` prints them all"


def train(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """Train a recipe, resuming where its workdir left off."""
    from maskformer.training import EX_TEMPFAIL, NonFiniteError, Preempted, distributed, loop, recipes, resolve, sweeps

    config, recipe = recipes.load_config(config_flags)
    workdir = pathlib.Path(arguments.workdir)
    if arguments.sweep_index is not None:
        runs = recipes.load_sweep(recipe, arguments.sweep)
        if not 0 <= arguments.sweep_index < len(runs):
            raise ValueError(f"--sweep-index={arguments.sweep_index}: expected 0 to {len(runs) - 1}, the sweep's runs")
        config = sweeps.apply(config, runs[arguments.sweep_index])
        workdir = workdir / f"{arguments.sweep_index:03d}"
    resolve(config)
    loop.prepare_workdir(workdir)
    distributed.initialize()
    try:
        loop.train_and_evaluate(config, workdir)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return EX_TEMPFAIL
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    import jax

    if jax.process_index() == 0:
        print(f"checkpoints  {workdir / 'checkpoints'}\nmetrics      {workdir / 'metrics.jsonl'}")
        print(f"curves       maskformer report {workdir}    (or tensorboard --logdir {workdir})")
    return 0


def evaluate(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """Evaluate a run's best checkpoint on a split, with the masks of the run's own evaluations."""
    from maskformer.training import distributed, runs

    distributed.initialize()
    run = runs.load(arguments.workdir, overrides=config_flags, checkpoint=arguments.checkpoint)
    results = run.evaluate(arguments.split)
    print(json.dumps({"workdir": arguments.workdir, "step": run.step, "split": arguments.split, **results}, indent=2))
    return 0


def fill(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """Predict the [MASK] tokens of a text, or of sentences from the test split."""
    from maskformer.training import runs

    _no_flags(config_flags)
    run = runs.load(arguments.workdir, checkpoint=arguments.checkpoint)
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

    _no_flags(config_flags)
    print(
        masks.picture(
            arguments.expression,
            arguments.length,
            kv_length=arguments.kv_length,
            block=arguments.blocks,
            path=arguments.png,
        )
    )
    return 0


def report(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    """Compare runs: a table of their last evaluations and their curves as a PNG."""
    from maskformer import report as reports

    _no_flags(config_flags)
    print(reports.table(arguments.workdirs))
    output = arguments.output or str(pathlib.Path(arguments.workdirs[0]) / "report.png")
    reports.draw_curves(arguments.workdirs, output)
    print(f"curves: {output}")
    return 0


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="maskformer", description=__doc__.partition("\n")[0])
    parser.add_argument("--verbose", action="store_true", help="show the libraries' own log lines too")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(function: Callable[..., int], epilog: str | None = None) -> argparse.ArgumentParser:
        summary = (function.__doc__ or "").partition("\n")[0]
        name = function.__name__.replace("_", "-")
        command = commands.add_parser(name, help=summary, description=summary, epilog=epilog)
        command.set_defaults(run=function)
        return command

    command = add(train, CONFIG_HELP)
    command.add_argument("--workdir", required=True, help="folder of the run; the same command resumes it")
    command.add_argument("--sweep", default="sweep", metavar="NAME", help="which sweep of the recipe (sweep_NAME)")
    command.add_argument("--sweep-index", type=int, help="train this run of the sweep, in WORKDIR/INDEX")

    command = add(evaluate, "--config.evaluation.KEY=VALUE changes how it is evaluated")
    command.add_argument("--workdir", required=True)
    command.add_argument("--split", default="test")
    command.add_argument("--checkpoint", default="best", choices=("best", "latest"))

    command = add(fill)
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

    command = add(mask)
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
    arguments, rest = create_parser().parse_known_args(argv)
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


def _no_flags(rest: Sequence[str]) -> None:
    if rest:
        raise ValueError(f"argument {rest[0]!r}: this command has no such flag; see maskformer COMMAND --help")


def _print_fill(run, text: str, top: int) -> None:  # type: ignore[no-untyped-def]
    print(text)
    for number, guesses in enumerate(run.fill(text, top), start=1):
        shown = "   ".join(f"{guess.token} {guess.probability:.1%}" for guess in guesses)
        print(f"  [MASK] {number}: {shown}")


if __name__ == "__main__":
    sys.exit(main())
