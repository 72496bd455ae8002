import json
import pathlib
import re
import subprocess
import sys

import pytest

from launch.accelerators import gpu_hosts, tpu_slice
from launch.job import Job, Sweep
from launch.jobset import Mount, Pod, jobset

HERE = pathlib.Path(__file__).parent
TRAIN = ["maskformer", "train", "--config=configs/bert.py:tiny"]
IMAGE = "us-docker.pkg.dev/project/maskformer/train:v1"


def rendered(command=TRAIN, *, topology="v6e:4x4", gpu=None, hosts=1, slices=1, name="bert", sweep=None, index=None,
             restarts=10, lead=120, mounts=(), **pod):  # fmt: skip
    target = gpu_hosts(gpu, hosts) if gpu else tpu_slice(topology)
    job = Job(command, slices * target.hosts, restarts, lead, Sweep.parse(sweep) if sweep else None)
    pod = Pod(**{"image": IMAGE, "mounts": [Mount.parse(text) for text in mounts]} | pod)
    return jobset(job, target, pod, name, slices, index)


def parts(document):
    """The replicated job, its Job, its pod and its container."""
    (replicated,) = document["spec"]["replicatedJobs"]
    work = replicated["template"]["spec"]
    pod = work["template"]["spec"]
    (container,) = pod["containers"]
    return replicated, work, pod, container


EVERYTHING = {
    "slices": 2, "spot": True, "queue": "team", "service_account": "trainer", "namespace": "research",
    "secrets": ["wandb"], "env": ["A=b=c", "EMPTY="], "setup": ["export B=1"], "mounts": ["runs:/mnt/runs", "gs://b1:/mnt/b"],
    "node_labels": ["cloud.google.com/reservation-name=big"], "privileged": True,
}  # fmt: skip
JOBSETS = {
    "one host of TPUs": {"topology": "v5e:2x4"},
    "a slice": {},
    "two slices": {"topology": "v5p:2x2x2", "slices": 2},
    "a run of a sweep": {"sweep": "0-99%4", "index": 99},
    "GPUs": {"gpu": "h100:8", "hosts": 16},
    "everything": EVERYTHING,
}


# What the schema of the API server says.


