import pathlib
import subprocess
import sys

import pytest

from launch import slurm
from launch.job import Job, Restarts, Sweep

TRAIN = ["maskformer", "train", "--config=configs/bert.py:tiny", "--workdir=runs/x"]
ROOT = pathlib.Path(__file__).parents[2]


def render(command=TRAIN, *, processes=1, max_restarts=10, signal_lead=120, array=None, time="60", **options):
    """The file for a job with those fields."""
    sweep = None if array is None else Sweep.parse(array)
    return slurm.render(Job(command, processes, max_restarts, signal_lead, sweep), time=time, **options)


def arguments_seen_by_srun(script, tmp_path, task="3"):
    """Runs the file under bash with an `srun` that records its arguments, as the shell hands them over."""
    fake = tmp_path / "srun"
    fake.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/seen\n')
    fake.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": task}
    subprocess.run(["bash"], input=script, text=True, env=environ, check=True)
    return (tmp_path / "seen").read_text().split("\0")[:-1]


@pytest.mark.parametrize(
    "word",
    [
        "a b", "it's", '"$HOME"', "`id`", "a;b", "--config.model.mask=causal & (window(4) | sinks(2))", "*", "\\",
        "", "--", "a\nb", "\n#SBATCH --uid=0", "\u0667",
    ],
)  # fmt: skip
@pytest.mark.parametrize("array", [None, "0-7"])
def test_every_argument_reaches_the_program_as_it_was_written(word, array, tmp_path):
    script = render(["program", word, "{index}" if array else "3"], array=array, bin_dir=str(tmp_path))
    assert arguments_seen_by_srun(script, tmp_path)[-3:] == ["program", word, "3"]


def test_an_array_adds_the_sweep_index_to_the_command(tmp_path):
    seen = arguments_seen_by_srun(render(array="0-7", bin_dir=str(tmp_path)), tmp_path)
    assert seen[-5:] == [*TRAIN, "--sweep-index=3"]


def test_a_command_may_place_the_index_itself(tmp_path):
    command = ["python", "train it.py", "--seed={index}", "--out=a 'b' {index}/{index}"]
    seen = arguments_seen_by_srun(render(command, array="0-7", bin_dir=str(tmp_path)), tmp_path)
    assert seen[-4:] == ["python", "train it.py", "--seed=3", "--out=a 'b' 3/3"]


