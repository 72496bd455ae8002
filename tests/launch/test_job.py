import json
import os
import pathlib
import subprocess
import sys

import pytest

from launch.job import Job, Restarts, Sweep

ROOT = pathlib.Path(__file__).parents[2]

def test_a_launcher_is_one_file(tmp_path):
    # As docs/launch.md shows it.
    page = (ROOT / "docs" / "launch.md").read_text()
    (tmp_path / "hosts.py").write_text(page.split("```python\n# hosts.py\n")[1].split("```")[0])

    def run(*flags):
        command = [sys.executable, str(tmp_path / "hosts.py"), *flags]
        return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})

    # Like ssh, which joins its arguments and has the shell of the host read them.
    (tmp_path / "ssh").write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/to_"$1"\nshift\nexec /bin/sh -c "$*"\n')
    (tmp_path / "ssh").chmod(0o755)
    told = "json.dumps([os.environ['JAX_COORDINATOR_ADDRESS'], os.environ['JAX_NUM_PROCESSES'], sys.argv[1:]])"
    command = f"""
import json, os, pathlib, sys
index = os.environ["JAX_PROCESS_ID"]
pathlib.Path({str(tmp_path)!r}, index).write_text({told})
sys.exit([0, 75, 3][int(index)])
"""
    words = ["", "--x=1 2", "$HOME", "it's", 'say "so"', "two\nlines", "*", "a;b"]
    done = run("--hosts", "a,b,c", "--", sys.executable, "-c", command, *words)
    assert (done.returncode, done.stderr) == (0, "")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "pids": "1"}
    script = subprocess.run(["sh", "-c", done.stdout], capture_output=True, text=True, env=environment, timeout=60)
    assert (script.returncode, script.stderr) == (75, ""), "the worst of 0, 75 and 3, once all have ended"
    for index, host in enumerate("abc"):
        assert json.loads((tmp_path / str(index)).read_text()) == ["a:8476", "3", words]
        assert (tmp_path / f"to_{host}").exists()
    done = run("--hosts", "a", "--nodes=2", "--", "train")
    assert (done.returncode, done.stderr) == (2, "error: unrecognized arguments: --nodes=2\n")
    done = run("--hosts", "a,b")
    assert (done.returncode, done.stderr) == (2, "error: the command is empty: write it after `--`\n")


@pytest.mark.parametrize("text", ["0", "0-7", "1,3,5", "0-99%4", "0-6:2", "5-5", "2,0-1"])
def test_a_sweep_is_written_as_it_was_read(text):
    sweep = Sweep.parse(text)
    assert Sweep.parse(str(sweep)).indices() == sweep.indices()
    assert str(Sweep.parse(str(sweep))) == str(sweep)


def test_a_sweep_says_each_number_once_and_in_order():
    assert Sweep.parse("4,0-2,1-5:2").indices() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "text", ["", "a", "-1", "1-", "0-7:", "7-0", "0-7:0", "0-7%0", "\u0660", "1\n", "1 ", "1,,2", "1_0"]
)
def test_what_is_no_sweep_is_refused_by_value(text):
    with pytest.raises(ValueError, match="--array") as error:
        Sweep.parse(text)
    assert repr(text) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processes": 2.0}, "--processes 2.0: expected a whole number"),
        ({"processes": True}, "--processes True: expected a whole number"),
        ({"restarts": -1}, "--max-restarts -1: expected at least 0"),
        ({"lead": -1}, "--lead -1: expected seconds"),
        ({"lead": float("inf")}, "--lead inf: expected seconds"),
        ({"command": ["x", "\0" * 3000]}, "command '\\x00\\x00"),
    ],
)
def test_a_job_that_no_launcher_could_honour_is_refused(change, message):
    with pytest.raises(ValueError) as error:
        Job(**({"command": ["true"]} | change))
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("code", [0, 2, 130])
def test_what_is_done_called_wrongly_or_interrupted_is_never_started_again(code):
    assert Restarts(10).pause(code, 5000.0) is None


def test_failures_are_counted_and_stops_after_saving_are_not():
    restarts = Restarts(2)
    pauses = [restarts.pause(code, 5000.0) for code in [75, 75, 137, *[75] * 50, 1, 70]]
    assert pauses == [1.0] * 54 + [None]


def test_the_pauses_of_a_command_that_ends_at_once_double_up_to_a_minute_and_its_tenth_75_is_the_last():
    restarts = Restarts(0)
    assert [restarts.pause(75, 0.1) for _ in range(10)] == [1, 2, 4, 8, 16, 32, 60, 60, 60, None]
    restarts = Restarts(0)
    assert [restarts.pause(75, seconds) for seconds in [0.1] * 9 + [60.0, 0.1]][-2:] == [1.0, 1.0]