def strict(schema):
    """As `--validate=strict` has it: what the schema does not name is refused."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {
        key: {name: strict(item) for name, item in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
    }
    return {"additionalProperties": False} | result if "properties" in result else result


@pytest.fixture(scope="session")
def schema_errors():
    jsonschema = pytest.importorskip("jsonschema")
    schema = strict(json.loads((HERE / "jobset_schema" / "jobset.json").read_text()))
    validator = jsonschema.Draft202012Validator(schema)
    return lambda document: [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("fields", JOBSETS.values(), ids=JOBSETS)
def test_a_jobset_is_valid_under_the_schema_of_jobset(fields, schema_errors):
    assert schema_errors(rendered(**fields)) == []


def test_the_schema_refuses_what_it_should(schema_errors):
    document = rendered()
    document["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    document["spec"]["failurePolicy"]["maxRestart"] = 1
    document["spec"]["replicatedJobs"][0]["replicas"] = "2"
    assert len(schema_errors(document)) == 3


# What the webhooks of JobSet (pkg/webhooks/jobset_webhook.go) and the API server's own checks of a Job and a pod say,
# which no schema expresses.

DNS_LABEL = "[a-z]([-a-z0-9]*[a-z0-9])?"
REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}


def webhook_errors(document):
    errors = []
    name, spec = document["metadata"]["name"], document["spec"]
    names = [replicated["name"] for replicated in spec["replicatedJobs"]]
    for replicated in spec["replicatedJobs"]:
        work = replicated["template"]["spec"]
        pod = work["template"]["spec"]
        job = f"{name}-{replicated['name']}-{replicated['replicas'] - 1}"
        pod_name = f"{job}-{work['completions'] - 1}-abcde"
        for full in (job, pod_name):
            if not re.fullmatch(DNS_LABEL, full):
                errors.append(f"{full}: not a DNS label")
            if len(full) > 63:
                errors.append(f"{full}: longer than 63")
        if work["completionMode"] != "Indexed" or work["completions"] != work["parallelism"]:
            errors.append("not as many pods at once as indices")
        if pod["restartPolicy"] != "Never":
            errors.append("podFailurePolicy needs restartPolicy Never")
        for rule in work["podFailurePolicy"]["rules"]:
            if ("onExitCodes" in rule) == ("onPodConditions" in rule):
                errors.append("a rule of a Job has one of onExitCodes and onPodConditions")
            codes = rule.get("onExitCodes", {}).get("values", [])
            if codes != sorted(set(codes)) or 0 in codes:
                errors.append("exit codes are ordered, different, and never 0")
            if rule.get("onExitCodes", {}).get("containerName") not in (None, *(c["name"] for c in pod["containers"])):
                errors.append("onExitCodes names no container")
        volumes = [volume["name"] for volume in pod["volumes"]]
        for container in pod["containers"]:
            mounts = container["volumeMounts"]
            if {mount["name"] for mount in mounts} != set(volumes) or len(set(volumes)) < len(volumes):
                errors.append("volumes and mounts differ")
            if len({mount["mountPath"] for mount in mounts}) < len(mounts):
                errors.append("two mounts in one place")
            if len({variable["name"] for variable in container["env"]}) < len(container["env"]):
                errors.append("a variable twice")
            if container["resources"]["requests"] != container["resources"]["limits"]:
                errors.append("extended resources have one amount")
            if pod.get("hostNetwork") and pod.get("dnsPolicy") != "ClusterFirstWithHostNet":
                errors.append("no cluster DNS on the host's network")
    rules = spec["failurePolicy"]["rules"]
    if len({rule["name"] for rule in rules}) < len(rules):
        errors.append("two rules of one name")
    for rule in rules:
        if not re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]) or len(rule["name"]) > 128:
            errors.append("the name of a rule")
        if not set(rule["onJobFailureReasons"]) <= REASONS:
            errors.append("an unknown reason")
        if not set(rule.get("targetReplicatedJobs", [])) <= set(names):
            errors.append("an unknown replicated job")
    return errors


@pytest.mark.parametrize("fields", JOBSETS.values(), ids=JOBSETS)
def test_a_jobset_keeps_the_rules_of_its_webhooks(fields):
    assert webhook_errors(rendered(**fields)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["metadata"].update(name="b" * 60), "longer than 63"),
        (lambda d: d["metadata"].update(name="0bert"), "not a DNS label"),
        (lambda d: parts(d)[1].update(completions=3), "not as many pods at once"),
        (lambda d: parts(d)[2].update(restartPolicy="OnFailure"), "needs restartPolicy Never"),
        (lambda d: parts(d)[1]["podFailurePolicy"]["rules"][0]["onExitCodes"].update(values=[75, 2]), "ordered"),
        (lambda d: parts(d)[3].update(name="other"), "names no container"),
        (lambda d: d["spec"]["failurePolicy"]["rules"][0].update(name="preempted"), "two rules of one name"),
        (lambda d: d["spec"]["failurePolicy"]["rules"][0].update(onJobFailureReasons=["Exit"]), "an unknown reason"),
    ],
)
def test_the_rules_refuse_what_they_should(change, message):
    document = rendered()
    change(document)
    assert any(message in error for error in webhook_errors(document))


def test_the_longest_name_gives_pods_of_63_letters_and_one_more_is_refused():
    fields = {"topology": "v6e:16x16", "slices": 2, "sweep": "0-120", "index": 120}
    longest = 63 - len("-120-slice-1-63-abcde")
    assert webhook_errors(rendered(name="b" * longest, **fields)) == []
    with pytest.raises(ValueError, match=f"expected at most {longest} letters, since pods are called bbbbbbbbbbbb"):
        rendered(name="b" * (longest + 1), **fields)


# What an end of a process leads to.


def what_becomes_of(document, *, code=None, disrupted=False):
    """As the Job controller (pkg/controller/job/pod_failure_policy.go) and JobSet (failure_policy.go) have it."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(parts(document)[1]["podFailurePolicy"]["rules"]):
        if code in rule.get("onExitCodes", {}).get("values", []):
            said = f"Container train for pod research/bert-slice-0-1-x2x7q failed with exit code {code}"
        elif disrupted and rule.get("onPodConditions") == [{"type": "DisruptionTarget", "status": "True"}]:
            said = "Pod research/bert-slice-0-1-x2x7q has condition DisruptionTarget"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{said} matching {rule['action']} rule at index {index}"
        break
    for rule in document["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("end", "action"),
    [
        ({"code": 75}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"code": 137, "disrupted": True}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"code": 2}, "FailJobSet"),
        ({"code": 130}, "FailJobSet"),
        ({"code": 1}, "RestartJobSet"),
        ({"code": 70}, "RestartJobSet"),
        ({"code": 137}, "RestartJobSet"),
        ({"code": 139}, "RestartJobSet"),
    ],
)
def test_the_exit_code_of_a_process_decides_what_becomes_of_the_run(end, action):
    assert what_becomes_of(rendered(), **end) == action


