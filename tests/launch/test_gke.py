import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from launch import gke
from launch.accelerators import tpu_slice
from launch.job import Job, Sweep
from launch.jobset import Pod, jobset
from launch.kubectl import Kubectl
from tests.launch.cluster import ApiServer, Cluster

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = ["--name", "bert", "--topology", "v6e:4x4", "--image", "repo/train:v1"]
COMMAND = ["--", "maskformer", "train", "--config=configs/bert.py:tiny", "--workdir=gs://bucket/runs/x"]


def test_the_manifest_is_printed_or_written(tmp_path, capsysbinary):
    assert gke.main([*FLAGS, "--slices", "2", "--array", "0-2", *COMMAND]) == 0
    printed = capsysbinary.readouterr().out
    assert gke.main([*FLAGS, "--slices", "2", "--array", "0-2", "--output", str(tmp_path / "job.yaml"), *COMMAND]) == 0
    assert (tmp_path / "job.yaml").read_bytes() == printed
    documents = list(yaml.safe_load_all(printed))
    assert [document["metadata"]["name"] for document in documents] == ["bert-0", "bert-1", "bert-2"]
    job = Job(COMMAND[1:], 8, 10, 120, Sweep.parse("0-2"))
    assert documents[1] == jobset(job, tpu_slice("v6e:4x4"), Pod("repo/train:v1"), "bert", 2, 1)


@pytest.mark.parametrize(
    ("workdir", "warns"),
    [("runs/x", True), ("/mnt/runsx/a", True), ("/mnt/runs/../a", True), ("/mnt/runs/a", False), ("gs://b/a", False)],
)
def test_a_workdir_on_the_disk_of_each_machine_is_warned_of_unless_it_is_mounted(workdir, warns, capsys):
    assert gke.main([*FLAGS, "--mount", "claim:/mnt/runs", "--", "train", f"--workdir={workdir}"]) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"warning: --workdir={workdir} lies on each machine's own disk") is warns
    assert error.count("\n") == warns and error.endswith(": --mount CLAIM:/FOLDER\n") is warns


