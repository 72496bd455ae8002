"""The runs of a card: trained once each, in folders of their own, without noise."""

from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from maskformer.training import train_and_evaluate
from maskformer.training.checkpoints import checkpoint_steps
from maskformer.training.config import plain

# What a run may not have been begun with otherwise: half of it at another learning rate is another run.
FIXED_SECTIONS = ("train", "optimizer")


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


def train(config: ConfigDict, folder: pathlib.Path) -> None:
    """Train a run in its folder, or resume it; a complete run is not repeated.

    Raises:
      ValueError: the folder holds checkpoints of a run of another length or another optimizer.
    """
    if is_complete(config, folder):
        print(f"== {folder}: complete", flush=True)
        return
    refuse_another(config, folder)
    print(f"== {folder}", flush=True)
    train_and_evaluate(config, folder)


def is_complete(config: ConfigDict, folder: pathlib.Path) -> bool:
    """Whether `folder` holds the last checkpoint of this very run.

    Keys that its record lacks are younger than the run, which had what is their default now.
    """
    record, steps = _record(folder), checkpoint_steps(folder / "checkpoints")
    if record is None or not steps or steps[-1] != config.train.steps:
        return False
    return _agrees(record, _stored(config))


def refuse_another(config: ConfigDict, folder: pathlib.Path) -> None:
    """Raise if resuming in `folder` would go on from a run of another length or another optimizer.

    Such a change is allowed when one resumes by hand. Between the arms of a card it would be in the results, unseen.

    Raises:
      ValueError: names the folder and the first key that differs.
    """
    record, ours = _record(folder), _stored(config)
    if record is None or not checkpoint_steps(folder / "checkpoints"):
        return
    for section in FIXED_SECTIONS:
        before = record.get(section, {})
        for key, value in before.items():
            now = ours[section].get(key)
            if not _agrees(value, now):
                raise ValueError(
                    f"{folder}: holds a run with {section}.{key}={value!r}, and the card's has {now!r}; "
                    "choose another --workdir, or delete this folder"
                )


def _record(folder: pathlib.Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _stored(config: ConfigDict) -> dict[str, Any]:
    return json.loads(json.dumps(plain(config)))


def _agrees(record: Any, ours: Any) -> bool:
    if isinstance(record, Mapping) and isinstance(ours, Mapping):
        return all(key in ours and _agrees(value, ours[key]) for key, value in record.items())
    return record == ours
