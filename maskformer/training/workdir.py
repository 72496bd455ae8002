"""The folder of a run: that it can be used, that it goes on as the same run, and the one reader of its files."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from maskformer import paths
from maskformer.checks import printable, shown
from maskformer.data import DataConfig
from maskformer.models import EncoderConfig
from maskformer.objectives.schedules import in_steps
from maskformer.paths import AnyPath, why_no_run
from maskformer.training import lines
from maskformer.training.sections import TrainConfig

logger = logging.getLogger(__name__)

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
# Written by Orbax when all files of a checkpoint are in an object store, where no folder can be renamed.
COMMITTED = "commit_success.txt"

# What says how a run is computed and from where it reads, not what it computes. The last bits of a sum may follow some
# of them, as they follow the mesh, which may change too: a run on an accelerator goes on where there is none.
FREE_KEYS = {
    "data": ("prefetch", "reader_threads", "data_dir"),
    "model": ("attention_implementation", "remat", "scan_layers"),
}

# Sections whose keys are the fields of a class, and may grow.
DESCRIBED: Mapping[str, type] = {"data": DataConfig, "model": EncoderConfig}

CONFIG_FIX = "put back a copy of it, or delete it and run the same `maskformer train` command, which writes it anew"


class RunError(RuntimeError):
    """A run that cannot go on, through no mistake in its command: one line, and exit code 1."""


def prepare_workdir(workdir: str | os.PathLike[str]) -> AnyPath:
    """Make the folder and prove that a run can be kept in it.

    Args:
      workdir: as the user wrote it; `pathlib.Path` would turn the empty string into the current directory.

    Raises:
      ValueError: one line; it can be no folder, there is no such bucket, or it cannot be written to.
      RunError: the bucket does not answer, also when asked again for half a minute.
    """
    text = os.fspath(workdir)
    if (why := why_no_run(text)) is not None:
        raise ValueError(f"workdir={shown(text)}: {why}")
    path = paths.resolve(workdir)
    try:
        paths.check_store(path)
        path.mkdir(parents=True, exist_ok=True)
        # The processes of a run on several hosts may have one number.
        probe = path / f".write_test_{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except paths.StoreError as error:
        raise RunError(f"workdir={shown(text)}: {reason(error)}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if not paths.is_local(path):
            raise ValueError(f"workdir={shown(text)}: {reason(error)}") from error
        raise ValueError(
            f"workdir={shown(text)}: cannot be written to ({reason(error)}); choose another --workdir"
        ) from error
    # `is_dir` follows links: `checkpoints` may be one to a larger disk.
    for name, wanted in ((CHECKPOINTS, "a folder"), (CONFIG, "a file"), (METRICS, "a file")):
        entry = path / name
        if paths.lexists(entry) and not (entry.is_dir() if wanted == "a folder" else entry.is_file()):
            found = "a folder" if entry.is_dir() else "a file" if entry.is_file() else "a link that leads nowhere"
            raise ValueError(f"{entry}: is {found}, expected {wanted}; move it away, or choose another --workdir")
    return path


def checkpoint_steps(directory: AnyPath) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending.

    On a file system a folder gets its name when it is whole; on an object store its mark, `COMMITTED`, says so.
    """
    return sorted(step for step, entry in _numbered(directory) if _is_whole(entry))


def unfinished_steps(directory: AnyPath) -> list[int]:
    """Steps that are named in an object store by what was never committed: a save that was cut off, or goes on."""
    return sorted(step for step, entry in _numbered(directory) if not paths.is_local(entry) and not _is_whole(entry))


def stray_steps(directory: AnyPath) -> list[int]:
    """Steps that are named in a folder of checkpoints by what is no folder: a file, or a link that leads nowhere."""
    return sorted(step for step, entry in _numbered(directory) if paths.is_local(entry) and not entry.is_dir())


def _is_whole(entry: AnyPath) -> bool:
    return entry.is_dir() if paths.is_local(entry) else (entry / COMMITTED).exists()


def _numbered(directory: AnyPath) -> list[tuple[int, AnyPath]]:
    if not directory.is_dir():
        return []
    # As a step is written: no leading zero, and none of the digits of other scripts.
    number = re.compile(r"0|[1-9][0-9]{0,17}")
    return [(int(entry.name), entry) for entry in directory.iterdir() if number.fullmatch(entry.name)]


def _named(directory: AnyPath) -> list[int]:
    return checkpoint_steps(directory) + stray_steps(directory)