GPUS = ["--image", "i", "--gpu", "h100:8"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "i"], "expected either --topology, for TPU, or --gpu"),
        ([*FLAGS, "--gpu", "h100:8"], "expected either --topology, for TPU, or --gpu"),
        ([*GPUS, "--slices", "2"], "--slices '2': expected --topology: with --gpu, --hosts says how many machines"),
        ([*GPUS, "--chips-per-host", "4"], "--chips-per-host 4: expected --topology, not --gpu"),
        ([*FLAGS, "--hosts", "2"], "--hosts 2: expected --gpu: with --topology the shape says how many"),
        ([*FLAGS, "--slices", "1,2"], "--slices '1,2': expected sizes that get smaller, such as 4,2,1"),
        ([*FLAGS, "--slices", "0"], "--slices 0: expected at least 1"),
        ([*FLAGS, "--patience", "9"], "--patience 9.0: expected --slices of several sizes"),
        ([*FLAGS, "--period", "9"], "--period 9.0: expected --wait, or what else stays"),
        ([*FLAGS, "--context", "c"], "--context 'c': expected --submit"),
        (
            [*FLAGS, "--slices", "4,2"],
            "error: --slices 4,2 needs --submit, without --output: Kubernetes does not do this alone",
        ),
        ([*FLAGS, "--array", "0-7%2"], "error: --array 0-7%2 needs --submit"),
        ([*FLAGS, "--array", "0-7", "--max-parallel", "2"], "error: --max-parallel 2 needs --submit"),
        ([*FLAGS, "--wait", "--slices", "2,1"], "error: --wait and --slices 2,1 need --submit"),
        ([*FLAGS, "--wait", "--submit", "--output", "x.yaml"], "error: --wait needs --submit, without --output"),
        ([*FLAGS, "--max-parallel", "2"], "--max-parallel 2: expected a sweep"),
        ([*FLAGS, "--mount", "x"], "--mount 'x': expected CLAIM:/folder"),
        ([*FLAGS, "--max-restarts", "-1"], "--max-restarts -1: expected at least 0"),
        (["--topology", "v6e:4x4"], "the following arguments are required: --image"),
        (["--topology", "v6e:4x4", "--imge", "i"], "error: unrecognized arguments: --imge; did you mean --image?"),
        ([*FLAGS, "--output", "/nonexistent/a.yaml"], "--output /nonexistent/a.yaml: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, message, capsys):
    try:
        code = gke.main([*flags, *COMMAND])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def commands_of_the_documents():
    pages = [ROOT / "docs" / "gke.md", *(ROOT / "docs" / "recipes").glob("*.md")]
    for page in pages:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("python -m launch.gke"):
                    yield pytest.param(shlex.split(line)[3:], id=page.stem)


@pytest.mark.parametrize("words", list(commands_of_the_documents()))
def test_the_commands_of_the_documents_are_read(words, capsys):
    assert gke.main([word for word in words if word != "--submit"]) == 0
    (document,) = yaml.safe_load_all(capsys.readouterr().out)
    assert document["metadata"]["name"] == "bert"


def test_the_launcher_needs_neither_jax_nor_a_package():
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
         f"from launch import gke; gke.main({[*FLAGS, *COMMAND]!r})"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("apiVersion: jobset.x-k8s.io/v1alpha2")


# Real kubectl, which posts to an API server of the loopback interface.


@pytest.fixture
def server(tmp_path, monkeypatch):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    server = ApiServer(Cluster())
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [{"name": name, "context": {"cluster": "here", "user": "me", "namespace": space}}
                     for name, space in (("here", "research"), ("elsewhere", "default"))],
        "users": [{"name": "me", "user": {}}],
    }  # fmt: skip
    (tmp_path / "config").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    yield server
    server.shutdown()
    server.server_close()


def test_kubectl_posts_what_was_rendered(server, capsys):
    words = ["a b", "it's", "$(HOME)", "", "a\nb", "\u0667", "mask & (w | s)", "- x", "1e3"]
    flags = [*FLAGS, "--array", "0-1", "--setup", "export A=1", "--setup", "cd /", "--env", "B=\u00e9 # no"]
    assert gke.main([*flags, "--submit", "--", "program", *words]) == 0
    out = capsys.readouterr().out
    assert out == "jobset.jobset.x-k8s.io/bert-0 created\njobset.jobset.x-k8s.io/bert-1 created\n"
    pod = Pod("repo/train:v1", env=["B=\u00e9 # no"], setup=["export A=1", "cd /"])
    job = Job(["program", *words], 4, 10, 120, Sweep.parse("0-1"))
    for index in (0, 1):
        wanted = jobset(job, tpu_slice("v6e:4x4"), pod, "bert", 1, index)
        posted = server.cluster.objects[f"bert-{index}"]
        assert posted["metadata"] == wanted["metadata"] | {"namespace": "research"}
        assert posted["spec"] == wanted["spec"] | {"suspend": False}
    assert server.validations == ["Strict", "Strict"]


def test_kubectl_runs_in_the_namespace_and_the_context_asked_for(server):
    assert gke.main([*FLAGS, "--context", "elsewhere", "--namespace", "research", "--submit", *COMMAND]) == 0
    assert server.cluster.objects["bert"]["metadata"]["namespace"] == "research"


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((422, "Invalid", 'Invalid value: "bert-slice-0": JobSet name is too long,\npod names will exceed 63'),
         'The JobSet "bert" is invalid: spec.replicatedJobs[0].name: Invalid value: "bert-slice-0": JobSet name is too '
         "long, pod names will exceed 63"),
        ((403, "Forbidden", 'jobsets.jobset.x-k8s.io is forbidden: User "me" cannot create resource "jobsets"'),
         'Error from server (Forbidden): error when creating "STDIN": jobsets.jobset.x-k8s.io is forbidden'),
        ((400, "BadRequest", 'strict decoding error: unknown field "spec.failurePolicy.rules[0].'
                             'onJobFailureMessagePatterns"'),
         "(JobSet is too old in this cluster: 0.10 or newer is needed)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--wait"]], ids=["once", "staying"])