def test_restarts_and_the_time_to_save_are_those_of_the_job():
    document = rendered(restarts=3, lead=300)
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert parts(document)[2]["terminationGracePeriodSeconds"] == 300


# How the command gets there.


def as_kubernetes_reads(text, variables):
    """`$(NAME)` is replaced and `$$` is `$` (k8s.io/kubernetes/third_party/forked/golang/expansion)."""
    def replace(match):
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, text)


WORDS = ["a b", "it's", '"$HOME"', "$(HOME)", "$$(HOME)", "$$", "`id`", "*", "\\", "", "--", "a\nb", "mask & (w | s)"]


@pytest.mark.parametrize("setup", [[], ["export LATER=1", "cd /"]], ids=["plain", "after setup"])
def test_every_argument_reaches_the_program_as_it_was_written(setup):
    source = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('LATER')]))"
    _, _, _, container = parts(rendered([sys.executable, "-c", source, *WORDS], setup=setup))
    command = [as_kubernetes_reads(word, {"HOME": "replaced"}) for word in container["command"]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [WORDS, "1" if setup else None]


def test_the_exit_code_after_setup_is_that_of_the_command_and_a_failed_line_is_the_last():
    for setup, wanted in (["true"], 75), (["exit 3"], 3), (["false"], 1):
        command = parts(rendered(["/bin/sh", "-c", "exit 75"], setup=setup))[3]["command"]
        assert subprocess.run([as_kubernetes_reads(word, {}) for word in command]).returncode == wanted


def test_a_run_of_a_sweep_has_its_number_in_its_name_and_its_command():
    document = rendered(sweep="0-7", index=3)
    assert document["metadata"]["name"] == "bert-3"
    assert parts(document)[3]["command"] == [*TRAIN, "--sweep-index=3"]
    assert parts(rendered(["run", "--seed={index}"], sweep="0-7", index=3))[3]["command"] == ["run", "--seed=3"]


def environment(document):
    return {item["name"]: item.get("value", "") for item in parts(document)[3]["env"]}


def test_processes_on_gpu_find_each_other_by_three_variables_that_maskformer_reads(monkeypatch):
    from maskformer.training import distributed

    document = rendered(gpu="h100:8", hosts=2, name="mae", sweep="0-7", index=7)
    variables = {item["name"]: item for item in parts(document)[3]["env"]}
    # <jobset>-<replicated job>-<job index>-<pod index>.<jobset>: JobSet's headless service
    assert variables["JAX_COORDINATOR_ADDRESS"]["value"] == "mae-7-hosts-0-0.mae-7:8476"
    field = variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    found = distributed.detect(environment(document) | {"JAX_PROCESS_ID": "1"})
    assert (found["coordinator_address"], found["num_processes"], found["process_id"]) == (
        "mae-7-hosts-0-0.mae-7:8476", 2, 1)  # fmt: skip
    assert environment(document)["JAX_PLATFORMS"] == "cuda"
    replicated, work, pod, container = parts(document)
    assert (replicated["replicas"], work["completions"]) == (1, 2)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}


def test_processes_on_tpu_insist_on_what_gke_tells_them():
    from maskformer.training import distributed

    found = environment(rendered(slices=2))
    assert found["JAX_PLATFORMS"] == "tpu,cpu" and distributed.detect(found) == {}
    assert "MASKFORMER_DISTRIBUTED" not in environment(rendered(topology="v5e:2x4"))


