"""Writes the JobSet that runs one command on Google Kubernetes Engine, on TPU or GPU, or submits it.

    python -m launch.gke --name bert --topology v6e:4x4 --slices 2 --image IMAGE -- \\
        maskformer train --config=configs/bert.py:base --workdir=gs://BUCKET/runs/bert

prints the manifest; `--output FILE` writes it, `--submit` hands it to kubectl. `--gpu h100:8 --hosts 2` instead of
`--topology` and `--slices` takes machines with GPUs. One process runs on each host.

With `--array 0-7` there are eight JobSets, and `--sweep-index=<its number>` is added to the command of each. To use the
number otherwise write `{index}` where it belongs: `-- python train.py --seed={index}`.

Kubernetes starts all processes of a run again, for nothing after exit code 75 or when a machine is taken away, at most
`--max-restarts` times after a failure, and never after a usage error (2) or Ctrl-C (130).

With `--submit` the launcher stays until the runs have ended where it has more to do: for `--max-parallel`, for
`--slices 4,2,1` (takes what is there), and for `--wait`. It may be stopped and started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launch.accelerators import Target, gpu_hosts, tpu_slice
from launch.job import EX_USAGE, Job, Parser, check, counts, deliver, number, whole
from launch.jobset import Mount, Pod, jobset
from launch.kubectl import Kubectl, Run, supervise
from launch.manifest import to_yaml

PATIENCE = 900.0
PERIOD = 15.0


def render(job: Job, target: Target, pod: Pod, *, name: str = "maskformer", slices: int = 1) -> str:
    """The manifest: a JobSet for each run of the job.

    Args:
      job: its processes are `slices` times the hosts of `target`.
      target: the machines, from `accelerators.tpu_slice` or `accelerators.gpu_hosts`.
      pod: what runs on each of them.
      name: of the JobSet; in a sweep the number of the run follows it.
      slices: of TPUs.

    Raises:
      ValueError: a field that Kubernetes, JobSet or GKE would refuse or misread, naming it and what it expects.
    """
    return to_yaml([jobset(job, target, pod, name, slices, index) for index in job.runs()])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = _parser()
    arguments = parser.parse(argv)
    try:
        target, pod, job = _read(arguments)
    except ValueError as error:
        parser.error(str(error))
    parser.warn_of_local_workdir(
        job, [mount.path for mount in pod.mounts], ", or mount a claim there: --mount CLAIM:/FOLDER"
    )
    kubectl = Kubectl(arguments.context, arguments.namespace)
    name, sizes = arguments.name, arguments.slices
    if not _stays(arguments, job):
        return deliver(
            lambda: render(job, target, pod, name=name, slices=sizes[0]), kubectl.create, arguments.output,
            arguments.submit,
        )  # fmt: skip
    runs = [_run(job, target, pod, name, sizes, index) for index in job.runs()]
    try:
        for run in runs:
            for slices in sizes:
                run.make(slices, 0)  # whatever is wrong with one of them is said before the first is there
        return supervise(
            kubectl, name, runs, at_once=job.sweep.at_once if job.sweep else None,
            patience=PATIENCE if arguments.patience is None else arguments.patience,
            period=PERIOD if arguments.period is None else arguments.period,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EX_USAGE


def _stays(arguments: argparse.Namespace, job: Job) -> bool:
    """Whether the launcher has more to do than to hand over a manifest."""
    several = len(arguments.slices) > 1 or (job.sweep is not None and job.sweep.at_once is not None)
    return arguments.wait or several


def _parser() -> Parser:
    parser = Parser("launch.gke", __doc__)
    add = parser.add_argument
    add("--name", default="maskformer", help="name of the JobSet (default maskformer)")
    add("--image", required=True, help="container image that has the command")
    add("--topology", metavar="TPU", help="generation and shape of a slice in chips: v5e:4x8, v5p:2x2x4, v6e:4x4")
    add("--slices", type=counts, default=[1], metavar="N", help="how many slices; 4,2,1: as many of those as there are")
    add("--chips-per-host", type=whole(), metavar="N", help="4: two hosts for a slice of 2x4, not one with 8 chips")
    add("--gpu", metavar="GPU", help="instead of --topology: l4:1, a100:8, h100:8, h200:8, ... on each host")
    add("--hosts", type=whole(), metavar="N", help="how many hosts with GPUs (default 1)")
    add("--spot", action="store_true", help="on spot machines")
    add("--queue", metavar="NAME", help="LocalQueue of Kueue in which it waits for its quota")
    add("--node-label", action="append", default=[], metavar="NAME=VALUE", help="only on such nodes; repeatable")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable; repeatable")
    add("--secret", action="append", default=[], metavar="NAME", help="a secret, each key a variable; repeatable")
    add("--setup", action="append", default=[], metavar="LINE", help="a shell line to run first; repeatable")
    add("--mount", action="append", default=[], metavar="SOURCE:/FOLDER", help="a claim or gs://BUCKET; repeatable")
    add("--service-account", metavar="NAME", help="Kubernetes service account")
    add("--namespace", metavar="NAME", help="namespace (default: that of kubectl's context)")
    add("--privileged", action="store_true", help="as root and with all devices of the host")
    add("--host-network", action=argparse.BooleanOptionalAction, help="the host's network (default: between slices)")
    add("--output", metavar="FILE", help="write the manifest there rather than print it")
    add("--submit", action="store_true", help="hand it to kubectl")
    add("--context", metavar="NAME", help="context of kubectl, for --submit")
    add("--wait", action="store_true", help="with --submit: stay until all runs have ended")
    add("--patience", type=number, metavar="S", help=f"with --slices 4,2: wait so long for machines ({PATIENCE:g})")
    add("--period", type=number, metavar="S", help=f"where it stays: seconds between two looks ({PERIOD:g})")
    parser.job_flags()
    return parser


def _read(arguments: argparse.Namespace) -> tuple[Target, Pod, Job]:
    """The machines, what runs on them, and the job.

    Raises:
      ValueError: a field, or fields that contradict each other.
    """
    sizes = arguments.slices
    shown = ",".join(map(str, sizes))
    if (arguments.topology is None) == (arguments.gpu is None):
        raise ValueError("expected either --topology, for TPU, or --gpu")
    if arguments.gpu:
        check(sizes == [1], "--slices", shown, "--topology: with --gpu, --hosts says how many machines")
        check(arguments.chips_per_host is None, "--chips-per-host", arguments.chips_per_host, "--topology, not --gpu")
        target = gpu_hosts(arguments.gpu, arguments.hosts or 1)
    else:
        check(arguments.hosts is None, "--hosts", arguments.hosts, "--gpu: with --topology the shape says how many")
        target = tpu_slice(arguments.topology, arguments.chips_per_host)
    check(sizes == sorted(set(sizes), reverse=True), "--slices", shown, "sizes that get smaller, such as 4,2,1")
    check(arguments.patience is None or len(sizes) > 1, "--patience", arguments.patience, "--slices of several sizes")
    check(arguments.context is None or arguments.submit, "--context", arguments.context, "--submit")
    pod = Pod(
        image=arguments.image,
        env=arguments.env,
        secrets=arguments.secret,
        mounts=[Mount.parse(text) for text in arguments.mount],
        setup=arguments.setup,
        service_account=arguments.service_account,
        node_labels=arguments.node_label,
        spot=arguments.spot,
        queue=arguments.queue,
        namespace=arguments.namespace,
        privileged=arguments.privileged,
        host_network=arguments.host_network,
    )
    job = Parser.job(arguments, sizes[0] * target.hosts)
    stays = _stays(arguments, job)
    expected = "--wait, or what else stays, such as --slices 4,2"
    check(arguments.period is None or stays, "--period", arguments.period, expected)
    if stays and (arguments.output or not arguments.submit):
        limit = "" if arguments.at_once is None else f"--max-parallel {arguments.at_once}"
        if job.sweep is not None and job.sweep.at_once is not None:
            limit = limit or f"--array {job.sweep}"
        typed = [*["--wait"] * arguments.wait, *[f"--slices {shown}"] * (len(sizes) > 1), *[limit] * bool(limit)]
        raise ValueError(
            f"{' and '.join(typed)} {'needs' if len(typed) == 1 else 'need'} --submit, without --output: Kubernetes "
            "does not do this alone, so the launcher stays and makes the JobSets one by one"
        )
    return target, pod, job


def _run(job: Job, target: Target, pod: Pod, name: str, sizes: Sequence[int], index: int | None) -> Run:
    def make(slices: int, failures: int) -> Mapping[str, Any]:
        left = max(job.restarts - failures, 0)
        one = dataclasses.replace(job, processes=slices * target.hosts, restarts=left)
        return jobset(one, target, pod, name, slices, index)

    return Run(name if index is None else f"{name}-{index}", sizes, make)


if __name__ == "__main__":
    sys.exit(main())
