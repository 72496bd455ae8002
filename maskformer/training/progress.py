"""The progress display of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping

import rich.console
import rich.progress
import rich.table


class Progress:
    """A live bar on a terminal (step, the task's metrics, tokens/s, MFU, time left); plain lines elsewhere.

    The bar takes the room that the numbers leave, and they fit in eighty columns.
    """

    def __init__(self, steps: int, start: int, live: bool):
        # A run's folder may be named `[lr=1]`, or `:x:`: no markup, and no emoji.
        self._console = rich.console.Console(stderr=False, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._live = live and self._console.is_terminal
        self._steps = steps
        # Where the time left is counted from: the first line, as the steps before it hold the compilation.
        self._from: tuple[int, float] | None = None
        if self._live:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(bar_width=None, table_column=rich.table.Column(ratio=1)),
                rich.progress.TextColumn("{task.fields[metrics]}", markup=False),
                rich.progress.TextColumn("eta"),
                rich.progress.TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, metrics="compiling")
            self._bar.start()

    def train(self, step: int, text: str, rates: Mapping[str, float]) -> None:
        """What the task says of a window of training, and how fast it was (see `throughput.Clock`)."""
        if "tokens_per_second" in rates:
            text += f" {rates['tokens_per_second']:,.0f} tok/s"
        if "mfu" in rates:
            text += f" MFU {rates['mfu']:.1%}"
        elif "tflops_per_second" in rates and not self._live:
            text += f" {rates['tflops_per_second']:.3f} TFLOP/s"
        if self._live:
            self._bar.update(self._task, completed=step, metrics=text)
            return
        now = time.monotonic()
        if self._from is None:
            self._from = step, now
        else:
            left = (now - self._from[1]) / (step - self._from[0]) * (self._steps - step)
            text += f"  eta {int(left // 60)}:{int(left % 60):02d}"
        self._console.print(f"step {step}/{self._steps}  {text}")

    def line(self, text: str) -> None:
        """One line above the bar."""
        (self._bar.console if self._live else self._console).print(text)

    def close(self) -> None:
        if self._live:
            self._bar.stop()
