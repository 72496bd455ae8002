"""Writes the sbatch file that runs one command on a Slurm cluster, or submits it.

    python -m launch.slurm --name bert --nodes 2 --tasks-per-node 4 --time 8:00:00 -- \\
        maskformer train --config=configs/bert.py:base --workdir=runs/bert

prints the file; `--output FILE` writes it, `--submit` hands it to sbatch and prints the job's number. Run it in the
folder that the job shall run in.

With `--array 0-7` the job becomes eight, and `--sweep-index=<its number>` is added to the command of each. To use the
number otherwise write `{index}` where it belongs: `-- python train.py --seed={index}`.

The processes get SIGTERM `--signal-lead` seconds before the time limit. A command that then saves and exits with code
75 is requeued, at most `--max-requeues` times.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence

_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_NAME = re.compile(r"[\w.@:+,\[\]-]+")
_TASK = '"$SLURM_ARRAY_TASK_ID"'


def seconds(time: str) -> int:
    """Reads a Slurm time limit: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
      ValueError: it is none of these.

    >>> seconds("90"), seconds("8:00:00"), seconds("1-12")
    (5400, 28800, 129600)
    """
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", time):
        raise ValueError(f"--time {time!r}: expected minutes, H:M:S or D-H:M:S, for example 8:00:00")
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, second = parts + [0] * (3 - len(parts))
    else:
        hours, minutes, second = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + second


def render(
    command: Sequence[str],
    *,
    name: str = "maskformer",
    nodes: int = 1,
    tasks_per_node: int = 1,
    time: str = "60",
    cpus_per_task: int | None = None,
    gpus_per_node: int | None = None,
    partition: str | None = None,
    array: str | None = None,
    signal_lead: int = 120,
    max_requeues: int = 100,
    logs: str = "runs/slurm",
    setup: Sequence[str] = (),
    extra: Sequence[str] = (),
    bin_dir: str | None = None,
) -> str:
    """The text of an sbatch file.

    Args:
      command: the program and its arguments; every task of the job runs it.
      time: the limit of one run, in a format of Slurm.
      array: for example `0-7` or `0-99%4` (at most four at a time).
      signal_lead: seconds before the limit at which the processes get SIGTERM.
      logs: folder of the logs, one file for each job and array task, made at submission.
      setup: shell lines that run first, as written (`module load ...`).
      extra: further sbatch options, each as `--account=x`.
      bin_dir: put in front of PATH; the folder of the Python that submits, by default, where that is a virtual
        environment.

    Raises:
      ValueError: a field Slurm would refuse or misread, naming the field and what it expects.
    """
    limit = seconds(time)
    _check(command, "the command is empty: write it after `--`")
    for field, value in {"--name": name, "--partition": partition, "--logs": logs}.items():
        pattern = r"[\w./+@:-]+" if field == "--logs" else _NAME
        _check(value is None or re.fullmatch(pattern, value), f"{field} {value!r}: expected letters, digits, -._")
    for field, count in {
        "--nodes": nodes, "--tasks-per-node": tasks_per_node, "--cpus-per-task": cpus_per_task,
        "--gpus-per-node": gpus_per_node,
    }.items():  # fmt: skip
        _check(count is None or count >= 1, f"{field} {count}: expected at least 1")
    _check(array is None or _ARRAY.fullmatch(array), f"--array {array!r}: expected for example 0-7, 1,3,5 or 0-99%4")
    _check(0 < signal_lead < limit, f"--signal-lead {signal_lead}: expected 1 to {limit - 1} s, inside --time {time}")
    _check(max_requeues >= 0, f"--max-requeues {max_requeues}: expected at least 0")
    for option in extra:
        _check(re.fullmatch(r"--[a-z-]+(=[^\n]*)?", option), f"--sbatch-extra {option!r}: expected --option=value")

    options = {
        "job-name": name, "nodes": nodes, "ntasks-per-node": tasks_per_node, "cpus-per-task": cpus_per_task,
        "gpus-per-node": gpus_per_node, "time": time, "partition": partition, "array": array,
        "output": f"{logs}/{name}-{'%A_%a' if array else '%j'}.log",
    }  # fmt: skip
    header = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    header += [
        "#SBATCH --requeue",
        "# A requeued run goes on in the same log.",
        "#SBATCH --open-mode=append",
        "# TERM goes to the processes that srun starts, not to this shell (that would be B:TERM).",
        f"#SBATCH --signal=TERM@{signal_lead}",
        *(f"#SBATCH {option}" for option in extra),
    ]
    if bin_dir is None and sys.prefix != sys.base_prefix:
        bin_dir = os.path.join(sys.prefix, "bin")
    body = [f'export PATH={shlex.quote(bin_dir)}:"$PATH"'] if bin_dir else []
    body += ["export PYTHONUNBUFFERED=1", *setup, "", *_srun(command, cpus_per_task, array is not None), "code=$?", ""]
    return "\n".join(["#!/bin/bash", *header, "", *body, _requeue(max_requeues)])


def _srun(command: Sequence[str], cpus_per_task: int | None, in_array: bool) -> list[str]:
    used = [word for word in command if "{index}" in word]
    _check(in_array or not used, f"{' '.join(used)}: {{index}} needs --array")
    words = [_TASK.join(shlex.quote(part) if part else "" for part in word.split("{index}")) for word in command]
    if in_array and not used and not any(word.startswith("--sweep-index") for word in command):
        words.append(f"--sweep-index={_TASK}")
    srun = "srun --label --kill-on-bad-exit=0 --wait=120"
    if cpus_per_task:
        srun += f" --cpus-per-task={cpus_per_task}"  # since Slurm 22.05 srun does not take it over from sbatch
    return [
        "# Processes find each other through Slurm's variables. GPUs of a node are shared evenly among its tasks;",
        "# set JAX_LOCAL_DEVICE_IDS for each task to share them otherwise.",
        "# The first task to end leaves the others 120 s, so that all can save and the exit code stays theirs.",
        srun + " \\",
        "  " + " ".join(words),
    ]


def _requeue(max_requeues: int) -> str:
    # In an array, SLURM_JOB_ID of one task is the number of the whole array, and requeues all of it.
    return f"""\
