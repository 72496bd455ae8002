"""Runs one command on every worker of TPU slices, by queued resources, or prints the commands that would.

    python -m launch.tpu --name bert --zone us-east5-b --topology v6e:4x4 --spot --setup "source setup.sh" -- \\
        maskformer train --config=configs/bert.py:base --workdir=gs://bucket/bert

prints a shell script; `--output FILE` writes it. `--submit` does what it does, and stays to look after the run: it asks
for the machines and waits for them, starts the command on all workers of all slices, shows their output (each line
with the number of its slice and worker), and gives the machines back at the end (`--keep` leaves them). A preemption
costs nothing: other machines are asked for, and the run goes on from the checkpoint in its workdir. So does exit code
75; 0, 2 and 130 end the run, and all others are counted against `--max-restarts`.

SIGTERM and Ctrl-C reach the command on every worker, `--lead` seconds before it is killed; the second one kills. The
run does not need this program's connection: where that breaks it is made again, and where the program itself is gone,
the same command goes on with what it left.

With `--slices 4,2,1` four slices are asked for; when they are not there within `--patience` seconds two are, then one.

With `--array 0-7` the run becomes eight, each on machines of its own, `--max-parallel` of them at a time.
"""

from __future__ import annotations

import dataclasses
import shlex
import signal
import sys
import threading
from collections.abc import Sequence

from launch import tpu_worker
from launch.job import Job, Parser, check, counts, deliver, number
from launch.tpu_life import Life, Stop
from launch.tpu_resource import Request, accelerator

PATIENCE = 1800.0
POLL = 30.0
# What a node of a slice adds to the name, and a run of a sweep, has to fit as well.
_LONGEST_NAME = 40


def _check(name: str, setup: Sequence[str]) -> None:
    fine = name[:1].isalpha() and name[-1:].isalnum() and name.replace("-", "a").isalnum()
    fine = fine and name.isascii() and name == name.lower() and len(name) <= _LONGEST_NAME
    check(fine, "--name", name, f"small letters, digits and -, a letter first, at most {_LONGEST_NAME} of them")
    for line in setup:
        check("\0" not in line, "--setup", line, "no NUL character")


def _names(job: Job, name: str) -> dict[int | None, str]:
    return {index: name if index is None else f"{name}-{index}" for index in job.runs()}


def render(
    job: Job, request: Request, *, name: str = "maskformer", setup: Sequence[str] = (), keep: bool = False
) -> str:
    """The text of a shell script that asks for the machines, runs the job on them once, and gives them back.

    Args:
      job: runs of its sweep follow one another; what is stopped is not started again.
      request: which machines; the first of its counts of slices.
      setup: shell lines that each worker runs first, in its home folder; they may change folder and environment.
      keep: leave the machines when the run has ended.

    Raises:
      ValueError: a field that no machine could honour, naming it.
    """
    _check(name, setup)
    slices = request.slices[0]
    lines = [
        "#!/bin/bash",
        f"# {request.workers(slices)} workers: {slices} x {request.accelerator_type} in {request.zone}.",
        "# `python -m launch.tpu --submit` does this, and starts again what is stopped or preempted.",
        "set -e",
    ]
    for index, one in _names(job, name).items():
        script = tpu_worker.run(one, "1", job.arguments(index), setup)
        end = "END"
        while end in script.split("\n"):
            end += "_"
        command = '"--command=echo $(printf %s "$run" | base64 | tr -d \'\\n\') | base64 -d | bash"'
        ssh = shlex.join(request.ssh(one, ""))
        lines += [
            "",
            f"run=$(cat <<'{end}'",
            script.rstrip("\n"),
            end,
            ")",
            shlex.join(request.create(one, slices)),
            f'while state=$({shlex.join(request.describe(one, "value(state.state)"))}); [ "$state" != ACTIVE ]; do',
            '  case $state in FAILED | SUSPENDING | SUSPENDED | DELETING) echo "$state"; exit 1 ;; esac',
            "  sleep 30",
            "done",
            # Of all workers, whatever became of them; then the machines cost no more.
            f"{ssh.replace('--command=', command)} || true",
            f"# They cost money until: {shlex.join(request.delete(one))}" if keep else shlex.join(request.delete(one)),
        ]
    return "\n".join([*lines, ""])


