"""Where a run's numbers go: `metrics.jsonl` always, TensorBoard and Weights & Biases by config."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from maskformer.training.sections import WriterConfig

logger = logging.getLogger(__name__)

# Fields of a line that say how fast the machine was, not what the model learnt: they differ between equal runs.
TIMING_FIELDS = ("seconds", "tokens_per_second", "tflops_per_second", "mfu")


class Writer(Protocol):
    """Takes one line of metrics at a step; names carry their split, such as `train/loss`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object a line. A resumed run first drops the lines after its checkpoint, and writes them anew."""

    def __init__(self, path: pathlib.Path, resume_step: int):
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
        self._file = path.open("a")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """TensorBoard events without TensorFlow; steps after the resumed one are purged from the display."""

    def __init__(self, directory: pathlib.Path, resume_step: int):
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Weights & Biases; the run id is kept in the workdir, so that a resumed run continues its curves."""

    def __init__(self, workdir: pathlib.Path, project: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"writers.wandb_project={project!r}: wandb is not installed; pip install 'maskformer[wandb]'"
            ) from error
        id_file = workdir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=project, id=id_file.read_text(), resume="allow", dir=str(workdir), config=dict(config)
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def flush(self) -> None:
        """Weights & Biases sends on its own."""

    def close(self) -> None:
        self._run.finish()


def create_writers(
    workdir: pathlib.Path, config: WriterConfig, run_config: Mapping[str, Any], resume_step: int
) -> list[Writer]:
    """The writers that `config` asks for; call on one process only."""
    writers: list[Writer] = [JsonlWriter(workdir / "metrics.jsonl", resume_step)]
    if config.tensorboard:
        writers.append(TensorBoardWriter(workdir, resume_step))
    if config.wandb_project is not None:
        writers.append(WandbWriter(workdir, config.wandb_project, run_config))
    return writers


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
