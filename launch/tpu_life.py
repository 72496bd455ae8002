"""The life of a run on queued resources: asked for, waited for, run on all workers, asked for again, given back."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from launch import tpu_worker
from launch.job import EX_INTERRUPTED, EX_TEMPFAIL, EX_USAGE, Job, Restarts
from launch.tpu_resource import Request
from launch.watchdog import kill_group

WAITING = ("STATE_UNSPECIFIED", "CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES")
# What gcloud says to a request, a configuration or a login that asking again does not mend; and shorter, where it takes
# a paragraph.
_MISTAKES = {
    "INVALID_ARGUMENT": None,
    "PERMISSION_DENIED": None,
    "UNAUTHENTICATED": None,
    "Failed to find attribute [project]": "gcloud has no project: give --project or `gcloud config set project NAME`",
    "Failed to find attribute": None,
    "not currently have an active account": "gcloud is not logged in: `gcloud auth login`",
}
# Seconds. gcloud itself tries ten times, 5 s apart, to reach a machine that has just started.
BEGIN_TOGETHER = 180.0
AFTER_A_CRASH = 10.0
KILLED_WITHIN = 120.0
RECONNECT = 10.0
RECONNECTIONS = 5
# A run whose workers could not be reached or did not all start.
EX_UNREACHABLE = 69


class GcloudError(RuntimeError):
    """gcloud refused, in its own words on one line.

    Attributes:
      mistake: whether asking again can only give the same answer.
      code: the exit code of a run that it ends.
    """

    def __init__(self, words: str, mistake: bool = False, code: int = 1):
        super().__init__(words)
        self.mistake, self.code = mistake, code


class Gone(Exception):
    """The machines were taken away."""


class Stop:
    """What the launcher was told: the first signal, and whether there was another."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.again = False

    def note(self, number: int, frame: object = None) -> None:
        self.again = self.signal is not None
        self.signal = self.signal or number

    @property
    def code(self) -> int:
        """The exit code of a run that was told this."""
        return EX_INTERRUPTED if self.signal == signal.SIGINT else EX_TEMPFAIL


def gcloud(arguments: Sequence[str], timeout: float = 600.0) -> str:
    """What a command of gcloud prints.

    Raises:
      GcloudError: it is not there, or refused.
    """
    try:
        # A session of its own: a Ctrl-C of the terminal is ours to answer.
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout,
            start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        words = "gcloud was not found: install the Google Cloud CLI, and log in"
        raise GcloudError(words, mistake=True, code=EX_USAGE) from None
    except subprocess.TimeoutExpired:
        raise GcloudError(f"`{' '.join(arguments[:5])}` gave no answer within {timeout:.0f} s") from None
    if done.returncode:
        words = " ".join(done.stderr.split())
        said = words.rpartition("ERROR: ")[2] or f"exit code {done.returncode}"
        found = [mistake for mistake in _MISTAKES if mistake in said]
        if found or done.returncode == 2:  # a usage error of gcloud
            shorter = _MISTAKES[found[0]] if found else None
            raise GcloudError(shorter or said[:600], mistake=True, code=EX_USAGE)
        raise GcloudError(said[:600])
    return done.stdout