def test_slices_are_jobs_and_hosts_are_their_pods():
    document = rendered(topology="v5p:2x2x4", slices=3)
    replicated, work, pod, container = parts(document)
    assert (replicated["replicas"], work["parallelism"], work["completions"]) == (3, 4, 4)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-tpu-topology": "2x2x4",
    }  # fmt: skip
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert document["metadata"]["annotations"] == exclusive
    # Nodes of one host share a pool: one JobSet must not keep the others out.
    assert "annotations" not in rendered(topology="v5e:2x4")["metadata"]


def test_the_hosts_network_is_used_between_slices_only_unless_asked_for():
    assert "hostNetwork" not in parts(rendered())[2]
    assert parts(rendered(slices=2))[2]["hostNetwork"]
    assert "hostNetwork" not in parts(rendered(slices=2, host_network=False))[2]
    assert parts(rendered(host_network=True))[2]["hostNetwork"]


def test_every_field_of_a_pod_reaches_its_place():
    document = rendered(**EVERYTHING)
    _, work, pod, container = parts(document)
    assert document["metadata"]["namespace"] == "research"
    assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "big"
    assert {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"} in pod["tolerations"]
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert container["securityContext"] == {"privileged": True, "runAsUser": 0}
    assert (environment(document)["A"], environment(document)["EMPTY"]) == ("b=c", "")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/mnt/runs"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert mounts["/mnt/b"]["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert mounts["/mnt/b"]["csi"]["volumeAttributes"]["bucketName"] == "b1"
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    assert work["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Bert"}, "--name 'Bert': expected lower-case letters, digits and -, the first a letter"),
        ({"name": "0bert"}, "--name '0bert'"),
        ({"name": "bert\n"}, "--name 'bert\\n'"),
        ({"slices": 2, "topology": "v5e:2x4"}, "--slices 2: expected 1 with a slice of one host: GKE connects slices"),
        ({"slices": 2, "gpu": "l4:1"}, "--slices 2: expected 1 on GPU"),
        ({"lead": 1.5}, "--lead 1.5: expected whole seconds"),
        ({"image": ""}, "--image ''"),
        ({"image": "a b"}, "--image 'a b': expected an image, for example"),
        ({"queue": "My Queue"}, "--queue 'My Queue': expected lower-case letters"),
        ({"service_account": "x@y"}, "--service-account 'x@y'"),
        ({"namespace": "n/s"}, "--namespace 'n/s'"),
        ({"secrets": ["Wandb"]}, "--secret 'Wandb'"),
        ({"env": ["A"]}, "--env 'A': expected NAME=value"),
        ({"env": ["1A=b"]}, "--env '1A=b'"),
        ({"env": ["A=1", "A=2"]}, "--env 'A=2': expected a variable that this launcher does not set, named once"),
        ({"env": ["JAX_PROCESS_ID=0"]}, "--env 'JAX_PROCESS_ID=0': expected a variable that this"),
        ({"env": ["A=a\0b"]}, "--env"),
        ({"setup": ["a\0b"]}, "--setup"),
        ({"node_labels": ["a b=c"]}, "--node-label 'a b=c': expected name=value"),
        ({"node_labels": ["cloud.google.com/gke-tpu-topology=2x2"]}, "--node-label"),
        ({"mounts": ["runs"]}, "--mount 'runs': expected CLAIM:/folder or gs://BUCKET:/folder"),
        ({"mounts": ["runs:relative"]}, "--mount 'runs:relative'"),
        ({"mounts": ["a:/x", "b:/x"]}, "--mount '/x': expected a folder of its own"),
        ({"mounts": ["a:/dev/shm"]}, "--mount '/dev/shm': expected a folder of its own"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_by_name(change, message):
    with pytest.raises(ValueError) as error:
        rendered(**change)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_processes_that_do_not_fit_the_machines_are_refused():
    with pytest.raises(ValueError, match="--processes 3: expected 4, one a host"):
        jobset(Job(TRAIN, 3), tpu_slice("v6e:4x4"), Pod(IMAGE), "bert")