def check_same_run(config: Mapping[str, Any], workdir: AnyPath) -> None:
    """Refuse to continue the run in `workdir` as another one.

    Its length, optimizer, evaluation and mesh may change, and what says only how it is computed (`FREE_KEYS`); its
    model, data, task, objective and seed may not: the record would then tell of a run that never was.

    Raises:
      ValueError: names the first key that differs, or what is wrong with `config.json`.
    """
    if not paths.lexists(workdir / CONFIG) or not checkpoint_steps(workdir / CHECKPOINTS):
        return
    before = read_config(workdir, sections=("data", "objective", "model", "train"))
    for section in ("seed", "data", "task", "objective", "model"):
        # There is no section of a task in a config from before there were tasks.
        absent = {} if section == "task" else None
        ours, theirs = config.get(section, absent), before.get(section, absent)
        if section == "objective":
            # A share of the run is another step in a run of another length.
            ours = in_steps(ours, config["train"]["steps"])
            theirs = _in_their_steps(theirs, before["train"].get("steps"), workdir / CONFIG)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            ours, theirs = ({**_defaults(section), **values} for values in (ours, theirs))
            unset = (None, {})
            keys = [
                key
                for key in sorted(ours.keys() | theirs.keys())
                if key not in FREE_KEYS.get(section, ())
                and ours.get(key) != theirs.get(key)
                and not (ours.get(key) in unset and theirs.get(key) in unset)
            ]
            if not keys:
                continue
            section, ours, theirs = f"{section}.{keys[0]}", ours.get(keys[0]), theirs.get(keys[0])
        elif ours == theirs:
            continue
        raise ValueError(
            f"{section}={shown(ours)}: the run in {workdir} has {shown(theirs)}; use a new --workdir "
            "(train.init_from takes over its parameters)"
        )


def _defaults(section: str) -> dict[str, Any]:
    """What a run had that is from before a key existed: the default of now, which changes nothing.

    >>> _defaults("model")["experts"], _defaults("seed")
    (0, {})
    """
    fields = dataclasses.fields(DESCRIBED[section]) if section in DESCRIBED else ()
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def check_sources(train: TrainConfig, workdir: AnyPath) -> None:
    """Refuse a run in `workdir` that is to begin with another one's checkpoint where there is none.

    Raises:
      ValueError: names `train.resume` or `train.init_from`, and the folder.
    """
    if _named(workdir / CHECKPOINTS):
        return
    for field in ("resume", "init_from"):
        source = getattr(train, field)
        # What is no folder counts here: who reads it says what is wrong with it.
        if source is not None and not _named(paths.resolve(source) / CHECKPOINTS):
            raise ValueError(
                f"train.{field}={shown(source)}: no checkpoint in {printable(os.path.join(source, CHECKPOINTS))}; "
                "expected the workdir of a run that has one"
            )


def _in_their_steps(objective: Any, steps: Any, path: AnyPath) -> Any:
    try:
        return in_steps(objective, steps)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{path}: objective={shown(objective)} with train.steps={shown(steps)} describes no run; {CONFIG_FIX}"
        ) from error


def read_config(workdir: AnyPath, sections: Sequence[str] = ()) -> dict[str, Any]:
    """The config that a run keeps in its folder.

    Args:
      workdir: the run's folder.
      sections: what has to be there, each with keys of its own.

    Raises:
      ValueError: there is none, or names what is wrong with it.
    """
    path = workdir / CONFIG
    if not paths.lexists(path):
        raise ValueError(f"workdir {shown(os.fspath(workdir))}: no {CONFIG} there; expected the folder of a run")
    config = read_object(path, CONFIG_FIX)
    for section in sections:
        if not isinstance(config.get(section), Mapping):
            has = f"{section}={shown(config[section])}" if section in config else f"no {section!r}"
            raise ValueError(f"{path}: has {has}, expected an object of that name; {CONFIG_FIX}")
    return config


def write_config(workdir: AnyPath, config: Mapping[str, Any]) -> None:
    """Keep the (plain) config in the run's folder.

    Raises:
      RunError: the file cannot be written.
    """
    replace_text(workdir / CONFIG, json.dumps(config, indent=2) + "\n")


def has_metrics(workdir: AnyPath) -> bool:
    """Whether there are metrics of a run, in one file or in parts."""
    return lines.exists(workdir / METRICS)


def read_metrics(path: AnyPath) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, one dict each, with an integer `step`.

    A last line that a kill cut off is left out. Other damage is left out too, and one warning says where; what follows
    it is kept, on the same line as well.

    Raises:
      ValueError: the file cannot be read at all.
    """
    try:
        return lines.read_lines(path, _is_metrics)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({reason(error)}); expected the metrics of a run") from error


def _is_metrics(line: Mapping[str, Any]) -> bool:
    return type(line.get("step")) is int and all(type(value) in (int, float) for value in line.values())


def read_object(path: AnyPath, fix: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
      path: the file.
      fix: what to do about a damaged one; ends the message.

    Raises:
      ValueError: one line that names file, line and fix.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({reason(error)}); {fix}") from error
    if not data:
        raise ValueError(f"{path}: is empty, expected a JSON object; {fix}")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 text, expected a JSON object; {fix}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{path}: {place} is not JSON ({error.msg}); {fix}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ValueError(f"{path}: cannot be read as JSON ({reason(error)}); {fix}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {shown(value)}, expected a JSON object; {fix}")
    return value


def replace_text(path: AnyPath, text: str) -> None:
    """Write a file so that a reader, and a run that is killed meanwhile, find the old text or the new one.

    Raises:
      RunError: it cannot be written.
    """
    try:
        paths.replace_bytes(path, text.encode())
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: AnyPath, error: OSError) -> RunError:
    """The error of a run that can no longer write one of its files."""
    fix = "free some space or mend its folder, and run the same command again" if paths.is_local(path) else ""
    return RunError(
        f"{path}: cannot be written ({reason(error)}); {fix or 'run the same command again'}: it goes on from the last "
        "checkpoint"
    )


def reason(error: BaseException) -> str:
    """What went wrong, in a few words on one line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(words.split())[:400]
