"""Where a run's numbers go: `metrics.jsonl` always, TensorBoard and Weights & Biases by config."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from maskformer.checks import shown
from maskformer.paths import AnyPath
from maskformer.training import lines
from maskformer.training.sections import WriterConfig
from maskformer.training.workdir import METRICS, cannot_write, read_metrics, reason, replace_text

# Fields of a line that say how fast the machine was, not what the model learnt: they differ between equal runs.
TIMING_FIELDS = ("seconds", "tokens_per_second", "tflops_per_second", "mfu")
# Between two times that a display of TensorBoard's sees what is new.
TENSORBOARD_SECONDS = 20.0


class Writer(Protocol):
    """Takes one line of metrics at a step; names carry their split, such as `train/loss`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object a line. A resumed run first drops the lines after its checkpoint, and writes them anew.

    Raises:
      RunError: the file cannot be written, here and in its methods.
    """

    def __init__(self, path: AnyPath, resume_step: int):
        self._path = path
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if lines.exists(path) else []
        with _writing(path):
            lines.rewrite(path, kept)
            self._file = lines.LineFile(path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with _writing(self._path):
            self._file.write({"step": step, **metrics})

    def flush(self) -> None:
        with _writing(self._path):
            self._file.flush()

    def close(self) -> None:
        with _writing(self._path):
            self._file.close()


class TensorBoardWriter:
    """TensorBoard events without TensorFlow; steps after the resumed one are purged from the display.

    Written by the caller's thread: tensorboardX's own one dies at a full disk, and the next lines would wait for it
    for ever.

    Raises:
      RunError: the file cannot be written, here and in its methods.
    """

    def __init__(self, directory: AnyPath, resume_step: int):
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        self._path, self._event, self._scalar = directory, event_pb2.Event, scalar
        with _writing(directory):
            # A run may be started twice within the second that the name holds.
            self._file = event_file_writer.EventsWriter(str(directory / "events"), f".{uuid.uuid4().hex[:8]}")
            # A fresh run too: one that was killed before its first checkpoint may have left its first points.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._file.write_event(self._event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self.flush()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with _writing(self._path):
            for name, value in metrics.items():
                summary = self._scalar(name, value)
                self._file.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        # A flush waits for the disk, too long for every line.
        if time.monotonic() - self._flushed > TENSORBOARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        with _writing(self._path):
            self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with _writing(self._path):
            self._file.close()


class WandbWriter:
    """Weights & Biases; the run id is kept in the workdir, so that a resumed run continues its curves."""

    def __init__(self, workdir: AnyPath, project: str, config: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(
            project=project, id=wandb_id(workdir), resume="allow", dir=str(workdir), config=dict(config)
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def flush(self) -> None:
        """Weights & Biases sends on its own."""

    def close(self) -> None:
        self._run.finish()


def wandb_id(workdir: AnyPath) -> str:
    """The id of a run at Weights & Biases, made up at its first start.

    Raises:
      ValueError: the file that keeps it is damaged.
    """
    path = workdir / "wandb_id"
    if not os.path.lexists(path):
        replace_text(path, uuid.uuid4().hex)
    try:
        text = path.read_bytes().decode("ascii").strip()
    except (OSError, ValueError) as error:
        text = reason(error)
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
        raise ValueError(
            f"{path}: expected the id of a Weights & Biases run, got {shown(text)}; write the id there that its page "
            "shows, or delete the file to begin new curves"
        )
    return text


def check_writers(config: WriterConfig) -> None:
    """Raise the one-line `ValueError` of a writer whose library is not installed."""
    if config.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"writers.wandb_project={shown(config.wandb_project)}: wandb is not installed; "
            "pip install 'maskformer[wandb]', or set it to None"
        )


def create_writers(
    workdir: AnyPath, config: WriterConfig, run_config: Mapping[str, Any], resume_step: int
) -> list[Writer]:
    """The writers that `config` asks for; call on one process only."""
    writers: list[Writer] = [JsonlWriter(workdir / METRICS, resume_step)]
    if config.tensorboard:
        writers.append(TensorBoardWriter(workdir, resume_step))
    if config.wandb_project is not None:
        writers.append(WandbWriter(workdir, config.wandb_project, run_config))
    return writers


@contextlib.contextmanager
def _writing(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