class Life:
    """One run of a job: `live` returns its exit code, when its machines have been given back.

    Args:
      name: of the queued resource, its nodes and the folder on the workers.
      job: of this run alone.
      request: which machines.
      setup: shell lines that each worker runs first.
      patience: seconds to wait for a number of slices before the next smaller one is tried.
      poll: seconds between two looks at the state.
      keep: leave the machines at the end.
      stop: what the launcher is told.
      say: prints a line.
    """

    def __init__(
        self,
        name: str,
        job: Job,
        request: Request,
        setup: Sequence[str],
        patience: float,
        poll: float,
        keep: bool,
        stop: Stop,
        say: Callable[[str], None],
    ):
        self.name, self.job, self.request, self.setup = name, job, request, setup
        self.patience, self.poll, self.keep, self.stop = patience, poll, keep, stop
        self.say = say
        self.slices = 0
        self._there = False
        self._attempts = 0

    def live(self) -> int:
        """See the class."""
        try:
            return self._live()
        except GcloudError as error:
            self._tell(f"error: {error}")
            return error.code
        finally:
            if self._there and self.keep:
                self._tell(f"kept; they cost money until `{shlex.join(self.request.delete(self.name))}`")
            elif self._there:
                self._delete()

    def _tell(self, text: str) -> None:
        self.say(f"[launch] {text}")

    def _live(self) -> int:
        restarts = Restarts(self.job.restarts)
        adopted: str | None = None
        while self.stop.signal is None:
            begin, gone = time.monotonic(), False
            try:
                if not self._there:
                    adopted = self._acquire()
                    begin = time.monotonic()
                if self.stop.signal is not None:
                    break
                code = self._run(adopted or self._next_attempt())
            except Gone as state:
                self._tell(f"the machines are gone ({state})")
                gone = True
                code = self.stop.code  # whatever they were doing, 75: a preemption costs nothing
                self._delete()
            except GcloudError as error:
                if error.mistake:
                    raise
                self._tell(f"error: {error}")
                code = EX_UNREACHABLE
            adopted = None
            if self.stop.signal is not None:
                return code
            pause = restarts.pause(code, time.monotonic() - begin)
            if pause is None:
                return code
            self._tell(f"starting again in {pause:g} s" if gone else restarts.words(code, pause))
            self._sleep(pause)
            try:
                if self._there and (state := self._state()) != "ACTIVE":
                    self._tell(f"the machines are gone ({state})")
                    self._delete()
            except GcloudError as error:
                self._tell(f"error: {error}")
        return self.stop.code

    def _next_attempt(self) -> str:
        self._attempts += 1
        return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{self._attempts:04d}-{self._digest()}"

    def _digest(self) -> str:
        """Another one for each command: a launcher goes on only with what it would have started itself."""
        words = repr((self.job.command, tuple(self.setup)))
        return hashlib.sha256(words.encode("utf-8", "surrogateescape")).hexdigest()[:8]

    # What is asked of the Cloud.

    def _acquire(self) -> str | None:
        """Returns when there are machines, or the launcher is told to stop.

        Returns:
          The attempt that already runs on them, if they are of a launcher before this one.
        """
        counts = list(self.request.slices)
        for place, slices in enumerate(counts):
            last = place == len(counts) - 1
            try:
                gcloud(self.request.create(self.name, slices))
            except GcloudError as error:
                if "ALREADY_EXISTS" not in str(error):
                    raise
                if (attempt := self._adopt()) is not None:
                    return attempt or None
                gcloud(self.request.create(self.name, slices))
            self._there, self.slices = True, slices
            self._tell(f"asked for {slices} x {self.request.accelerator_type} in {self.request.zone}")
            deadline = None if last else time.monotonic() + self.patience
            state = self._wait(deadline)
            if state == "ACTIVE" or self.stop.signal is not None:
                return None
            self._delete()
            if last:
                raise GcloudError(
                    f"{slices} x {self.request.accelerator_type} could not be had ({state})",
                    mistake=self.request.valid_until_duration is not None,  # then there is a time to give up
                )
            self._tell(f"{slices} slices could not be had ({state}): trying {counts[place + 1]}")
        raise AssertionError("unreachable")

    def _wait(self, deadline: float | None) -> str:
        """The state of the request when it waits no more, is not waited for any more, or the launcher is to stop."""
        state = before = ""
        while self.stop.signal is None:
            try:
                state = self._state()
            except GcloudError as error:
                if error.mistake:
                    raise
                state = state or "STATE_UNSPECIFIED"
                self._tell(f"error: {error}; asking again")
            if state != before:
                self._tell(state)
                before = state
            if state.split(":")[0] not in WAITING:
                return state
            if deadline is not None and time.monotonic() > deadline:
                return f"{state} after {self.patience:.0f} s"
            self._sleep(self.poll)
        return state

    def _state(self) -> str:
        """The state of the request, and why where it failed; `NOT_FOUND` when there is none."""
        try:
            answer = json.loads(gcloud(self.request.describe(self.name)))
        except GcloudError as error:
            if "NOT_FOUND" in str(error):
                return "NOT_FOUND"
            raise
        state = answer.get("state", {})
        name = state.get("state", "STATE_UNSPECIFIED")
        why = state.get("failedData", {}).get("error", {}).get("message")
        return f"{name}: {why}" if why else name

    def _adopt(self) -> str | None:
        """Takes over what a launcher before this one has asked for; None when that is of no use and was deleted.

        Raises:
          GcloudError: something else has this name.
        """
        node = json.loads(gcloud(self.request.describe(self.name)))["tpu"]["nodeSpec"]
        slices = int(node[0].get("multisliceParams", {}).get("nodeCount", len(node)))
        kind = node[0].get("node", {}).get("acceleratorType", self.request.accelerator_type)
        if kind != self.request.accelerator_type or slices not in self.request.slices:
            raise GcloudError(
                f"there is a queued resource {self.name} of {slices} x {kind}: choose another --name, or delete it: "
                f"`{shlex.join(self.request.delete(self.name))}`",
                mistake=True,
            )
        self._there, self.slices = True, slices
        self._tell(f"there is a queued resource of this name: going on with its {slices} x {kind}")
        last = slices == self.request.slices[-1]
        if self._wait(None if last else time.monotonic() + self.patience) != "ACTIVE":
            if self.stop.signal is None:
                self._delete()
                return None
            return ""
        said = self._ask(tpu_worker.newest(self.name))
        answers = dict(re.findall(rf"{tpu_worker.MARK} \? newest (\S+) (\S+ \S+)", said))
        running = {answer.split()[0] for answer in answers.values() if answer.endswith(" running")}
        if any(not attempt.endswith(self._digest()) for attempt in running):
            self._there = False  # what is another's stays
            raise GcloudError(f"another command runs on {self.name}: choose another --name", mistake=True)
        same = {answer.split()[0] for answer in answers.values()}
        if len(answers) == self.request.workers(slices) and len(same) == 1 and running:
            self._tell(f"attempt {(attempt := same.pop())} runs there")
            return attempt
        return ""

    def _delete(self) -> None:
        self._tell("giving the machines back")
        for left in (2, 1, 0):
            try:
                gcloud(self.request.delete(self.name))
                break
            except GcloudError as error:
                if "NOT_FOUND" in str(error):
                    break
                if not left:
                    self._tell(f"error: {error}; they cost money: `{shlex.join(self.request.delete(self.name))}`")
                    return
                time.sleep(self.poll)
        self._there = False

    def _ask(self, script: str) -> str:
        """What the workers that could be reached answer."""
        try:
            return gcloud(self.request.ssh(self.name, tpu_worker.packed(script)), timeout=180.0)
        except GcloudError as error:
            self._tell(f"error: {error}")
            return ""

    # One attempt.

    def _run(self, attempt: str) -> int:
        """The exit code of one attempt.

        Raises:
          Gone: the machines were taken away meanwhile.
        """
        attended = _Attempt(self, attempt)
        broken = 0
        while broken < RECONNECTIONS:
            begin = time.monotonic()
            code = attended.follow()
            if code in (0, EX_USAGE, EX_INTERRUPTED) or (code is not None and self.stop.signal is not None):
                return code
            try:
                state = self._state()
            except GcloudError as error:
                # No network here, maybe; the run over there goes on without us, for however long.
                self._tell(f"error: {error}; asking again")
                broken, state = 0, "ACTIVE"
            # Machines that go take the command with them, which is no failure of it.
            if state != "ACTIVE":
                raise Gone(state)
            if code is not None:
                return code
            # A connection of days may break more often.
            broken = 1 if time.monotonic() - begin > 60 else broken + 1
            self._tell("the connection broke: connecting again")
            self._sleep(RECONNECT)
        attended.signal("KILL")
        return EX_UNREACHABLE

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.stop.signal is None and time.monotonic() < deadline:
            time.sleep(0.05)


