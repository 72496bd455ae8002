"""Writes the sbatch file that runs one command on a Slurm cluster, or submits it.

    python -m launch.slurm --name bert --nodes 2 --tasks-per-node 4 --time 8:00:00 -- \\
        maskformer train --config=configs/bert.py:base --workdir=runs/bert

prints the file; `--output FILE` writes it, `--submit` hands it to sbatch and prints the job's number. Run it in the
folder that the job shall run in.

With `--array 0-7` the job becomes eight, and `--sweep-index=<its number>` is added to the command of each. To use the
number otherwise write `{index}` where it belongs: `-- python train.py --seed={index}`.

The processes get SIGTERM `--signal-lead` seconds before the time limit. A command that then saves and exits with code
75 is requeued for nothing; one that fails (any code but 0, 2 and 130) is too, at most `--max-restarts` times. Slurm
counts both alike, so the job keeps its own count in a file beside its log.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from launch.job import (
    EX_INTERRUPTED,
    EX_TEMPFAIL,
    EX_USAGE,
    QUICK,
    QUICK_IN_A_ROW,
    Job,
    Parser,
    check,
    check_count,
    deliver,
    whole,
)

_NAME = r"[A-Za-z0-9_.@:+,\[\]-]{1,200}"  # the longest that leaves room for the rest of a log's name
_PATH = r"[A-Za-z0-9_./+@:-]+"
_LONGEST_LEAD = 65535  # sbatch's --signal takes no more
_LONGEST_TIME = 10 * 365 * 86400
_TASK = '"$SLURM_ARRAY_TASK_ID"'


def seconds(time: str) -> int:
    """Reads a Slurm time limit: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
      ValueError: it is none of these, nothing at all (to Slurm 0 means no limit), or longer than ten years.

    >>> seconds("90"), seconds("8:00:00"), seconds("1-12")
    (5400, 28800, 129600)
    """
    number = "[0-9]{1,9}"
    check(
        re.fullmatch(f"({number}-{number}(:{number}){{0,2}}|{number}(:{number}){{0,2}})", time),
        "--time", time, "minutes, H:M:S or D-H:M:S, for example 8:00:00",
    )  # fmt: skip
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, second = parts + [0] * (3 - len(parts))
    else:
        hours, minutes, second = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    limit = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + second
    check(0 < limit <= _LONGEST_TIME, "--time", time, "more than nothing and at most ten years")
    return limit


def render(
    job: Job,
    *,
    time: str,
    name: str = "maskformer",
    nodes: int = 1,
    cpus_per_task: int | None = None,
    gpus_per_node: int | None = None,
    partition: str | None = None,
    logs: str = "runs/slurm",
    setup: Sequence[str] = (),
    extra: Sequence[str] = (),
    bin_dir: str | None = None,
) -> str:
    """The text of an sbatch file.

    Args:
      job: its processes are shared evenly by the nodes, and its sweep becomes an array. They get SIGTERM `job.lead`
        seconds before the time limit.
      time: the limit of one run, in a format of Slurm.
      logs: folder of the logs, one file for each job and array task, made at submission.
      setup: shell lines that run first, as written (`module load ...`).
      extra: further sbatch options, each as `--account=x`, with spaces where they belong.
      bin_dir: put in front of PATH; the folder of the Python that submits, by default, where that is a virtual
        environment.

    Raises:
      ValueError: a field Slurm would refuse or misread, naming the field and what it expects.
    """
    limit = seconds(time)
    for field, value, pattern in (("--name", name, _NAME), ("--partition", partition, _NAME), ("--logs", logs, _PATH)):
        check(value is None or re.fullmatch(pattern, value), field, value, "letters, digits, -._")
    for field, count in (
        ("--nodes", nodes), ("--cpus-per-task", cpus_per_task), ("--gpus-per-node", gpus_per_node),
    ):  # fmt: skip
        if count is not None:
            check_count(field, count)
    check(job.processes % nodes == 0, "--nodes", nodes, f"a divisor of the job's {job.processes} processes")
    longest = min(limit - 1, _LONGEST_LEAD)
    check(
        job.lead == int(job.lead) and 0 < job.lead <= longest,
        "--signal-lead", job.lead, f"1 to {longest} s, inside --time {time}",
    )  # fmt: skip
    for line in setup:
        check("\0" not in line, "--setup", line, "no NUL character")

    options = {
        "job-name": name, "nodes": nodes, "ntasks-per-node": job.processes // nodes, "cpus-per-task": cpus_per_task,
        "gpus-per-node": gpus_per_node, "time": time, "partition": partition, "array": job.sweep,
        "output": f"{logs}/{name}-{'%A_%a' if job.sweep else '%j'}.log",
    }  # fmt: skip
    header = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    header += [
        "#SBATCH --requeue",
        "# A requeued run goes on in the same log.",
        "#SBATCH --open-mode=append",
        "# TERM goes to the processes that srun starts, not to this shell (that would be B:TERM).",
        f"#SBATCH --signal=TERM@{int(job.lead)}",
        *(f"#SBATCH {_quoted(option, ours=options)}" for option in extra),
    ]
    if bin_dir is None and sys.prefix != sys.base_prefix:
        bin_dir = os.path.join(sys.prefix, "bin")
    body = [f'export PATH={shlex.quote(bin_dir)}:"$PATH"'] if bin_dir else []
    folder = "" if logs.startswith("/") else "$PWD/"  # asked before a line of --setup may go elsewhere
    ends = [
        "# How the starts of this job have ended: the exit code and the seconds of each, beside its log.",
        f"SECONDS=0 ends={folder}{shlex.quote(f'{logs}/{name}')}-$SLURM_JOB_ID.ends",
    ]
    body += ["export PYTHONUNBUFFERED=1", *ends, *setup, "", *_srun(job, cpus_per_task), "code=$?", ""]
    return "\n".join(["#!/bin/bash", *header, "", *body, _requeue(job.restarts)])


# What this file decides; said a second time, it would be decided twice.
_DECIDED = ("ntasks", "requeue", "no-requeue", "open-mode", "signal")


def _quoted(option: str, ours: Mapping[str, object]) -> str:
    """An option as one word of an #SBATCH line, where unquoted spaces end it and `#` ends the line."""
    match = re.fullmatch(r"--([a-z-]+)(?:=([^\x00-\x1f\x7f]*))?", option)
    if match is None:
        raise ValueError(f"--sbatch-extra {option!r:.120}: expected --option=value")
    check(match[1] not in {*ours, *_DECIDED}, "--sbatch-extra", option, "an option that this file does not set itself")
    if re.fullmatch(r"[^\s#\"'\\]*", option):
        return option
    escaped = re.sub(r"([\\\"#])", r"\\\1", match[2])
    return f'--{match[1]}="{escaped}"'