def test_every_field_reaches_its_sbatch_option():
    script = render(
        TRAIN, name="bert", nodes=2, processes=8, time="8:00:00", cpus_per_task=8, gpus_per_node=4,
        partition="gpu", array="0-7%2", signal_lead=300, max_restarts=5, logs="logs", setup=["module load cuda"],
        extra=["--account=lab", '--comment=a "b" #c'],
    )  # fmt: skip
    options = {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert options == {
        "--job-name=bert", "--nodes=2", "--ntasks-per-node=4", "--time=8:00:00", "--cpus-per-task=8",
        "--gpus-per-node=4", "--partition=gpu", "--array=0-7%2", "--signal=TERM@300", "--requeue",
        "--open-mode=append", "--output=logs/bert-%A_%a.log", "--account=lab", r'--comment="a \"b\" \#c"',
    }  # fmt: skip
    lines = script.splitlines()
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if line.startswith("srun"))
    assert "--cpus-per-task=8 \\" in next(line for line in lines if line.startswith("srun"))
    assert "failure $failures of at most 5" in script


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": "8h"}, "--time '8h': expected minutes, H:M:S"),
        ({"time": "1", "signal_lead": 60}, "--signal-lead 60: expected 1 to 59 s, inside --time 1"),
        ({"array": "0..7"}, "--array '0..7': expected for example 0-7"),
        ({"nodes": 0}, "--nodes 0: expected at least 1"),
        ({"name": "a\n#SBATCH --uid=0"}, "--name"),
        ({"logs": "my logs"}, "--logs 'my logs'"),
        ({"extra": ["account=x"]}, "--sbatch-extra 'account=x': expected --option=value"),
        ({"extra": ["--a=x\nrm"]}, "--sbatch-extra"),
        ({"command": []}, "the command is empty"),
        ({"command": ["", "x"]}, "the name of a program first"),
        ({"command": ["x", "a\0b"]}, "no NUL character"),
        ({"array": "7-0"}, "--array '7-0': expected ranges that count upwards; did you mean 0-7?"),
        ({"array": "0-7:0"}, "--array '0-7:0': expected a step of at least 1"),
        ({"array": "0-7%0"}, "--array '0-7%0': expected at least one run at a time"),
        ({"array": "0-4000001"}, "--array '0-4000001': expected numbers of at most 4000000"),
        ({"array": "\u0660-\u0667"}, "expected for example 0-7"),
        ({"array": "0-" + "7" * 5000}, "expected for example 0-7"),
        ({"time": "\u0666\u0660"}, "expected minutes, H:M:S"),
        ({"time": "60\n"}, "--time '60\\n': expected minutes"),
        ({"time": "0"}, "--time '0': expected more than nothing"),
        ({"time": "999999999"}, "at most ten years"),
        ({"time": "9" * 5000}, "expected minutes, H:M:S"),
        ({"time": "2-0", "signal_lead": 65536}, "--signal-lead 65536: expected 1 to 65535 s"),
        ({"signal_lead": 1.5}, "--signal-lead 1.5: expected 1 to 3599 s"),
        ({"signal_lead": float("nan")}, "--lead nan: expected seconds"),
        ({"max_restarts": -1}, "--max-restarts -1: expected at least 0"),
        ({"processes": 0}, "--processes 0: expected at least 1"),
        ({"processes": 3, "nodes": 2}, "--nodes 2: expected a divisor of the job's 3 processes"),
        ({"cpus_per_task": -1}, "--cpus-per-task -1: expected at least 1"),
        ({"gpus_per_node": 0}, "--gpus-per-node 0: expected at least 1"),
        ({"name": "\u0645"}, "--name"),
        ({"name": ""}, "--name ''"),
        ({"name": "x" * 300}, "--name"),
        ({"partition": "a b"}, "--partition 'a b'"),
        ({"logs": "\u0645"}, "--logs"),
        ({"setup": ["a\0b"]}, "--setup"),
        ({"extra": ["--a=x\ry"]}, "--sbatch-extra"),
        ({"extra": ["--array=0-7"]}, "--sbatch-extra '--array=0-7': expected an option that this file does not set"),
        ({"extra": ["--signal=B:INT@9"]}, "an option that this file does not set"),
        ({"command": ["run", "{index}"]}, "{index} needs --array"),
    ],
)
def test_what_slurm_would_misread_is_refused_by_name(change, message):
    with pytest.raises(ValueError) as error:
        render(**change)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10", 600), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("1-0:0:5", 86405)],
)
def test_every_time_format_of_slurm_is_read(text, expected):
    assert slurm.seconds(text) == expected


def test_the_command_line_prints_or_writes_the_same_file(tmp_path, capsys):
    flags = ["--time", "30", "--array", "0-1", "--max-parallel", "1", "--sbatch-extra=--account=x", "--", *TRAIN]
    assert slurm.main(flags) == 0
    printed = capsys.readouterr().out
    assert slurm.main(["--output", str(tmp_path / "job.sh"), *flags]) == 0
    assert (tmp_path / "job.sh").read_text() == printed == render(
        TRAIN, time="30", array="0-1%1", extra=["--account=x"]
    )


