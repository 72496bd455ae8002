import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from launch import job, tpu, tpu_life
from launch.job import Job
from launch.tpu_resource import Request, accelerator, hosts
from tests.launch.cloud import Cloud, until
from tests.launch.test_local import alive
from tests.training.tiny import metric_lines, write_corpus

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = ["--zone=us-east5-b", "--topology=v5p:2x2x2", "--name=bert"]  # two workers a slice


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(tpu_life, "RECONNECT", 0.1)
    monkeypatch.setattr(tpu_life, "AFTER_A_CRASH", 0.3)
    with Cloud(tmp_path / "cloud") as cloud:
        for name, value in cloud.caller.items():
            monkeypatch.setenv(name, value)
        yield cloud


def launch(*flags, command):
    return tpu.main([*FLAGS, "--submit", "--poll=0.1", *flags, "--", *command])


def bash(text, *words):
    return ["bash", "-c", text, "bash", *words]


# Says with which machine, of how many, it runs; ends with the code that stands in the file of its machine, or of all.
ONCE = 'echo "$JAX_PROCESS_ID $JAX_NUM_PROCESSES ${MEGASCALE_SLICE_ID-none} ${MEGASCALE_NUM_SLICES-none}"'


def test_the_whole_life_of_a_run_on_two_slices(cloud, capfd):
    cloud.scripts = [["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]]
    assert launch("--slices=2", "--spot", command=bash(ONCE)) == 0
    lines = capfd.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("[launch]")]
    assert said == [
        "[launch] asked for 2 x v5p-16 in us-east5-b",
        "[launch] CREATING",
        "[launch] WAITING_FOR_RESOURCES",
        "[launch] PROVISIONING",
        "[launch] ACTIVE",
        "[launch] giving the machines back",
    ]
    assert sorted(line for line in lines if line not in said) == [
        f"[{number}.{worker}] {2 * number + worker} 4 {number} 2" for number in (0, 1) for worker in (0, 1)
    ]
    assert [method for method, _, _ in cloud.calls] == ["POST", "DELETE"]


def test_what_an_earlier_machine_has_left_of_slices_does_not_reach_the_run(cloud, capfd):
    command = bash("env | grep -e ^MEGASCALE -e ^TPU_WORKER; echo $MASKFORMER_DISTRIBUTED")
    assert launch(command=command) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("[launch]")]
    assert sorted(lines) == ["[0.0] on", "[0.1] on"]


def test_a_preempted_run_goes_on_with_other_machines_for_nothing(cloud, capfd, tmp_path):
    waits = f"{ONCE}; [ -e {tmp_path}/gone ] || {{ touch {tmp_path}/began$JAX_PROCESS_ID; sleep 60; }}"

    def preempt():
        until(lambda: len(list(tmp_path.glob("began*"))) == 4, "the run")
        (tmp_path / "gone").touch()
        cloud.preempt("bert")

    cloud.scripts = [["ACTIVE"], ["WAITING_FOR_RESOURCES", "ACTIVE"]]
    thread = threading.Thread(target=preempt)
    thread.start()
    assert launch("--slices=2", "--max-restarts=0", command=bash(waits)) == 0
    thread.join()
    out = capfd.readouterr().out
    assert "[launch] the machines are gone (SUSPENDED)" in out
    assert out.count("[1.1] 3 4 1 2") == 2
    assert cloud.names("POST") == cloud.names("DELETE") == ["bert", "bert"]


@pytest.mark.parametrize(
    ("codes", "restarts", "starts", "code"),
    [
        ([75, 0], 0, 2, 0),
        ([1, 0], 0, 1, 1),
        ([137, 75, 1], 1, 3, 1),
        ([2], 5, 1, 2),
        ([130], 5, 1, 130),
    ],
)
def test_an_exit_code_starts_again_on_the_same_machines_or_ends_the_run(codes, restarts, starts, code, cloud):
    # The count of starts is kept in the worker's home folder, which only the same machine has.
    count = "echo >> starts; n=$(wc -l < starts)"
    command = bash(f"{count}; codes=({' '.join(map(str, codes))}); exit ${{codes[$((n - 1))]}}")
    assert launch(f"--max-restarts={restarts}", command=command) == code
    homes = list((cloud.folder / "machines").glob("*/*"))
    assert [(home / "starts").read_text() for home in homes] == ["\n" * starts] * 2
    assert cloud.names("POST") == cloud.names("DELETE") == ["bert"]


