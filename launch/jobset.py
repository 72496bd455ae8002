"""One run as a JobSet, the object by which Kubernetes starts, restarts and ends all processes of it together.

A slice of TPUs is one Job of the JobSet and a host one pod of it; on GPU all hosts are one Job. The exit code of a
process decides what happens, by two policies that work together. A Job has `podFailurePolicy`: it names the codes of
which it says, in the message of its failure, that they were seen. The JobSet has `failurePolicy`: it reads those
messages, which JobSet does from version 0.10 on, and fails, starts again for nothing, or starts again and counts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from launch.accelerators import Target
from launch.job import EX_INTERRUPTED, EX_TEMPFAIL, EX_USAGE, Job, check, check_count

NAME_LABEL = "app.kubernetes.io/part-of"
KEPT_DAYS = 7  # after its end, so that a weekend leaves time to read the logs
_LONGEST_POD_NAME = 63
_SUFFIX = "-abcde"  # a Job gives each of its pods six characters more
_COORDINATOR_PORT = 8476
# libtpu between hosts, Megascale between slices, the metrics of libtpu.
_TPU_PORTS = (8471, 8080, 8431)
# The group that may write to mounts, and the user of the image that our Dockerfile builds.
_GROUP = 1000
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_NODE_LABEL = r"([A-Za-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,62})"
_OURS = ("JAX_PLATFORMS", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "MASKFORMER_DISTRIBUTED",
         "PYTHONUNBUFFERED")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mount:
    """A folder of the container: `source` is a persistent volume claim, or a bucket written `gs://name`.

    >>> Mount.parse("gs://data:/mnt/data")
    Mount(source='gs://data', path='/mnt/data')
    """

    source: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Mount:
        match = re.fullmatch(f"(gs://[a-z0-9][a-z0-9._-]{{1,220}}|{_LABEL}):(/[^:]*[^:/])", text)
        if match is None:
            raise ValueError(
                f"--mount {text!r:.120}: expected CLAIM:/folder or gs://BUCKET:/folder, for example runs:/mnt/runs"
            )
        return cls(match[1], match[3])


@dataclasses.dataclass(frozen=True)
class Pod:
    """What all containers of a job have in common, whatever machines they run on.

    Args:
      image: the container image that has the command.
      env: variables, each as `NAME=value`.
      secrets: names of Kubernetes secrets; each of their keys becomes a variable.
      mounts: folders.
      setup: lines of shell that run before the command, in its shell.
      service_account: the Kubernetes service account, which may stand for one of Google Cloud.
      node_labels: labels that the nodes must have, each as `name=value`, such as those of a reservation.
      spot: on spot machines.
      queue: the LocalQueue of Kueue in which it waits.
      namespace: where it lives; that of kubectl's context by default.
      privileged: as root and with every device of the host.
      host_network: whether containers use the network of their host; None: between slices only.

    Raises:
      ValueError: a field that Kubernetes would refuse or misread.
    """

    image: str
    env: Sequence[str] = ()
    secrets: Sequence[str] = ()
    mounts: Sequence[Mount] = ()
    setup: Sequence[str] = ()
    service_account: str | None = None
    node_labels: Sequence[str] = ()
    spot: bool = False
    queue: str | None = None
    namespace: str | None = None
    privileged: bool = False
    host_network: bool | None = None

    def __post_init__(self) -> None:
        check(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./:@-]{0,254}", self.image), "--image", self.image,
              "an image, for example us-docker.pkg.dev/PROJECT/maskformer/train:v1")  # fmt: skip
        names = [("--service-account", self.service_account), ("--queue", self.queue), ("--namespace", self.namespace)]
        for field, name in [*names, *(("--secret", name) for name in self.secrets)]:
            check(name is None or re.fullmatch(_LABEL, name), field, name, "lower-case letters, digits and -")
        seen = set(_OURS)
        for text in self.env:
            check(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*=[^\0]*", text, re.DOTALL), "--env", text, "NAME=value")
            name = text.partition("=")[0]
            check(name not in seen, "--env", text, "a variable that this launcher does not set, named once")
            seen.add(name)
        for text in self.node_labels:
            check(re.fullmatch(f"{_NODE_LABEL}=[A-Za-z0-9_.-]{{0,63}}", text), "--node-label", text, "name=value")
        for line in self.setup:
            check("\0" not in line, "--setup", line, "no NUL character")
        paths = [mount.path for mount in self.mounts]
        for path in paths:
            check(paths.count(path) == 1 and path != "/dev/shm", "--mount", path, "a folder of its own")


def jobset(job: Job, target: Target, pod: Pod, name: str, slices: int = 1, index: int | None = None) -> dict[str, Any]:
    """The JobSet of one run.

    Args:
      job: `slices` times the hosts of `target` are its processes.
      name: of the job; the JobSets of a sweep add their number.
      slices: how many slices of TPUs; 1 on GPU.
      index: which run of the sweep.

    Raises:
      ValueError: names that get too long, a number of slices that GKE cannot connect, processes that do not fit.
    """
    check_count("--slices", slices)
    check(slices == 1 or target.tpu, "--slices", slices, "1 on GPU, where --hosts says how many machines")
    check(slices == 1 or target.hosts > 1, "--slices", slices,
          "1 with a slice of one host: GKE connects slices of several hosts only")  # fmt: skip
    check(job.processes == slices * target.hosts, "--processes", job.processes, f"{slices * target.hosts}, one a host")
    check(job.lead == int(job.lead), "--lead", job.lead, "whole seconds")
    part = "slice" if target.tpu else "hosts"
    full = name if index is None else f"{name}-{index}"
    _check_name(job, name, part, slices, target.hosts)

    spec = _pod(job, target, pod, full, slices, index)
    template: dict[str, Any] = {"metadata": {"labels": {NAME_LABEL: name}}, "spec": spec}
    if any(mount.source.startswith("gs://") for mount in pod.mounts):
        template["metadata"]["annotations"] = {"gke-gcsfuse/volumes": "true"}
    work = {
        "parallelism": target.hosts,
        "completions": target.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": _pod_failures(),
        "template": template,
    }
    metadata: dict[str, Any] = {"name": full}
    if pod.namespace:
        metadata["namespace"] = pod.namespace
    metadata["labels"] = {NAME_LABEL: name} | ({"kueue.x-k8s.io/queue-name": pod.queue} if pod.queue else {})
    if target.tpu and target.hosts > 1:
        # The hosts of a slice are one node pool, and a node pool is one slice.
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": KEPT_DAYS * 86400,
            "failurePolicy": {"maxRestarts": job.restarts, "rules": _restarts()},
            "replicatedJobs": [{"name": part, "replicas": slices, "template": {"spec": work}}],
        },
    }


def _pod_failures() -> dict[str, Any]:
    """What a Job makes of a pod that failed: each rule only gives its failure a message that JobSet can read.

    Any other failure ends the Job too, since nothing of it may be retried (`backoffLimit`), and its message says so.
    """
    codes = [EX_USAGE, EX_TEMPFAIL, EX_INTERRUPTED]
    return {
        "rules": [
            {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": codes}},
            {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        ]
    }


def _restarts() -> list[dict[str, Any]]:
    """What the JobSet makes of it. Without a rule that applies, it starts again and counts."""
    usage = [f"exit code ({EX_USAGE}|{EX_INTERRUPTED}) matching"]
    saved = [f"exit code {EX_TEMPFAIL} matching", "condition DisruptionTarget matching"]
    rules = [("usage", "FailJobSet", usage), ("preempted", "RestartJobSetAndIgnoreMaxRestarts", saved)]
    return [
        {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": patterns,
        }
        for name, action, patterns in rules
    ]


def _check_name(job: Job, name: str, part: str, slices: int, hosts: int) -> None:
    check(re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", name), "--name", name,
          "lower-case letters, digits and -, the first a letter")  # fmt: skip
    last = f"-{max(job.sweep.indices())}" if job.sweep else ""
    rest = f"{last}-{part}-{slices - 1}-{hosts - 1}{_SUFFIX}"
    longest = _LONGEST_POD_NAME - len(rest)
    check(len(name) <= longest, "--name", name,
          f"at most {longest} letters, since pods are called {name[:12]}...{rest}")  # fmt: skip


def _pod(job: Job, target: Target, pod: Pod, name: str, slices: int, index: int | None) -> dict[str, Any]:
    spec: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": int(job.lead)}
    between_slices = slices > 1
    if between_slices if pod.host_network is None else pod.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if pod.service_account:
        spec["serviceAccountName"] = pod.service_account
    labels = dict(text.split("=", 1) for text in pod.node_labels)
    for label in labels:
        check(label not in target.selector, "--node-label", label, "a label that this launcher does not choose itself")
    spot = {"cloud.google.com/gke-spot": "true"} if pod.spot else {}
    spec["nodeSelector"] = {**target.selector, **spot, **labels}
    spec["tolerations"] = [{"key": target.resource, "operator": "Exists"}]
    if pod.spot:
        spec["tolerations"].append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"})
    if pod.mounts:
        spec["securityContext"] = {"fsGroup": _GROUP, "fsGroupChangePolicy": "OnRootMismatch"}
    spec["volumes"] = [
        # The 64 MB that a container has otherwise are too few for NCCL and for Grain's workers.
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        *(_volume(number, mount, spec.get("hostNetwork", False)) for number, mount in enumerate(pod.mounts)),
    ]
    spec["containers"] = [_container(job, target, pod, name, slices, index)]
    return spec


def _volume(number: int, mount: Mount, host_network: bool) -> dict[str, Any]:
    if not mount.source.startswith("gs://"):
        return {"name": f"mount-{number}", "persistentVolumeClaim": {"claimName": mount.source}}
    attributes = {"bucketName": mount.source.removeprefix("gs://"), "mountOptions": "implicit-dirs"}
    if host_network:
        attributes["hostNetworkPodKSA"] = "true"
    return {"name": f"mount-{number}", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}


def _container(job: Job, target: Target, pod: Pod, name: str, slices: int, index: int | None) -> dict[str, Any]:
    words = job.arguments(index)
    if pod.setup:
        # The shell replaces itself, so that SIGTERM and the exit code are those of the command.
        words = ["/bin/sh", "-ec", "\n".join([*pod.setup, 'exec "$@"']), *words[:1], *words]
    container: dict[str, Any] = {"name": "train", "image": pod.image, "command": [_literal(word) for word in words]}
    container["env"] = [*_environment(target, name, slices), *_variables(pod.env)]
    if pod.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in pod.secrets]
    ports = _TPU_PORTS if target.tpu else (_COORDINATOR_PORT,)
    container["ports"] = [{"containerPort": port} for port in ports]
    amount = {target.resource: str(target.chips)}
    container["resources"] = {"requests": amount, "limits": amount}
    if pod.privileged:
        container["securityContext"] = {"privileged": True, "runAsUser": 0}
    container["volumeMounts"] = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        *({"name": f"mount-{number}", "mountPath": mount.path} for number, mount in enumerate(pod.mounts)),
    ]
    return container


def _environment(target: Target, name: str, slices: int) -> list[dict[str, Any]]:
    """How the processes find each other, and that none of them trains on its CPU in silence."""
    # Not "cuda,cpu": where a GPU is missing JAX passes over "cuda" in silence, unlike over "tpu".
    platforms = "tpu,cpu" if target.tpu else "cuda"
    variables: list[dict[str, Any]] = [*_variables(["PYTHONUNBUFFERED=1", f"JAX_PLATFORMS={platforms}"])]
    if target.tpu:
        # GKE gives each pod TPU_WORKER_ID and _HOSTNAMES, and MEGASCALE_* between slices; "on" insists on them.
        return variables + (_variables(["MASKFORMER_DISTRIBUTED=on"]) if target.hosts > 1 else [])
    first = f"{name}-hosts-0-0.{name}:{_COORDINATOR_PORT}"
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    found = [f"JAX_COORDINATOR_ADDRESS={first}", f"JAX_NUM_PROCESSES={slices * target.hosts}"]
    return [*variables, *_variables(found), {"name": "JAX_PROCESS_ID", "valueFrom": index}]


def _variables(texts: Sequence[str]) -> list[dict[str, Any]]:
    pairs = (text.split("=", 1) for text in texts)
    return [{"name": name, "value": _literal(value)} if value else {"name": name} for name, value in pairs]


def _literal(text: str) -> str:
    """As it stands after Kubernetes has put variables in the place of $(NAME), for which `$$` is a `$`."""
    return text.replace("$", "$$")


def size(jobset: Mapping[str, Any]) -> int:
    """How many slices a JobSet asks for."""
    return jobset["spec"]["replicatedJobs"][0]["replicas"]