def _srun(job: Job, cpus_per_task: int | None) -> list[str]:
    # A piece that is empty needs no quotes, an argument that is empty does.
    words = [_TASK.join(shlex.quote(piece) if piece else "" for piece in pieces) or "''" for pieces in job.pieces()]
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


def _requeue(restarts: int) -> str:
    # The rules of `launch.job.Restarts`, which a node need not have; Slurm itself pauses between two starts.
    # In an array, SLURM_JOB_ID of one task is the number of the whole array, and requeues all of it.
    return f"""\
echo "$code $SECONDS" >> "$ends" || exit "$code"  # what cannot be counted is not started again
failures=0 stops=0
while read -r ended took; do
  if [ "$ended" -ne {EX_TEMPFAIL} ]; then failures=$((failures + 1)) stops=0
  elif [ "$took" -lt {QUICK:.0f} ]; then stops=$((stops + 1))
  else stops=0; fi
done < "$ends"
case $code in
  0 | {EX_USAGE} | {EX_INTERRUPTED}) again= ;;
  {EX_TEMPFAIL}) again="stopped after saving"; [ "$stops" -lt {QUICK_IN_A_ROW} ] || again= ;;
  *) again="failure $failures of at most {restarts}"; [ "$failures" -le {restarts} ] || again= ;;
esac
if [ -n "$again" ]; then
  job=$SLURM_JOB_ID
  [ -z "${{SLURM_ARRAY_TASK_ID:-}}" ] || job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
  echo "exit code $code ($again): requeueing $job"
  scontrol requeue "$job"
else
  rm -f "$ends"
fi
exit "$code"
"""


def submit(script: str, logs: str) -> str:
    """Hands the text of an sbatch file to sbatch; returns the number of the job.

    Raises:
      RuntimeError: sbatch is missing, or refused it, with its own words.
    """
    pathlib.Path(logs).mkdir(parents=True, exist_ok=True)
    text = script.encode("utf-8", "surrogateescape")
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True)
    except FileNotFoundError:
        raise RuntimeError("sbatch was not found: submit from a login node of the cluster") from None
    if done.returncode:
        raise RuntimeError(f"sbatch refused the job: {' '.join(done.stderr.decode(errors='replace').split())}")
    return done.stdout.decode(errors="replace").strip().split(";")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = Parser("launch.slurm", __doc__)
    add = parser.add_argument
    add("--name", default="maskformer", help="name of the job")
    add("--nodes", type=whole(), default=1, metavar="N")
    add("--tasks-per-node", type=whole(), default=1, metavar="N", help="processes on each node (default 1)")
    add("--time", required=True, help="limit of one run: minutes, H:M:S or D-H:M:S")
    add("--cpus-per-task", type=whole(), metavar="N")
    add("--gpus-per-node", type=whole(), metavar="N")
    add("--partition")
    add("--logs", default="runs/slurm", help="folder of the logs (default runs/slurm)")
    add("--setup", action="append", default=[], metavar="LINE", help="a shell line to run first; may be repeated")
    add("--sbatch-extra", action="append", default=[], metavar="OPTION", help="--sbatch-extra=--account=x; repeatable")
    add("--output", metavar="FILE", help="write the sbatch file there rather than print it")
    add("--submit", action="store_true", help="hand it to sbatch and print the number of the job")
    parser.job_flags("--signal-lead")
    arguments = parser.parse(argv)

    def script() -> str:
        processes = arguments.nodes * arguments.tasks_per_node
        return render(
            parser.job(arguments, processes),
            time=arguments.time,
            name=arguments.name,
            nodes=arguments.nodes,
            cpus_per_task=arguments.cpus_per_task,
            gpus_per_node=arguments.gpus_per_node,
            partition=arguments.partition,
            logs=arguments.logs,
            setup=arguments.setup,
            extra=arguments.sbatch_extra,
        )

    return deliver(script, lambda text: submit(text, arguments.logs), arguments.output, arguments.submit)


if __name__ == "__main__":
    sys.exit(main())