class _Attempt:
    """One start of a run on all workers, as far as its launcher knows."""

    def __init__(self, life: Life, attempt: str):
        self._life = life
        self._attempt = attempt
        self._workers = life.request.workers(life.slices)
        self._began: dict[str, float] = {}
        self._codes: dict[str, int] = {}
        self._told: str | None = None
        self._killed = 0.0
        self._deadline: float | None = None
        self._failed = False

    def follow(self) -> int | None:
        """Shows the output until all have ended, and returns the exit code; None when the connection ended before.

        Raises:
          Gone: the machines were taken away meanwhile.
        """
        life = self._life
        script = tpu_worker.run(life.name, self._attempt, life.job.command, life.setup)
        command = life.request.ssh(life.name, tpu_worker.packed(script))
        connection = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        reader = threading.Thread(target=self._read, args=(connection,), daemon=True)
        reader.start()
        look = time.monotonic() + life.poll
        try:
            while connection.poll() is None and len(self._codes) < self._workers:
                time.sleep(0.05)
                self._attend()
                if self._told == "KILL" and time.monotonic() > self._killed + KILLED_WITHIN:
                    return EX_UNREACHABLE
                if time.monotonic() > look:
                    self._look()
                    look = time.monotonic() + life.poll
            reader.join(timeout=5.0)
        finally:
            # gcloud, and the ssh of each worker behind it.
            kill_group(connection.pid)
            connection.wait()
        if len(self._codes) == self._workers:
            return self._code()
        return self._code() or EX_UNREACHABLE if self._told == "KILL" else None

    def signal(self, name: str) -> None:
        """Sends a signal to the command on each worker."""
        self._told, self._killed = name, time.monotonic()
        self._life._ask(tpu_worker.send_signal(self._life.name, self._attempt, name, self._life.stop.code))

    def _read(self, connection: subprocess.Popen) -> None:
        mark = re.compile(rf"{tpu_worker.MARK} {re.escape(self._attempt)} (began|ended) ([0-9]+\.[0-9]+)(?: ([0-9]+))?")
        for line in connection.stdout or ():
            for word, worker, code in mark.findall(line):
                if word == "began":
                    self._began.setdefault(worker, time.monotonic())
                elif code:
                    self._codes.setdefault(worker, int(code))
            # Where lines of two workers ran into one, what is no mark is still theirs.
            if text := mark.sub("", line).strip("\r\n"):
                self._life.say(text)

    def _attend(self) -> None:
        """Passes on what the launcher is told, and ends those that wait for one that has failed."""
        stop, now = self._life.stop, time.monotonic()
        if stop.signal is not None and self._told is None:
            self._deadline = now + self._life.job.lead
            self.signal("INT" if stop.signal == signal.SIGINT else "TERM")
        if self._deadline is None and (code := next((c for c in [*self._codes.values()] if c), 0)):
            # After a 75 or 130 the others are saving. After a crash they wait in a collective for the dead one.
            saving = code in (EX_TEMPFAIL, EX_INTERRUPTED)
            self._deadline = now + (self._life.job.lead if saving else AFTER_A_CRASH)
        if self._deadline is None and self._began:
            late = now > min([*self._began.values()]) + BEGIN_TOGETHER
            if late and len(self._began) < self._workers:
                began = ", ".join(sorted(self._began))
                self._life._tell(f"only {len(self._began)} of {self._workers} workers have started ({began})")
                self._failed, self._deadline = True, now
        if self._told != "KILL" and (stop.again or (self._deadline is not None and now > self._deadline)):
            self.signal("KILL")

    def _look(self) -> None:
        try:
            state = self._life._state()
        except GcloudError as error:
            self._life._tell(f"error: {error}; asking again")  # no reason to stop a run
            return
        if state != "ACTIVE":
            raise Gone(state)

    def _code(self) -> int:
        codes = [*self._codes.values()]
        if self._failed:
            return EX_UNREACHABLE
        first = next((code for code in codes if code), 0)
        # Somebody pressed Ctrl-C: not to be started again.
        return EX_INTERRUPTED if first == EX_TEMPFAIL and EX_INTERRUPTED in codes else first
