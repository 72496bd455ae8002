"""List the runs of a recipe's sweep, or run them one after another, each in its own process."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from maskformer.cli.files import folder
from maskformer.cli.parser import CONFIG_HELP, Parser
from maskformer.training.preemption import EX_INTERRUPTED, EX_TEMPFAIL


def add_arguments(parser: Parser) -> None:
    parser.epilog = CONFIG_HELP
    parser.add_argument("--workdir", default="runs/sweep", type=folder)
    parser.add_argument("--sweep", default="sweep", metavar="NAME", help="which sweep of the recipe (sweep_NAME)")
    parser.add_argument("--list", action="store_true", help="list and check the runs only")


def run(arguments: argparse.Namespace, config_flags: Sequence[str]) -> int:
    from maskformer.training import recipes, resolve, sweeps

    values, recipe = recipes.load_config(config_flags)
    runs = recipes.load_sweep(recipe, arguments.sweep)
    for overrides in runs:
        resolve(sweeps.apply(values, overrides))
    for index, overrides in enumerate(runs):
        print(f"{index:03d}  " + "  ".join(f"{key}={value}" for key, value in overrides.items()), flush=True)
        if not arguments.list:
            command = [sys.executable, "-m", "maskformer.cli", "train", *config_flags, f"--workdir={arguments.workdir}"]
            code = _train([*command, f"--sweep={arguments.sweep}", f"--sweep-index={index}"])
            if code:
                return code
    return 0


def _train(command: Sequence[str]) -> int:
    """Run one training to its end, also when this process is told to stop, and return the code to end with, or 0.

    SIGTERM and SIGINT both reach the training as SIGTERM, after which it saves: a Ctrl-C of a terminal has reached it
    already, and a second SIGINT means not to save.
    """
    heard: list[int] = []
    training: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if training is not None:
            training.terminate()

    # Only the main thread may set a handler.
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        training = subprocess.Popen(command)
        if heard:  # before there was one
            training.terminate()
        code = training.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    stopped = (0, EX_TEMPFAIL, EX_INTERRUPTED, -signal.SIGTERM, -signal.SIGINT)
    if heard and code in stopped:
        return EX_INTERRUPTED if signal.SIGINT in heard else EX_TEMPFAIL
    return 128 - code if code < 0 else code