if [ "$code" -eq 75 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then
  job=$SLURM_JOB_ID
  [ -z "${{SLURM_ARRAY_TASK_ID:-}}" ] || job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
  echo "exit code 75 (stopped after saving): requeueing $job"
  scontrol requeue "$job"
fi
exit "$code"
"""


def _check(fine: object, message: str) -> None:
    if not fine:
        raise ValueError(message)


def submit(script: str, logs: str) -> str:
    """Hands the text of an sbatch file to sbatch; returns the number of the job.

    Raises:
      RuntimeError: sbatch is missing, or refused it, with its own words.
    """
    pathlib.Path(logs).mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, text=True, capture_output=True)
    except FileNotFoundError:
        raise RuntimeError("sbatch was not found: submit from a login node of the cluster") from None
    if done.returncode:
        raise RuntimeError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--name", default="maskformer", help="name of the job")
    add("--nodes", type=int, default=1, metavar="N")
    add("--tasks-per-node", type=int, default=1, metavar="N", help="processes on each node (default 1)")
    add("--time", required=True, help="limit of one run: minutes, H:M:S or D-H:M:S")
    add("--cpus-per-task", type=int, metavar="N")
    add("--gpus-per-node", type=int, metavar="N")
    add("--partition")
    add("--array", help="runs of a sweep: 0-7, 1,3,5 or 0-99%%4 (at most four at a time)")
    add("--signal-lead", type=int, default=120, metavar="S", help="seconds of SIGTERM before the limit (default 120)")
    add("--max-requeues", type=int, default=100, metavar="N", help="give up after so many (default 100)")
    add("--logs", default="runs/slurm", help="folder of the logs (default runs/slurm)")
    add("--setup", action="append", default=[], metavar="LINE", help="a shell line to run first; may be repeated")
    add("--sbatch-extra", action="append", default=[], metavar="OPTION", help="--sbatch-extra=--account=x; repeatable")
    add("--output", metavar="FILE", help="write the sbatch file there rather than print it")
    add("--submit", action="store_true", help="hand it to sbatch and print the number of the job")
    add("command", nargs="*", metavar="-- command", help="what every task runs")
    args = vars(parser.parse_args(argv))
    output, send, extra = args.pop("output"), args.pop("submit"), args.pop("sbatch_extra")
    try:
        script = render(extra=extra, **args)
        if output:
            pathlib.Path(output).write_text(script)
        if send:
            print(submit(script, args["logs"]))
        elif not output:
            print(script, end="")
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