def test_an_error_is_one_line_and_code_2(capsys):
    assert slurm.main(["--time", "soon", "--", "true"]) == 2
    assert capsys.readouterr().err.startswith("error: --time 'soon'")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--array", "7-0"], "--array '7-0': expected ranges that count upwards; did you mean 0-7?"),
        (["--array", "\u0660-\u0667"], "--array '\u0660-\u0667': expected for example 0-7, 1,3,5 or 0-99%4"),
        (["--nodes", "\u0662"], "--nodes '\u0662': expected a whole number"),
        (["--nodes", "1_0"], "--nodes '1_0': expected a whole number"),
        (["--tasks-per-node", "0"], "--tasks-per-node 0: expected at least 1"),
        (["--cpus-per-task", "9" * 5000], "--cpus-per-task '" + "9" * 119 + ": expected a whole number"),
        (["--max-restarts", "-1"], "--max-restarts -1: expected at least 0"),
        (["--signal-lead", "inf"], "--signal-lead 'inf': expected seconds, at least 0"),
    ],
)
def test_a_wrong_flag_is_one_line_and_code_2(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        slurm.main(["--time", "60", *flags, "--", "true"])
    assert capsys.readouterr().err == f"error: {message}\n"


class Starts:
    """A job of which each start is the same file, run by bash with an `srun` that takes no time."""

    def __init__(self, folder, **options):
        (folder / "logs").mkdir()
        self.folder, self.script = folder, render(bin_dir=str(folder), logs="logs", name="x", **options)
        self.program("scontrol", 'echo "$@"')

    def program(self, name, text):
        (self.folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.folder / name).chmod(0o755)

    def requeued(self, code, seconds=0):
        """Whether a start that ends with this code, after so many seconds, is requeued."""
        # Bash counts the seconds of the file; a line of the setup could set them as well.
        self.program("srun", f"exit {code}")
        script = self.script.replace("code=$?", f"code=$? SECONDS={seconds}")
        environ = {"PATH": f"{self.folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
        done = subprocess.run(
            ["bash"], input=script, text=True, env=environ, stdout=subprocess.PIPE, cwd=self.folder, timeout=30
        )
        assert done.returncode == code
        return "requeue 7" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("code", "requeued"),
    [(0, False), (1, True), (2, False), (70, True), (75, True), (130, False), (137, True), (143, True)],
)
def test_what_is_requeued_is_told_by_the_exit_code(code, requeued, tmp_path):
    assert Starts(tmp_path).requeued(code) == requeued
    assert (tmp_path / "logs" / "x-7.ends").exists() == requeued, "what has ended for good leaves no count"


def test_a_stop_after_saving_is_not_counted_and_a_failure_is(tmp_path):
    starts = Starts(tmp_path, max_restarts=2)
    ends = [(75, 100), (137, 5), *[(75, 100)] * 12, (1, 5), (70, 5)]
    assert [starts.requeued(*end) for end in ends] == [True] * 15 + [False]


def test_a_command_that_exits_75_at_once_is_not_requeued_for_ever(tmp_path):
    starts, restarts = Starts(tmp_path), Restarts(10)
    ends = [(75, 3), (1, 3), (75, 3), (75, 61), *[(75, 59)] * 10]
    answers = [starts.requeued(*end) for end in ends]
    assert answers == [True] * 13 + [False]
    assert answers == [restarts.pause(*end) is not None for end in ends], "the shell has the rules of Python"


def test_what_cannot_be_counted_is_not_requeued(tmp_path):
    starts = Starts(tmp_path)
    (tmp_path / "logs").rmdir()
    assert not starts.requeued(75)


def test_bytes_that_are_not_text_reach_the_file_as_they_are(tmp_path):
    word = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert slurm.main(["--time", "30", "--output", str(tmp_path / "job.sh"), "--", "prog", word]) == 0
    assert b"caf\xe9" in (tmp_path / "job.sh").read_bytes()


# From here on against a real Slurm of one node; skipped where none can be started.


@pytest.fixture
def submit(slurm_cluster, tmp_path, monkeypatch):
    """Submits Python source with `launch.slurm`, waits for its end, returns the job and the logs by name."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.environment[name])
    monkeypatch.chdir(tmp_path)

    def run(source, arguments=(), before_the_end=lambda job: None, timeout=120, **options):
        (tmp_path / "script.py").write_text(source)
        options = {"time": "5", "logs": str(tmp_path / "logs")} | options
        script = render([sys.executable, str(tmp_path / "script.py"), *arguments], **options)
        job = slurm.submit(script, options["logs"])
        before_the_end(job)
        slurm_cluster.wait(job, timeout)
        return job, {path.stem: path.read_text() for path in (tmp_path / "logs").iterdir()}

    return run


@pytest.mark.multiprocess
def test_slurm_tasks_join_one_jax_job_without_arguments(submit, tmp_path):
    source = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from maskformer.training import distributed
assert distributed.initialize()
import jax, numpy as np
from jax.experimental import multihost_utils
everyone = multihost_utils.process_allgather(np.array([jax.process_index() + 1]))
with open(f"joined-{{jax.process_index()}}", "w") as file:  # not stdout, where gloo's own lines may run into ours
    file.write(f"{{jax.process_count()}} {{int(everyone.sum())}}")
"""
    job, logs = submit(source, processes=2, setup=["export JAX_PLATFORMS=cpu"])
    answers = {path.name: path.read_text() for path in tmp_path.glob("joined-*")}
    assert answers == {"joined-0": "2 3", "joined-1": "2 3"}, logs[f"maskformer-{job}"]


def test_slurm_runs_each_index_of_an_array(submit):
    job, logs = submit("import sys; print(sys.argv[1:])", array="2-4")
    assert logs == {f"maskformer-{job}_{i}": f"0: ['--sweep-index={i}']\n" for i in (2, 3, 4)}


# Runs until SIGTERM, then ends with 75; the second time it just ends.
PREEMPTED_ONCE = """
import os, signal, sys, time
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
again = os.environ.get("SLURM_RESTART_COUNT")
print("resumed" if again else "started", flush=True)
if again is None:
    open(f"ready-{os.environ.get('SLURM_ARRAY_TASK_ID', '')}-{os.environ['SLURM_PROCID']}", "w").close()
    time.sleep(600)
"""
EVENTS = [f"{task}: {event}" for event in ("resumed", "saved", "started") for task in (0, 1)]


def events(log):
    """The one-word lines that the tasks printed, with the task's label; what Slurm itself says is longer."""
    lines = [line for line in log.splitlines() if line[:3] in ("0: ", "1: ") and " " not in line[3:]]
    return sorted(lines, key=lambda line: line[3:] + line)


def test_slurm_requeues_a_job_that_saved_on_sigterm(submit, slurm_cluster, tmp_path):
    def terminate(job):
        slurm_cluster.until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "the tasks did not start")
        slurm_cluster.call("scancel", "--signal=TERM", job)

    job, logs = submit(PREEMPTED_ONCE, processes=2, before_the_end=terminate)
    assert events(logs[f"maskformer-{job}"]) == EVENTS
    assert slurm_cluster.field(job, "Restarts") == "1"
    assert slurm_cluster.field(job, "JobState") == "COMPLETED"


