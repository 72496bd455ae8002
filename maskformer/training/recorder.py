"""What a run says of itself while it trains: metrics to files, progress to the terminal, and an alarm at NaN."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax

from maskformer.paths import AnyPath
from maskformer.training.checkpoints import Checkpoints, RunRecord, SaveError
from maskformer.training.phases import Phases
from maskformer.training.program import Placed
from maskformer.training.progress import Progress
from maskformer.training.state import NEVER, TrainState, Window
from maskformer.training.throughput import Clock
from maskformer.training.workdir import RunError
from maskformer.training.writers import Writer, create_writers


class NonFiniteError(RunError):
    """A watched metric became NaN or infinite; nothing after it was saved."""


class Recorder:
    """Writers, progress display and clock of one process, and the window of metrics that is on its way to the host.

    Every process has one, since every process counts and watches; only the leader's writes and prints.

    Args:
      placed: what runs.
      workdir: folder of the run.
      config: the run's config, for writers that keep it.
      record: of the run; counts of tokens are added to it.
      checkpoints: to name the last good one.
      phases: to say what this host waited for.
      start: the step that the run goes on from.
      leader: whether this process writes.
    """

    def __init__(
        self,
        placed: Placed,
        workdir: AnyPath,
        config: Mapping[str, Any],
        record: RunRecord,
        checkpoints: Checkpoints,
        phases: Phases,
        start: int,
        leader: bool,
    ):
        program, experiment = placed.program, placed.program.experiment
        self._task, self._record, self._checkpoints, self._phases = program.task, record, checkpoints, phases
        self._evaluation_task = placed.evaluation()[0] if experiment.evaluation.every else program.task
        self._split = experiment.evaluation.split
        self._flops_per_token = program.task.flops_per_token
        self._clock = Clock(self._flops_per_token, list(placed.mesh.devices.flat))
        again = f"{self._split}/" if record.evaluation_due else None
        self._writers: list[Writer] = (
            create_writers(workdir, experiment.writers, config, start, again) if leader else []
        )
        self._progress = Progress(experiment.train.steps, start, experiment.writers.progress) if leader else None
        self._pending: tuple[int, Window, dict[str, float]] | None = None
        self.line(
            f"{program.model.num_params():,} parameters, {len(program.dataset('train')):,} rows of "
            f"{experiment.data.length} tokens, {placed.mesh.size} {placed.mesh.devices.flat[0].device_kind} device(s), "
            f"from step {start} of {experiment.train.steps} in {workdir}"
        )
        if (schedule := placed.describe_pipeline()) is not None:
            self.line(f"pipeline: {schedule}")

    def line(self, text: str) -> None:
        """One line above the progress bar."""
        if self._progress is not None:
            self._progress.line(text)

    def window(self, step: int, window: Window) -> None:
        """Take the sums since the last window; they are copied to the host while training goes on."""
        self.settle()
        jax.tree.map(lambda array: array.copy_to_host_async(), window)
        self._pending = step, window, self._phases.window_times(step)

    def settle(self, *, wait: bool = True) -> None:
        """Write the line of the window that was taken; without `wait`, only if it has arrived.

        Raises:
          NonFiniteError: see `check`.
        """
        for note in self._phases.notes():
            self.line(note)
        if self._pending is None:
            return
        step, window, waits = self._pending
        if not wait and not all(leaf.is_ready() for leaf in jax.tree.leaves(window)):
            return
        self._pending = None
        host = self.check(window)
        tokens = host.count("tokens")
        self._record.tokens += tokens
        self._record.predicted += host.count("predicted")
        metrics = host.means() | {
            "learning_rate": float(host.learning_rate),
            "tokens_seen": self._record.tokens,
            "tokens_predicted": self._record.predicted,
            "flops": self._record.tokens * self._flops_per_token,
        }
        rates = self._clock.rates(tokens)
        self._write(step, "train", metrics | rates | waits)
        if self._progress is not None:
            self._progress.train(step, self._task.describe(metrics), rates)

    def evaluation(self, step: int, results: Mapping[str, float], improved: bool) -> None:
        """Write an evaluation, and say whether it is the best so far."""
        self._write(step, self._split, results)
        best = ", best so far" if improved else ""
        self.line(f"{self._split} at step {step}: {self._evaluation_task.describe(results)}{best}")

    def check(self, window: Window) -> Window:
        """The window on the host, if everything in it is a number.

        Raises:
          NonFiniteError: names the metric that was NaN or infinite, its first step, and the last good checkpoint.
        """
        with self._phases.waiting():
            host = jax.device_get(window)
        step, name = min((int(step), name) for name, step in host.nonfinite.items())
        if step < NEVER:
            with contextlib.suppress(SaveError):
                self._checkpoints.wait()  # the newest may be on its way
            good = self._checkpoints.latest_step()
            raise NonFiniteError(
                f"train/{name} is NaN or infinite at step {step}; the last good checkpoint is "
                f"{'none' if good is None else self._checkpoints.directory / str(good)}; lower "
                "optimizer.learning_rate or optimizer.clip_norm, or lengthen optimizer.warmup_steps"
            )
        return host

    def flush(self) -> None:
        """Everything that was written is on disk."""
        for writer in self._writers:
            writer.flush()

    def pause(self, state: TrainState) -> None:
        """Training stops here for something else, when the steps up to `state` are done."""
        with self._phases.waiting():
            jax.block_until_ready(state)
        self._clock.pause()

    def resume(self) -> None:
        """Training goes on: what was done since `pause` does not count as its time."""
        self._clock.resume()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        for writer in self._writers:
            writer.close()

    def _write(self, step: int, prefix: str, metrics: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, {f"{prefix}/{name}": value for name, value in metrics.items()})