def test_a_failure_ends_those_that_wait_for_it(cloud, tmp_path):
    ignores = f'trap "" TERM; [ $JAX_PROCESS_ID = 1 ] && exit 3; echo $$ > {tmp_path}/waits; sleep 61 & wait'
    assert launch("--max-restarts=0", command=bash(ignores)) == 3
    assert not alive(int((tmp_path / "waits").read_text()))


def test_every_argument_and_setup_line_reaches_the_worker_as_it_was_written(cloud, capfd):
    words = ["", "a  b", "it's", '"$HOME"', "`id`", "*", "\\", "two\nlines", "{x}", "caf\udce9", "--", "%s"]
    show = ["python", "-c", "import os, sys; print(ascii(sys.argv[1:]), os.environ['X'], os.getcwd()[-7:])", *words]
    assert launch("--setup", "mkdir -p 'a  b' && cd 'a  b'", "--setup", "export X='1  2'", command=show) == 0
    out = capfd.readouterr().out
    assert f"[0.1] {words!a} 1  2 .1/a  b" in out


def test_a_setup_that_fails_ends_the_attempt_before_the_command(cloud, capfd):
    assert launch("--setup", "exit 2", "--setup", "echo no", command=["echo", "no"]) == 2
    assert "no" not in [line[6:] for line in capfd.readouterr().out.splitlines()]


@pytest.mark.parametrize("gone", ["WAITING_FOR_RESOURCES", "FAILED: no capacity"])
def test_fewer_slices_are_taken_when_more_cannot_be_had(gone, cloud, capfd):
    cloud.scripts = [["WAITING_FOR_RESOURCES"], [gone], ["PROVISIONING", "ACTIVE"]]
    assert launch("--slices=4,2,1", "--patience=0.2", command=bash(ONCE)) == 0
    out = capfd.readouterr().out
    assert "[launch] 4 slices could not be had (WAITING_FOR_RESOURCES after 0 s): trying 2" in out
    assert f"[launch] 2 slices could not be had ({gone}" in out
    assert out.count("2 none none") == 2, "two workers of the one slice"
    assert len(cloud.names("POST")) == len(cloud.names("DELETE")) == 3


@pytest.mark.parametrize(("until", "code", "asked"), [([], 69, 2), (["--valid-until-duration=6h"], 1, 1)])
def test_what_cannot_be_had_is_asked_for_again_unless_there_was_a_limit(until, code, asked, cloud, capfd):
    cloud.scripts = [["ACCEPTED", "FAILED: quota 'TPUS_PER_PROJECT' exceeded"]] * 2
    assert launch("--max-restarts=1", *until, command=["true"]) == code
    said = "error: 1 x v5p-16 could not be had (FAILED: quota 'TPUS_PER_PROJECT' exceeded)"
    assert capfd.readouterr().out.count(said) == asked
    assert cloud.names("POST") == cloud.names("DELETE") == ["bert"] * asked


def test_a_worker_that_does_not_start_fails_the_run_and_the_others_do_not_train_alone(cloud, capfd, monkeypatch):
    monkeypatch.setattr(tpu_life, "BEGIN_TOGETHER", 0.5)
    cloud.unreachable = {"0.1"}
    assert launch("--max-restarts=0", command=["sleep", "60"]) == tpu_life.EX_UNREACHABLE
    assert "[launch] only 1 of 2 workers have started (0.0)" in capfd.readouterr().out


def test_a_connection_that_breaks_is_made_again_and_nothing_is_started_twice(cloud, capfd, tmp_path):
    waits = f"echo >> starts; touch {tmp_path}/began$JAX_PROCESS_ID; until [ -e {tmp_path}/go ]; do sleep 0.1; done"

    def disconnect():
        until(lambda: len(list(tmp_path.glob("began*"))) == 2, "the run")
        cloud.disconnect("bert")
        (tmp_path / "go").touch()

    thread = threading.Thread(target=disconnect)
    thread.start()
    assert launch("--max-restarts=0", command=bash(f"{waits}; echo end")) == 0
    thread.join()
    out = capfd.readouterr().out
    assert "[launch] the connection broke: connecting again" in out
    assert sorted(line for line in out.splitlines() if line[0:2] == "[0") == ["[0.0] end", "[0.1] end"]
    homes = list((cloud.folder / "machines").glob("*/*"))
    assert [(home / "starts").read_text() for home in homes] == ["\n"] * 2


