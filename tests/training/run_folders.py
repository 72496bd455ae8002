"""Folders of runs without a training: the files that it leaves, written by hand."""

from __future__ import annotations

import json
import time

from maskformer import paths
from maskformer.training.checksums import CHECKSUMS


def make_run(folder, *, step=0, steps=100, saved=None, end=None, lock=None, seed=0, events=True):
    """A run that has logged and evaluated until `step`, and saved at `saved`.

    Args:
      end: exit code and reason; None where it ended without a word, or has not ended.
      lock: what `lock.json` holds; None where there is none.
      events: whether it is of a version that writes them.
    """
    folder = paths.resolve(str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    config = {"seed": seed, "train": {"steps": steps}, "evaluation": {"split": "validation", "metric": "loss"}}
    (folder / "config.json").write_text(json.dumps(config))
    if step:
        lines = [{"step": step, "train/loss": 3.0, "validation/loss": 2.5}, {"step": step, "train/loss": 2.9}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        checkpoint = folder / "checkpoints" / str(step if saved is None else saved)
        checkpoint.mkdir(parents=True)
        (checkpoint / CHECKSUMS).write_text("{}")
        (checkpoint / "commit_success.txt").write_text("")
    if events:
        # The attempt before was preempted, and this one went on with what it saved.
        began = time.time() - 1000
        told = [
            {"event": "start", "time": began, "attempt": "a", "step": 0},
            {"event": "end", "time": began + 10, "attempt": "a", "code": 75, "reason": "SIGTERM", "step": 0},
            {"event": "start", "time": began + 20, "attempt": "b", "step": 0},
            {"event": "phase", "time": began + 30, "attempt": "b", "name": "steps", "first": 1, "last": step},
        ]
        if end is not None:
            last = {"code": end[0], "reason": end[1], "step": step}
            told.append({"event": "end", "time": began + 40, "attempt": "b", **last})
        text = "".join(json.dumps(line) + "\n" for line in told)
        (folder / "events.jsonl").write_text(text + '{"event": "pha')
    if lock is not None:
        (folder / "lock.json").write_text(json.dumps(lock))
    return folder