def test_a_refusal_of_the_server_is_one_line(refusal, message, more, server, capsys):
    server.refusal = refusal
    assert gke.main([*FLAGS, "--submit", *more, *COMMAND]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: kubectl refused: ") and err.count("\n") == 1 and message in err


def test_a_refusal_of_a_whole_sweep_is_one_line_that_says_how_many(server, capsys):
    server.refusal = (403, "Forbidden", "no")
    assert gke.main([*FLAGS, "--array", "0-19", "--submit", *COMMAND]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "(and 19 more lines like it)" in err


def test_a_name_that_is_taken_is_one_line(server, capsys):
    assert gke.main([*FLAGS, "--submit", *COMMAND]) == 0 and gke.main([*FLAGS, "--submit", *COMMAND]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert '"bert" already exists (kubectl delete jobset NAME, or choose another --name)' in err


def test_a_refusal_of_some_runs_of_a_sweep_names_those_that_were_created(server, capsys):
    assert gke.main([*FLAGS, "--array", "1", "--submit", *COMMAND]) == 0
    assert gke.main([*FLAGS, "--array", "0-2", "--submit", *COMMAND]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and '"bert-1" already exists' in err
    assert err.endswith("; jobset.jobset.x-k8s.io/bert-0 created, jobset.jobset.x-k8s.io/bert-2 created\n")
    assert list(server.cluster.objects) == ["bert-1", "bert-0", "bert-2"]


def test_a_cluster_without_jobset_is_one_line(server, capsys):
    server.has_jobsets = False
    assert gke.main([*FLAGS, "--submit", *COMMAND]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "JobSet is not installed in this cluster" in err


def test_a_cluster_that_is_not_there_is_one_line(server, capsys):
    server.shutdown()
    server.server_close()
    assert gke.main([*FLAGS, "--submit", *COMMAND]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: kubectl: ") and "refused" in err


def test_without_kubectl_the_error_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert gke.main([*FLAGS, "--submit", *COMMAND]) == 2
    assert capsys.readouterr().err == "error: kubectl was not found: is it installed, and on PATH?\n"


def test_a_sweep_in_waves_and_an_elastic_run_by_real_kubectl(server, capsys):
    cluster = server.cluster
    cluster.slices = 3
    looks = {"bert-0": 0, "bert-1": 0}

    def end_after_two_looks(cluster):
        for name in cluster.running():
            if cluster.objects[name]["status"]["replicatedJobsStatus"][0]["ready"]:
                looks[name] += 1
                if looks[name] == 2:
                    cluster.end(name)

    server.each_look = end_after_two_looks
    flags = ["--array", "0-1", "--max-parallel", "1", "--slices", "4,2", "--patience", "0", "--period", "0"]
    assert gke.main([*FLAGS, *flags, "--submit", *COMMAND]) == 0
    assert [(name, slices) for name, slices, _ in cluster.made] == [
        (f"bert-{index}", slices) for index in range(2) for slices in (4, 2)
    ]
    assert cluster.most == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 done"


def test_kubectl_reads_what_it_wrote_and_deletes_it(server):
    kubectl = Kubectl()
    assert kubectl.jobsets("bert") == {}
    kubectl.create(gke.render(Job(["train"], 4), tpu_slice("v6e:4x4"), Pod("image"), name="bert"))
    assert list(kubectl.jobsets("bert")) == ["bert"] and kubectl.jobsets("other") == {}
    kubectl.delete("bert")
    assert kubectl.jobsets("bert") == {}