def test_the_runs_of_a_sweep_have_machines_of_their_own_and_so_many_at_a_time(cloud, capfd):
    command = bash('[ "$0$1" != "bash--sweep-index=3" ] || exit 2; sleep 0.3; echo "$1"')
    assert launch("--array=1-4", "--max-parallel=2", command=command) == 2
    out = capfd.readouterr().out
    assert out.splitlines()[-1] == "[launch] exit codes: bert-1 0, bert-2 0, bert-3 2, bert-4 0"
    assert "bert-4 [0.1] --sweep-index=4" in out.splitlines()
    assert (sorted(cloud.names("DELETE")), cloud.most) == ([f"bert-{index}" for index in range(1, 5)], 2)


def test_machines_that_are_to_be_kept_are(cloud, capfd):
    assert launch("--keep", command=["true"]) == 0
    assert cloud.names("DELETE") == []
    assert "queued-resources delete bert --zone=us-east5-b --force --quiet`" in capfd.readouterr().out


# In a process of its own, which hears signals.


def start(cloud, *flags, command):
    return subprocess.Popen(
        [sys.executable, "-m", "launch.tpu", *FLAGS, "--submit", "--poll=0.1", *flags, "--", *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env={**os.environ, **cloud.caller},
    )  # fmt: skip


SAVES = """
import os, pathlib, signal, sys, time
def stop(number, frame):
    print("saved", flush=True)
    os._exit(130 if number == signal.SIGINT else 75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
pathlib.Path(sys.argv[1], "began" + os.environ["JAX_PROCESS_ID"]).touch()
time.sleep(600)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_command_on_every_worker_and_the_machines_are_given_back(number, code, cloud, tmp_path):
    launcher = start(cloud, command=["python", "-c", SAVES, str(tmp_path)])
    until(lambda: len(list(tmp_path.glob("began*"))) == 2, "the run")
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == code
    assert sorted(line for line in out.splitlines() if "saved" in line) == ["[0.0] saved", "[0.1] saved"]
    assert cloud.names("DELETE") == ["bert"]


def test_a_signal_while_it_waits_for_machines_gives_the_request_back(cloud):
    cloud.scripts = [["WAITING_FOR_RESOURCES"]]
    launcher = start(cloud, command=["true"])
    until(lambda: cloud.calls, "the request")
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=60)
    assert (launcher.returncode, cloud.names("DELETE")) == (75, ["bert"])


def test_the_same_command_goes_on_with_what_a_killed_launcher_has_left(cloud, tmp_path):
    waits = f"echo >> starts; touch {tmp_path}/began$JAX_PROCESS_ID; until [ -e {tmp_path}/go ]; do sleep 0.1; done"
    launcher = start(cloud, command=bash(waits))
    until(lambda: len(list(tmp_path.glob("began*"))) == 2, "the run")
    launcher.kill()
    launcher.communicate()
    launcher = start(cloud, command=bash(waits))
    seen = ""
    while "runs there" not in seen:
        seen += launcher.stdout.readline()
    (tmp_path / "go").touch()
    out = seen + launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 0
    assert "going on with its 1 x v5p-16" in out
    assert re.search(r"\[launch\] attempt \S+ runs there", out)
    homes = list((cloud.folder / "machines").glob("*/*"))
    assert [(home / "starts").read_text() for home in homes] == ["\n"] * 2
    assert cloud.names("DELETE") == ["bert"]


def test_machines_that_were_kept_run_the_next_command(cloud, capfd):
    for word in ("one", "two", "two"):
        assert launch("--keep", command=["echo", word]) == 0
        assert f"[0.1] {word}" in capfd.readouterr().out.splitlines()
    assert cloud.names("DELETE") == []


def test_a_launcher_with_another_command_leaves_the_one_that_runs_alone(cloud, tmp_path, capfd):
    launcher = start(cloud, command=["python", "-c", SAVES, str(tmp_path)])
    until(lambda: len(list(tmp_path.glob("began*"))) == 2, "the run")
    assert launch(command=["true"]) == 1
    assert "[launch] error: another command runs on bert: choose another --name" in capfd.readouterr().out
    assert cloud.names("DELETE") == [] and launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == 75


def test_another_queued_resource_of_that_name_is_left_alone(cloud, capfd):
    assert launch("--keep", command=["true"]) == 0
    assert launch("--slices=2", command=["true"]) == 1
    assert "error: there is a queued resource bert of 1 x v5p-16: choose another --name" in capfd.readouterr().out
    assert cloud.names("DELETE") == []


# What is printed, and what is refused.


def test_the_printed_script_is_the_life_of_a_run_without_misfortunes(cloud, tmp_path, capfd):
    words = ["a  b", "it's\nEND\nhere"]
    flags = [*FLAGS, "--slices=2,1", "--array=0-1", "--setup", "export X='1  2'", "--", *bash('echo "$X $#"', *words)]
    assert tpu.main(flags) == 0
    script = capfd.readouterr().out
    assert cloud.calls == []
    assert tpu.main(["--output", str(tmp_path / "job.sh"), *flags]) == 0
    assert (tmp_path / "job.sh").read_text() == script
    out = subprocess.run(["bash"], input=script, text=True, capture_output=True, timeout=60).stdout
    assert out.count("1  2 3") == 8, "the arguments and the number of the run, on four workers in each of two runs"
    assert [(method, name) for method, name, _ in cloud.calls] == [
        (method, name) for name in ("bert-0", "bert-1") for method in ("POST", "DELETE")
    ]


def test_every_ssh_is_for_all_workers_of_all_slices():
    script = tpu.render(Job(["true"]), Request("us-east5-b", "v5p-16", (2,)))
    calls = [shlex.split(line.partition("|")[0] + '"')[4:] for line in script.splitlines() if " ssh " in line]
    assert [{"--node=all", "--worker=all", "--batch-size=all"} <= set(call) for call in calls] == [True]


@pytest.mark.parametrize(
    ("topology", "kind", "machines"),
    [
        # From the tables of https://cloud.google.com/tpu/docs/v4, v5e, v5p and v6e.
        ("v4:2x2x1", "v4-8", 1), ("v4:4x4x4", "v4-128", 16), ("v4:8x16x16", "v4-4096", 512),
        ("v5e:1x1", "v5litepod-1", 1), ("v5e:2x4", "v5litepod-8", 1), ("v5e:4x4", "v5litepod-16", 4),
        ("v5e:16x16", "v5litepod-256", 64), ("v5p:2x2x1", "v5p-8", 1), ("v5p:4x4x8", "v5p-256", 32),
        ("v6e:2x2", "v6e-4", 1), ("v6e:2x4", "v6e-8", 1), ("v6e:8x8", "v6e-64", 16),
    ],
)  # fmt: skip
def test_a_topology_is_an_accelerator_type_of_so_many_machines(topology, kind, machines):
    assert (accelerator(topology), hosts(kind)) == (kind, machines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5e:3x3"], "--topology 'v5e:3x3': expected one of v5e:1x1, 2x2,"),
        (["--topology=v5p:4x2x2"], "16x16x24; v5p-32 is 2x2x4"),
        (["--topology=tpu7x:4x4x4"], "tpu7x is had through GKE; use launch.gke"),
        (["--topology=v5x"], "--topology 'v5x': expected KIND:SHAPE, such as v5e:4x4"),
        (["--zone=europe"], "--zone 'europe': expected a zone, such as us-east5-b"),
        (["--slices=1,2"], "--slices '1,2': expected counts that fall, such as 4,2,1"),
        (["--slices=0"], "--slices 0: expected at least 1"),
        (["--spot", "--reserved"], "--reserved beside --spot: expected one of --spot and --reserved"),
        (["--valid-until-duration=soon"], "--valid-until-duration 'soon': expected a duration, such as 6h"),
        (["--create-extra=--node-id=x"], "expected an option that this launcher does not set itself"),
        (["--ssh-extra=--worker=0"], "--ssh-extra '--worker=0': expected an option that this launcher does not set"),
        (["--create-extra=network"], "--create-extra 'network': expected --option or --option=value"),
        (["--name=Bert"], "--name 'Bert': expected small letters, digits and -"),
        (["--name=" + "x" * 41], "at most 40 of them"),
        (["--setup=a\0"], "--setup 'a\\x00': expected no NUL character"),
        (["--max-restarts=-1"], "--max-restarts -1: expected at least 0"),
        (["--patience=60"], "--patience 60.0: expected --slices of several counts"),
        (["--poll=5"], "--poll 5.0: expected --submit"),
    ],
)
def test_a_wrong_flag_is_one_line_and_code_2(flags, message, capsys):
    try:
        assert tpu.main([*FLAGS, *flags, "--", "true"]) == 2
    except SystemExit as error:
        assert error.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_script_leaves_the_machines_where_it_is_told_to(capsys):
    for flags, deletes in ([], True), (["--keep"], False):
        assert tpu.main([*FLAGS, *flags, "--", "true"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("gcloud compute tpus queued-resources delete bert ") for line in lines) is deletes


def test_an_accelerator_type_may_be_given_in_the_words_of_the_cloud(capsys):
    assert tpu.main(["--zone=us-east5-b", "--accelerator-type=v5p-384", "--", "true"]) == 0
    script = capsys.readouterr().out
    assert "# 48 workers: 1 x v5p-384" in script and "--runtime-version=v2-alpha-tpuv5 " in script


def test_without_gcloud_it_says_so(monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch(command=["true"]) == 2
    assert "[launch] error: gcloud was not found: install the Google Cloud CLI, and log in" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # As the real one writes them.
        (
            "(gcloud.x) Error parsing [queued_resource].\nThe [queued_resource] resource is not properly specified.\n"
            "Failed to find attribute [project]. The attribute can be set in the following ways: \n- provide ...",
            "gcloud has no project: give --project or `gcloud config set project NAME`",
        ),
        (
            "(gcloud.x) You do not currently have an active account selected.\nPlease run:\n\n  $ gcloud auth login\n",
            "gcloud is not logged in: `gcloud auth login`",
        ),
        ("(gcloud.x) INVALID_ARGUMENT: no zone here", "(gcloud.x) INVALID_ARGUMENT: no zone here"),
        ("(gcloud.x) PERMISSION_DENIED: not yours", "(gcloud.x) PERMISSION_DENIED: not yours"),
    ],
)
def test_what_is_wrong_with_the_configuration_ends_the_run_at_once_with_code_2(
    words, said, monkeypatch, tmp_path, capfd
):
    (tmp_path / "gcloud").write_text(f"#!/bin/sh\ncat >&2 <<'END'\nERROR: {words}\nEND\nexit 1\n")
    (tmp_path / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert launch(command=["true"]) == 2
    assert capfd.readouterr().out == f"[launch] error: {said}\n"


def test_a_workdir_on_the_disk_of_each_worker_is_warned_of(capsys):
    for workdir, warns in ("runs/x", True), ("/home/x", True), ("gs://bucket/x", False):
        for words in ([f"--workdir={workdir}"], ["--workdir", workdir]):
            assert tpu.main([*FLAGS, "--", "train", *words]) == 0
            error = capsys.readouterr().err
            assert error.startswith(f"warning: --workdir={workdir} lies on each machine's own disk") is warns
            assert error.count("\n") == warns


# The real gcloud from here on, which takes two seconds a call; skipped where there is none.

needs_gcloud = pytest.mark.skipif(shutil.which("gcloud") is None, reason="the Google Cloud CLI is not installed here")


@needs_gcloud
@pytest.mark.slow
def test_gcloud_asks_the_cloud_for_what_the_flags_say(tmp_path):
    request = Request(
        "us-east5-b", "v6e-64", (2, 1), spot=True, valid_until_duration="6h",
        create_extra=["--network=lab", "--labels=a=b"],
    )  # fmt: skip
    with Cloud(tmp_path / "cloud", real=True) as cloud:

        def ask(command):
            done = subprocess.run(command, env={**os.environ, **cloud.caller}, capture_output=True, text=True)
            return done.returncode, done.stdout.strip(), done.stderr

        assert ask(request.create("bert", 2))[0] == 0
        assert ask(request.describe("bert", "value(state.state)"))[:2] == (0, "ACTIVE")
        code, _, refused = ask(request.create("bert", 1))
        assert code == 1 and "ALREADY_EXISTS" in refused, "the launcher goes on with it by this word"
        assert ask(request.delete("bert"))[0] == 0
        code, _, refused = ask(request.describe("bert"))
        assert code == 1 and "NOT_FOUND" in refused
        (_, _, two), (_, _, one), _ = cloud.calls
    node = {
        "acceleratorType": "v6e-64", "runtimeVersion": "v2-alpha-tpuv6e", "labels": {"a": "b"},
        "networkConfig": {"enableExternalIps": True, "network": "lab"},
    }  # fmt: skip
    spec = two["tpu"]["nodeSpec"][0]
    assert {key: spec["node"][key] for key in node} == node
    assert spec["multisliceParams"] == {"nodeCount": 2, "nodeIdPrefix": "bert"}
    assert (two["spot"], two["queueingPolicy"]) == ({}, {"validUntilDuration": "21600s"})
    assert one["tpu"]["nodeSpec"][0]["nodeId"] == "bert" and "multisliceParams" not in one["tpu"]["nodeSpec"][0]


@needs_gcloud
def test_gcloud_knows_the_flags_of_ssh():
    # It is not run here; its parser refuses what it does not know before it looks for a machine.
    flags = Request("us-east5-b", "v5p-16", ssh_extra=["--internal-ip"]).ssh("bert", "true")
    environment = {
        **os.environ,
        "CLOUDSDK_CORE_PROJECT": "lab",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": "http://127.0.0.1:9/",
    }
    done = subprocess.run([*flags, "--no-such-flag"], env=environment, capture_output=True, text=True, timeout=60)
    refused = [line for line in done.stderr.splitlines() if "--" in line]
    assert done.returncode == 2 and [line for line in refused if "unrecognized" in line or "no-such-flag" in line]
    assert not [line for line in refused if "--node" in line or "--worker" in line or "--batch-size" in line]


@needs_gcloud
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_training_lives_through_a_preemption_to_its_end(tmp_path):
    # The real gcloud, two local processes that train together as the two machines of a slice would, and a workdir that
    # they share as a bucket would be.
    workdir, recipe, corpus = tmp_path / "run", tmp_path / "recipe.py", write_corpus(tmp_path / "corpus")
    recipe.write_text(
        "from tests.training.tiny import tiny_config\ndef get_config(arg=None):\n"
        f"    return tiny_config({str(corpus)!r}, train__steps=40, mesh__data=-1, evaluation__every=20)\n"
    )
    shared = ("JAX_COMPILATION_CACHE_DIR", "MASKFORMER_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    with Cloud(tmp_path / "cloud", real=True) as cloud:
        cloud.environment = {name: os.environ[name] for name in shared} | {
            "JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "PYTHONPATH": str(ROOT),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # a process waits for the other's compilation for 30 s only
        }  # fmt: skip
        # gcloud itself looks once after each request.
        cloud.scripts = [["WAITING_FOR_RESOURCES"] * 2 + ["ACTIVE"], ["PROVISIONING"] * 2 + ["ACTIVE"]]
        train = ["python", "-m", "maskformer.cli", "train", f"--config={recipe}", f"--workdir={workdir}"]
        # Under load gloo's 30 s may pass, which is a failure as any other.
        launcher = start(cloud, "--max-restarts=5", "--poll=1", f"--setup=cd {shlex.quote(str(ROOT))}", command=train)
        try:
            saved = lambda: (workdir / "checkpoints" / "4").exists()
            until(lambda: saved() or launcher.poll() is not None, "the first checkpoint", timeout=240)
            assert launcher.poll() is None, launcher.communicate()[0]
            cloud.preempt("bert")
            out, _ = launcher.communicate(timeout=300)
        finally:
            launcher.kill()
    assert launcher.returncode == 0, out
    said = [line for line in out.splitlines() if line.startswith("[launch]") and "(failure" not in line]
    assert said == [
        "[launch] asked for 1 x v5p-16 in us-east5-b", "[launch] WAITING_FOR_RESOURCES", "[launch] ACTIVE",
        "[launch] the machines are gone (SUSPENDED)", "[launch] giving the machines back",
        "[launch] starting again in 1 s",
        "[launch] asked for 1 x v5p-16 in us-east5-b", "[launch] PROVISIONING", "[launch] ACTIVE",
        "[launch] giving the machines back",
    ]  # fmt: skip
    steps = [line["step"] for line in metric_lines(workdir) if "train/loss" in line]
    assert steps == [*range(3, 40, 3), 40], "each step once, whatever was lost in between"
