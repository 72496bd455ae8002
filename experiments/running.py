"""The runs of a card: trained once each, in folders of their own, without noise."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from maskformer import paths
from maskformer.checks import require
from maskformer.paths import AnyPath
from maskformer.training import train_and_evaluate
from maskformer.training.checkpoints import checkpoint_steps
from maskformer.training.experiment import plain
from maskformer.training.workdir import CONFIG, read_config

# What a run may not have been begun with otherwise: half of it at another learning rate is another run.
FIXED_SECTIONS = ("train", "optimizer", "task")


def quiet(config: ConfigDict) -> ConfigDict:
    """The config without progress lines and TensorBoard, keeping the latest checkpoint and the best only."""
    config = copy.deepcopy(config)
    config.writers.progress = config.writers.tensorboard = False
    config.checkpoint.keep = 1
    return config


def shortened(config: ConfigDict, steps: int) -> ConfigDict:
    """The config for a run of `steps` steps that is evaluated and saved at least once."""
    config = copy.deepcopy(config)
    config.train.steps, config.optimizer.warmup_steps = steps, max(steps // 10, 1)
    for section in (config.evaluation, config.checkpoint):
        section.every = min(section.every, steps)
    return config


def train(config: ConfigDict, folder: AnyPath) -> None:
    """Train a run in its folder, or resume it; a complete run is not repeated.

    Raises:
      ValueError: the folder holds checkpoints of a run of another length, optimizer or task; or its record is damaged.
    """
    if is_complete(config, folder):
        print(f"== {folder}: complete", flush=True)
        return
    refuse_another(config, folder)
    print(f"== {folder}", flush=True)
    train_and_evaluate(config, folder)


def is_complete(config: ConfigDict, folder: AnyPath) -> bool:
    """Whether `folder` holds the last checkpoint of this very run.

    Keys that its record lacks are younger than the run, which had what is their default now.
    """
    record, steps = _record(folder), checkpoint_steps(folder / "checkpoints")
    if record is None or not steps or steps[-1] != config.train.steps:
        return False
    ours = _stored(config)
    # What a task is given, it was given when there was that task.
    return _agrees(record, ours) and record["task"] == ours["task"]


def refuse_another(config: ConfigDict, folder: AnyPath) -> None:
    """Raise if resuming in `folder` would go on from a run of another length, optimizer or task.

    Such a change is allowed when one resumes by hand. Between the arms of a card it would be in the results, unseen.

    Raises:
      ValueError: names the folder and the first key that differs, or what is wrong with its record.
    """
    record, ours = _record(folder), _stored(config)
    if record is None or not checkpoint_steps(folder / "checkpoints"):
        return
    for section in FIXED_SECTIONS:
        before = record[section]
        for key in [*before, *(sorted(ours[section].keys() - before.keys()) if section == "task" else ())]:
            value, now = before.get(key), ours[section].get(key)
            if not _agrees(value, now):
                raise ValueError(
                    f"{folder}: holds a run with {section}.{key}={value!r}, and the card's has {now!r}; "
                    "choose another --workdir, or delete this folder"
                )


def _record(folder: AnyPath) -> dict[str, Any] | None:
    if not paths.lexists(folder / CONFIG):
        return None
    record = {"task": {}, **read_config(folder, sections=("train", "optimizer"))}
    require(isinstance(record["task"], Mapping), f"{folder / CONFIG}: task", record["task"], "a section")
    return _with_task(record)


def _stored(config: ConfigDict) -> dict[str, Any]:
    return _with_task(json.loads(json.dumps(plain(config))))


def _with_task(config: dict[str, Any]) -> dict[str, Any]:
    # A run from before there were tasks has the objective's own, as has one that names none.
    return {**config, "task": {key: value for key, value in config.get("task", {}).items() if value is not None}}


def _agrees(record: Any, ours: Any) -> bool:
    if isinstance(record, Mapping) and isinstance(ours, Mapping):
        return all(key in ours and _agrees(value, ours[key]) for key, value in record.items())
    return record == ours
