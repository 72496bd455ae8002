"""Train a recipe, resuming where its workdir left off."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from maskformer import paths
from maskformer.checks import shown
from maskformer.cli.files import folder
from maskformer.cli.parser import CONFIG_HELP, Parser

if TYPE_CHECKING:
    from maskformer.training.phases import Phases


def add_arguments(parser: Parser) -> None:
    parser.epilog = CONFIG_HELP
    parser.add_argument(
        "--workdir", required=True, type=folder, help="folder of the run; the same command resumes it"
    )
    parser.add_argument(
        "--steal", action="store_true", help="take the workdir over from another training that still has it"
    )
    parser.add_argument("--sweep", metavar="NAME", help="which sweep of the recipe (sweep_NAME)")
    parser.add_argument("--sweep-index", type=int, help="train this run of the sweep, in WORKDIR/INDEX")


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    from maskformer.training.phases import Phases, process_began
    from maskformer.training.preemption import PreemptionGuard

    if arguments.sweep is not None and arguments.sweep_index is None:
        raise ValueError(f"--sweep={shown(arguments.sweep)}: needs --sweep-index, the run of the sweep to train")
    # Before JAX is imported and anything is read: a signal in these seconds asks for a requeue too.
    with PreemptionGuard(ends_process=arguments.owns_process):
        return _train(arguments, config_flags, Phases(process_began() if arguments.owns_process else None))


def _train(arguments: argparse.Namespace, config_flags: Sequence[str], phases: Phases) -> int:
    with phases("imports"):
        from maskformer.training import Preempted, distributed, loop, recipes, resolve, sweeps
        from maskformer.training.workdir import RunError, prepare_workdir

    config, recipe = recipes.load_config(config_flags)
    workdir = paths.given(arguments.workdir)
    if arguments.sweep_index is not None:
        runs = recipes.load_sweep(recipe, arguments.sweep or "sweep")
        if not 0 <= arguments.sweep_index < len(runs):
            raise ValueError(f"--sweep-index={arguments.sweep_index}: expected 0 to {len(runs) - 1}, the sweep's runs")
        config = sweeps.apply(config, runs[arguments.sweep_index])
        workdir = workdir / f"{arguments.sweep_index:03d}"
    resolve(config)
    prepare_workdir(workdir)
    with phases("devices"):
        distributed.initialize()
    try:
        loop.train_and_evaluate(config, workdir, steal=arguments.steal, phases=phases)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    import jax

    if jax.process_index() == 0:
        print(f"checkpoints  {workdir / 'checkpoints'}\nmetrics      {workdir / 'metrics.jsonl'}")
        print(f"curves       maskformer report {workdir}    (or tensorboard --logdir {workdir})")
    return 0
