"""Hands JobSets to a cluster by `kubectl`, and stays beside them where something must be decided again and again.

Kubernetes restarts a JobSet by itself, but it neither holds back the runs of a sweep (a Kueue queue does, by quota) nor
makes a JobSet smaller: neither JobSet nor Kueue can change the number of its Jobs, and Kueue's partial admission is for
plain Jobs. So `supervise` makes them one after another, or deletes one that waits for machines and makes a smaller one.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.job import EX_INTERRUPTED, check
from launch.jobset import NAME_LABEL, size
from launch.manifest import to_yaml

_KIND = "jobsets.jobset.x-k8s.io"
_MISSED_IN_A_ROW = 20
# What kubectl says when the cluster is not there, and not when it says no.
_AWAY = re.compile("[Uu]nable to connect|was refused|connection refused|[Tt]imeout|timed out|EOF|no such host|"
                   "ServiceUnavailable|TooManyRequests|InternalError")  # fmt: skip
# What kubectl says, and what to do about it.
_ADVICE = {
    "no matches for kind": "JobSet is not installed in this cluster (https://jobset.sigs.k8s.io), from 0.10 on",
    "onJobFailureMessagePatterns": "JobSet is too old in this cluster: 0.10 or newer is needed",
    "AlreadyExists": "kubectl delete jobset NAME, or choose another --name",
}


class Unreachable(RuntimeError):
    """kubectl did not reach the cluster, which may be better in a minute."""


class Kubectl:
    """The `kubectl` on PATH, in one namespace of one context (those of its configuration where None)."""

    def __init__(self, context: str | None = None, namespace: str | None = None):
        self._options = [f"--{key}={value}" for key, value in (("context", context), ("namespace", namespace)) if value]

    def create(self, manifest: str) -> str:
        """Creates what the manifest has, all fields checked by the server; returns kubectl's answer.

        Raises:
          RuntimeError: kubectl is missing, or refused, with its own words.
        """
        return self._run("create", "--validate=strict", "-f", "-", text=manifest)

    def jobsets(self, name: str) -> dict[str, dict[str, Any]]:
        """The JobSets of a job, by name, those that are just being deleted included.

        Raises:
          RuntimeError: as `create`.
        """
        answer = self._run("get", _KIND, f"--selector={NAME_LABEL}={name}", "--output=json")
        return {item["metadata"]["name"]: item for item in json.loads(answer)["items"]}

    def delete(self, name: str) -> None:
        """Begins to delete a JobSet, which is gone when its pods are. They get SIGTERM first.

        Raises:
          RuntimeError: as `create`.
        """
        self._run("delete", _KIND, name, "--cascade=foreground", "--wait=false", "--ignore-not-found")

    def _run(self, *words: str, text: str = "") -> str:
        command = ["kubectl", *self._options, *words]
        try:
            done = subprocess.run(command, input=text.encode(), capture_output=True)
        except FileNotFoundError:
            raise RuntimeError("kubectl was not found: is it installed, and on PATH?") from None
        answer = done.stdout.decode(errors="replace").strip()
        if done.returncode:
            said = _one_line(done.stderr.decode(errors="replace"))
            if _AWAY.search(said):
                raise Unreachable(f"kubectl: {said}")
            # Of a manifest with several JobSets kubectl creates those that it can.
            made = f"; {', '.join(answer.splitlines())}" if answer else ""
            raise RuntimeError(f"kubectl refused: {said}{made}")
        return answer


def _one_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r"[EWI][0-9]{4} ", line)]
    # Of a manifest with many JobSets all are refused alike, and the first says why.
    more = f" (and {len(lines) - 1} more lines like it)" if len(lines) > 4 else ""
    said = " ".join(" ".join(lines[:1] if more else lines).split())
    advice = [f" ({words})" for word, words in _ADVICE.items() if word in said]
    return said + more + "".join(advice[:1])


@dataclasses.dataclass
class Run:
    """One run that `supervise` looks after.

    Args:
      name: of its JobSet.
      sizes: how many slices it may have, the most wanted first.
      make: the JobSet for one of those sizes, with so many failures already used.
      state: waiting (not made), starting (not all pods are there), running, leaving (being deleted), returning (to be
        made again), done or failed.
      choice: which of the sizes.
      since: when it began to wait for machines.
      restarts: of the JobSet, as last seen.
      failures: those of the JobSets of this run that are gone.
    """

    name: str
    sizes: Sequence[int]
    make: Callable[[int, int], Mapping[str, Any]]
    state: str = "waiting"
    choice: int = 0
    since: float = 0.0
    restarts: int = 0
    failures: int = 0

    @property
    def slices(self) -> int:
        return self.sizes[self.choice]

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed")


def supervise(
    kubectl: Kubectl,
    job: str,
    runs: Sequence[Run],
    *,
    at_once: int | None = None,
    patience: float = 900.0,
    period: float = 15.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = print,
) -> int:
    """Makes the JobSets of the runs and stays until all have ended.

    Of a run with several sizes, the JobSet that has not got all of its machines after `patience` seconds is deleted
    (its processes save first), and one of the next size is made, after the smallest again of the largest. One that is
    smaller than it might be and was interrupted starts again from the largest. A JobSet that is there already is taken
    over if it is what would have been made, so the command may be stopped and given again.

    Args:
      job: the name that all of the JobSets carry as a label.
      at_once: how many runs may have a JobSet that has not ended.
      period: seconds between two looks.

    Returns:
      0, 1 if a run failed, 130 after Ctrl-C, which leaves the JobSets alone.

    Raises:
      ValueError: a JobSet of that name is another one.
      RuntimeError: kubectl refused something, or did not reach the cluster at first or twenty times in a row.
    """
    reached, missed = False, 0
    try:
        while True:
            try:
                found = kubectl.jobsets(job)
                reached, missed = True, 0
                _step(runs, found, kubectl, at_once, patience, clock, say)
            except Unreachable as error:  # an upgrade of the cluster takes it away for minutes
                missed += 1
                if not reached or missed == _MISSED_IN_A_ROW:
                    raise
                if missed == 1:
                    say(f"{error}: trying again")
            if all(run.ended for run in runs):
                break
            sleep(period)
    except KeyboardInterrupt:
        say("interrupted: what was created goes on; give the same command again to look after it again")
        return EX_INTERRUPTED
    ended = collections.Counter(run.state for run in runs)
    say(", ".join(f"{count} {state}" for state, count in sorted(ended.items())))
    return 1 if ended["failed"] else 0


def _step(runs: Sequence[Run], found: Mapping[str, Mapping[str, Any]], kubectl: Kubectl, at_once: int | None,
          patience: float, clock: Callable[[], float], say: Callable[[str], None]) -> None:  # fmt: skip
    """Looks at every run once, and makes the JobSets that may be there now."""
    for run in runs:
        if run.state in ("waiting", "returning") and run.name in found:
            _take_over(run, found[run.name], clock(), say)
        _look(run, found.get(run.name), kubectl, clock(), patience, say)
    begun = sum(run.state not in ("waiting", "done", "failed") for run in runs)
    for run in runs:
        free = at_once is None or begun < at_once
        if run.state == "returning" or (run.state == "waiting" and free):
            begun += run.state == "waiting"
            kubectl.create(to_yaml([run.make(run.slices, run.failures)]))
            run.state, run.since, run.restarts = "starting", clock(), 0
            say(f"{run.name}: created" + (f" with {run.slices} slices" if len(run.sizes) > 1 else ""))


def _look(run: Run, found: Mapping[str, Any] | None, kubectl: Kubectl, now: float, patience: float,
          say: Callable[[str], None]) -> None:  # fmt: skip
    """Takes one run a step further by what is there of it."""
    if run.ended or run.state in ("waiting", "returning"):
        return
    if found is None and run.state == "leaving":
        run.state = "returning"
    if run.state in ("leaving", "returning"):
        return
    if found is None or "deletionTimestamp" in found["metadata"]:
        run.state = "failed"
        say(f"{run.name}: failed (its JobSet was deleted by somebody else)")
        return
    status = found.get("status", {})
    ended = {item["type"]: item for item in status.get("conditions", []) if item["status"] == "True"}
    if "Completed" in ended or "Failed" in ended:
        run.state = "done" if "Completed" in ended else "failed"
        why = "" if run.state == "done" else f" ({ended['Failed'].get('message', 'no reason given')})"
        say(f"{run.name}: {run.state}{why}")
        return
    restarts = status.get("restarts", 0)
    interrupted, run.restarts = restarts > run.restarts, restarts
    jobs = status.get("replicatedJobsStatus", [])
    complete = sum(item.get("ready", 0) + item.get("succeeded", 0) for item in jobs) == size(found)
    if interrupted:
        say(f"{run.name}: interrupted, restart {restarts}")
    if complete and run.state == "starting":
        say(f"{run.name}: running")
    if interrupted or (not complete and run.state == "running"):
        run.since = now
    run.state = "running" if complete else "starting"
    if len(run.sizes) == 1:
        return
    if interrupted and run.choice:
        _leave(run, 0, found, kubectl, say, "was interrupted")
    elif not complete and now - run.since >= patience:
        _leave(run, (run.choice + 1) % len(run.sizes), found, kubectl, say, f"waited {patience:g} s for machines")


def _leave(run: Run, choice: int, found: Mapping[str, Any], kubectl: Kubectl, say: Callable[[str], None],
           why: str) -> None:  # fmt: skip
    kubectl.delete(run.name)
    say(f"{run.name}: with {run.slices} slices {why}; next with {run.sizes[choice]}")
    run.failures += found.get("status", {}).get("restartsCountTowardsMax", 0)
    run.state, run.choice = "leaving", choice


def _take_over(run: Run, found: Mapping[str, Any], now: float, say: Callable[[str], None]) -> None:
    # Fields that are 0 may be missing: JobSet's webhook writes them as Go does.
    slices, left = size(found), found["spec"].get("failurePolicy", {}).get("maxRestarts", 0)
    known = slices in run.sizes
    wanted = run.make(slices, 0) if known else {}
    run.failures = wanted["spec"]["failurePolicy"]["maxRestarts"] - left if known else 0
    # The server adds defaults to what it was given, never takes from it.
    same = known and run.failures >= 0 and _within(run.make(slices, run.failures)["spec"], found["spec"])
    check(same, "--name", run.name, "a name of which there is no JobSet of another command or size")
    run.choice = list(run.sizes).index(slices)
    run.restarts, run.since = found.get("status", {}).get("restarts", 0), now
    run.state = "leaving" if "deletionTimestamp" in found["metadata"] else "starting"
    say(f"{run.name}: there already")


def _within(part: Any, whole: Any) -> bool:
    """Whether all of `part` is in `whole`, which may have more fields, and more tolerations or the like at the end.

    >>> _within({"a": [1]}, {"a": [1, 2], "b": 3}), _within({"a": 1}, {"a": 2})
    (True, False)
    >>> _within({"a": 0}, {}), _within({"a": 1}, {})  # a 0 need not be written
    (True, False)
    """
    if isinstance(part, Mapping):
        return isinstance(whole, Mapping) and all(
            _within(part[key], whole[key]) if key in whole else part[key] == 0 for key in part
        )
    if isinstance(part, list | tuple):
        return isinstance(whole, list) and len(part) <= len(whole) and all(map(_within, part, whole))
    return part == whole