def submit(
    job: Job,
    request: Request,
    *,
    name: str = "maskformer",
    setup: Sequence[str] = (),
    patience: float = PATIENCE,
    poll: float = POLL,
    keep: bool = False,
) -> int:
    """Lives through the run, or those of a sweep side by side, and returns the exit code: the first that is not 0.

    Args:
      job, request, name, setup: as for `render`.
      patience: seconds to wait for a number of slices before the next smaller one is tried.
      poll: seconds between two looks at the state of the machines.
      keep: leave the machines when the run has ended.

    Raises:
      ValueError: a field that no machine could honour, naming it.
    """
    _check(name, setup)
    stop, lock = Stop(), threading.Lock()
    names = _names(job, name)
    waiting = list(names)
    codes: dict[int | None, int] = {}

    def live() -> None:
        while stop.signal is None:
            with lock:
                if not waiting:
                    return
                index = waiting.pop(0)
            prefix = "" if index is None else f"{names[index]} "

            def say(line: str, prefix: str = prefix) -> None:
                with lock:
                    print(prefix + line, flush=True)

            one = dataclasses.replace(job, sweep=None, command=job.arguments(index))
            codes[index] = Life(names[index], one, request, setup, patience, poll, keep, stop, say).live()

    at_once = job.sweep.at_once if job.sweep else None
    threads = [threading.Thread(target=live) for _ in range(min(at_once or len(names), len(names)))]
    previous = {number: signal.signal(number, stop.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    # One without a code was not begun, or is a fault of ours, which its thread has shown.
    ends = [codes.get(index, 1 if stop.signal is None else stop.code) for index in names]
    if job.sweep is not None:
        said = ", ".join(f"{one} {code}" for one, code in zip(names.values(), ends))
        print(f"[launch] exit codes: {said}", flush=True)
    return next((code for code in ends if code), 0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = Parser("launch.tpu", __doc__)
    add = parser.add_argument
    add("--name", default="maskformer", help="of the queued resource; those of a sweep get -INDEX (default maskformer)")
    add("--zone", required=True, help="such as us-east5-b")
    add("--project", help="default: that of gcloud")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--topology", metavar="KIND:SHAPE", help="of each slice, such as v5e:4x4 or v5p:4x4x8")
    kind.add_argument("--accelerator-type", metavar="TYPE", help="instead, in the words of the Cloud: v5p-384")
    add("--slices", type=counts, default=[1], metavar="N[,N...]", help="how many; 4,2,1 takes what can be had")
    add("--patience", type=number, metavar="S",
        help=f"with --slices 4,2: wait so long for a number of slices (default {PATIENCE:g})")  # fmt: skip
    add("--runtime-version", metavar="IMAGE", help="default: that of the generation")
    add("--spot", action="store_true", help="machines that cost less and may be taken away")
    add("--reserved", action="store_true", help="machines of a reservation")
    add("--valid-until-duration", metavar="6h", help="give up when there are no machines by then")
    add("--create-extra", action="append", default=[], metavar="OPTION", help="--create-extra=--network=x; repeatable")
    add("--ssh-extra", action="append", default=[], metavar="OPTION", help="--ssh-extra=--internal-ip; repeatable")
    add("--setup", action="append", default=[], metavar="LINE", help="a shell line for each worker; may be repeated")
    add("--keep", action="store_true", help="leave the machines at the end")
    add("--poll", type=number, metavar="S", help=f"with --submit: seconds between two looks at the state ({POLL:g})")
    add("--output", metavar="FILE", help="write the script there rather than print it")
    add("--submit", action="store_true", help="do it, and stay with the run until its end")
    parser.job_flags()
    arguments = parser.parse(argv)
    try:
        patience, several = arguments.patience, len(arguments.slices) > 1
        check(patience is None or several, "--patience", patience, "--slices of several counts")
        check(arguments.poll is None or arguments.submit, "--poll", arguments.poll, "--submit")
        poll = POLL if arguments.poll is None else arguments.poll
        request = Request(
            zone=arguments.zone,
            accelerator_type=arguments.accelerator_type or accelerator(arguments.topology),
            slices=tuple(arguments.slices),
            runtime_version=arguments.runtime_version,
            project=arguments.project,
            spot=arguments.spot,
            reserved=arguments.reserved,
            valid_until_duration=arguments.valid_until_duration,
            create_extra=tuple(arguments.create_extra),
            ssh_extra=tuple(arguments.ssh_extra),
        )
        job = parser.job(arguments, request.workers(request.slices[0]))
        parser.warn_of_local_workdir(job)
        what = dict(name=arguments.name, setup=arguments.setup, keep=arguments.keep)
        if arguments.output or not arguments.submit:
            code = deliver(lambda: render(job, request, **what), str, arguments.output)
            if code or not arguments.submit:
                return code
        return submit(job, request, **what, patience=PATIENCE if patience is None else patience, poll=poll)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