def test_slurm_requeues_only_the_array_task_that_asked(submit, slurm_cluster, tmp_path):
    def terminate(job):
        slurm_cluster.until(lambda: len(list(tmp_path.glob("ready-*"))) == 1, "the task did not start")
        slurm_cluster.call("scancel", "--signal=TERM", f"{job}_1")

    # Task 0 ends at once; task 1 has the number of the whole array as its SLURM_JOB_ID.
    first = "import os\nif os.environ['SLURM_ARRAY_TASK_ID'] == '0': print('once'); raise SystemExit\n"
    source = first + PREEMPTED_ONCE
    job, logs = submit(source, array="0-1", arguments=["{index}"], before_the_end=terminate)
    assert logs[f"maskformer-{job}_0"] == "0: once\n"
    assert events(logs[f"maskformer-{job}_1"]) == ["0: resumed", "0: saved", "0: started"]


def test_slurm_gives_up_after_the_last_restart(submit, slurm_cluster):
    job, logs = submit("print('try', flush=True); raise SystemExit(70)", max_restarts=1)
    assert logs[f"maskformer-{job}"].count("0: try") == 2
    assert (slurm_cluster.field(job, "JobState"), slurm_cluster.field(job, "ExitCode")) == ("FAILED", "70:0")


def test_slurm_does_not_requeue_a_cancelled_job(submit, slurm_cluster, tmp_path):
    def cancel(job):
        slurm_cluster.until(lambda: len(list(tmp_path.glob("ready-*"))) == 1, "the task did not start")
        slurm_cluster.call("scancel", job)

    job, logs = submit(PREEMPTED_ONCE, before_the_end=cancel)
    assert events(logs[f"maskformer-{job}"]) == ["0: saved", "0: started"]
    assert slurm_cluster.field(job, "JobState") == "CANCELLED"


@pytest.mark.slow
def test_slurm_signals_ahead_of_the_time_limit(submit, slurm_cluster):
    job, logs = submit(PREEMPTED_ONCE, processes=2, time="1", signal_lead=50)
    assert events(logs[f"maskformer-{job}"]) == EVENTS
    assert slurm_cluster.field(job, "JobState") == "COMPLETED"
