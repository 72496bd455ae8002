import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from launch import job, local


def start(script, *options, processes=2, folder, shell=None):
    """Starts it; `shell` is a shell's command line, in which `$0` is the script to run with Python."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    command = ["python", str(path)] if shell is None else ["bash", "-c", shell, str(path)]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.local", "--processes", str(processes), *options, "--", *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # The tests may run under nohup, whose children ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip


def finish(launcher, timeout=60):
    try:
        out, _ = launcher.communicate(timeout=timeout)
    finally:
        launcher.kill()
    return launcher.returncode, out


def test_every_process_gets_its_own_index_and_the_same_coordinator(tmp_path):
    script = """
        import os
        print(os.environ["JAX_PROCESS_ID"], os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_COORDINATOR_ADDRESS"])
    """
    code, out = finish(start(script, "--port", "12345", processes=3, folder=tmp_path))
    assert code == 0
    assert sorted(out.splitlines()) == [f"[{i}] {i} 3 127.0.0.1:12345" for i in range(3)]


def test_a_crash_stops_the_others_and_gives_its_exit_code(tmp_path):
    # The others ignore SIGTERM, as a JAX process waiting in a collective does.
    script = """
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(3) if os.environ["JAX_PROCESS_ID"] == "1" else time.sleep(600)
    """
    begin = time.monotonic()
    code, out = finish(start(script, folder=tmp_path))
    assert (code, out) == (3, "[launch] process 1 failed (exit code 3); the others were stopped\n")
    assert time.monotonic() - begin < 30


def test_a_killed_process_gives_128_plus_the_signal(tmp_path):
    code, out = finish(start("import os; os.kill(os.getpid(), 9)", processes=1, folder=tmp_path))
    assert (code, out) == (137, "[launch] process 0 was killed by signal 9 (exit code 137)\n")


def test_a_start_after_a_failure_says_which_process_failed(tmp_path):
    script = """
        import os, pathlib, time
        mark = pathlib.Path(__file__).with_name("mark")
        if not mark.exists() and os.environ["JAX_PROCESS_ID"] == "1":
            mark.touch()
            os.kill(os.getpid(), 9)
        mark.exists() or time.sleep(600)
    """
    code, out = finish(start(script, "--max-restarts", "1", folder=tmp_path))
    words = "exit code 137 (failure 1 of at most 1): starting again in 1 s, 2 processes"
    assert (code, out) == (0, f"[launch] {words}; process 1 was killed by signal 9\n")


def test_a_process_that_is_stuck_after_another_ended_well_is_not_waited_for_for_ever(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(local, "_LAST_GRACE", 0.5)
    script = tmp_path / "script.py"
    script.write_text("import os, time\nos.environ['JAX_PROCESS_ID'] == '0' or time.sleep(600)")
    begin = time.monotonic()
    assert local.submit(job.Job(["python", str(script)], processes=2)) == 137
    said = "was killed, since it had not ended 0.5 s after another (exit code 137); the others were stopped"
    assert capfd.readouterr().out == f"[launch] process 1 {said}\n"
    assert time.monotonic() - begin < 30


def test_the_others_may_save_after_the_first_exit_code_75(tmp_path):
    script = """
        import os, pathlib, sys, time
        saved = pathlib.Path(__file__).with_name("saved")
        if saved.exists():
            sys.exit(0)
        if os.environ["JAX_PROCESS_ID"] == "0":
            sys.exit(75)
        time.sleep(7)  # longer than the patience after a crash
        saved.touch()
        print("saved")
        sys.exit(75)
    """
    code, out = finish(start(script, folder=tmp_path))
    assert code == 0
    assert "[1] saved" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_and_ends_the_requeueing(number, tmp_path):
    script = """
        import signal, sys, time
        def stop(number, frame):
            print("got", number, flush=True)
            sys.exit(75)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        print("ready", flush=True)
        time.sleep(600)
    """
    launcher = start(script, "--max-restarts", "5", folder=tmp_path)
    seen = ""
    while seen.count("ready") < 2:
        seen += launcher.stdout.readline()
    launcher.send_signal(number)
    code, out = finish(launcher)
    assert code == 75
    assert sorted(out.splitlines()) == [f"[{i}] got {number.value}" for i in range(2)]


def lines_of(launcher, word, count):
    """Reads the output until `count` lines hold the word; returns those."""
    found = []
    while len(found) < count:
        line = launcher.stdout.readline()
        assert line, f"the output ended after {found}"
        found += [line] if word in line else []
    return found


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody has buried yet runs no more.
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state) and not state.startswith("Z")


@pytest.mark.parametrize("shell", [None, "python $0; true", "python $0 & wait"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_the_processes_and_their_children_end_with_the_launcher(shell, number, tmp_path):
    script = """
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("pid", os.getpid(), os.getppid(), flush=True)
        time.sleep(600)
    """
    launcher = start(script, folder=tmp_path, shell=shell)
    pids = {int(pid) for line in lines_of(launcher, "pid", 2) for pid in line.split()[-2:]} - {launcher.pid}
    launcher.send_signal(number)
    launcher.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if alive(pid)]


SAVES = """
    import os, signal, sys, time
    def stop(number, frame):
        time.sleep(0.3)
        print("saved", flush=True)
        os._exit(130 if number == signal.SIGINT else 75)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_behind_a_shell_may_save(number, code, tmp_path):
    launcher = start(SAVES, processes=1, folder=tmp_path, shell="python $0; exit $?")
    lines_of(launcher, "ready", 1)
    launcher.send_signal(number)
    ended, out = finish(launcher)
    assert (ended, out) == (code, "[0] saved\n")  # 143: the shell itself ends by SIGTERM


def test_after_a_sigint_the_others_may_save_and_nothing_is_started_again(tmp_path):
    launcher = start(SAVES, "--max-restarts", "5", folder=tmp_path)
    lines_of(launcher, "ready", 2)
    launcher.send_signal(signal.SIGINT)
    code, out = finish(launcher)
    assert (code, sorted(out.splitlines())) == (130, ["[0] saved", "[1] saved"])


def test_exit_code_130_of_one_process_is_not_requeued(tmp_path):
    # Its own SIGINT, not ours; the other only heard that the run stops, and came first.
    script = """
        import os, sys, time
        print("run", flush=True)
        if os.environ["JAX_PROCESS_ID"] == "0":
            sys.exit(75)
        time.sleep(0.3)
        sys.exit(130)
    """
    code, out = finish(start(script, "--max-restarts", "5", folder=tmp_path))
    assert (code, out.count("run")) == (130, 2)


def test_the_runs_of_a_sweep_follow_one_another_and_each_gets_its_index(tmp_path):
    script = "import sys; print(sys.argv[1:]); sys.exit(3 if '--sweep-index=2' in sys.argv else 0)"
    code, out = finish(start(script, "--array", "0-4:2", processes=1, folder=tmp_path))
    assert code == 3
    ran = [f"[0] ['--sweep-index={index}']" for index in (0, 2, 4)]
    assert out.splitlines() == [*ran[:2], "[launch] process 0 failed (exit code 3)", ran[2]]


def test_every_argument_reaches_the_program_as_it_was_written(capfd):
    words = ["", "a b", "--", "--port", "a\nb", "$HOME", "'\"\\"]
    flags = ["--processes", "1", "--", sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))"]
    assert local.main([*flags, *words]) == 0
    assert capfd.readouterr().out == f"[0] {words!a}\n"


# Ends with the next of these codes at each start, each said by process 0 of so many.
ENDS = """
    import os, pathlib, sys
    marks = pathlib.Path(__file__).with_name("marks")
    if os.environ["JAX_PROCESS_ID"] == "0":
        marks.write_text((marks.read_text() if marks.exists() else "") + os.environ["JAX_NUM_PROCESSES"])
        sys.exit({codes}[len(marks.read_text()) - 1])
"""


@pytest.mark.parametrize(
    ("codes", "restarts", "starts", "code"),
    [
        ([75, 75, 0], 0, 3, 0),
        ([1, 0], 0, 1, 1),
        ([70, 75, 1, 0], 1, 3, 1),
        ([2, 0], 5, 1, 2),
        ([130, 0], 5, 1, 130),
    ],
)
def test_exit_code_75_starts_again_for_nothing_and_a_failure_is_counted(codes, restarts, starts, code, tmp_path):
    flags = ("--max-restarts", str(restarts))
    assert finish(start(ENDS.format(codes=codes), *flags, processes=1, folder=tmp_path))[0] == code
    assert len((tmp_path / "marks").read_text()) == starts


def test_each_start_takes_the_next_count_of_processes_and_the_last_one_stays(tmp_path):
    code, out = finish(start(ENDS.format(codes=[75, 75, 0]), processes="3,2", folder=tmp_path))
    assert (code, (tmp_path / "marks").read_text()) == (0, "322")
    assert out.splitlines()[0] == "[launch] exit code 75 (after saving): starting again in 1 s, 2 processes"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_between_two_starts_ends_the_launcher(number, code, tmp_path):
    launcher = start(ENDS.format(codes=[1, 0]), "--max-restarts", "5", processes=1, folder=tmp_path)
    lines_of(launcher, "starting again", 1)
    launcher.send_signal(number)
    assert finish(launcher) == (code, "")
    assert (tmp_path / "marks").read_text() == "1"


def test_lines_of_a_progress_bar_are_prefixed_one_by_one(tmp_path):
    code, out = finish(start(r"print('a\rb\rc')", processes=1, folder=tmp_path))
    assert (code, out.splitlines()) == (0, ["[0] a", "[0] b", "[0] c"])


def test_gloo_is_quiet_where_all_are_connected(tmp_path):
    line = "[Gloo] Rank 0 is connected to {} peer ranks. Expected number of connected peer ranks is : {}"
    script = f"for one in (1, 1), (12, 12), (1, 12): print({line!r}.format(*one))\nprint('x {line}')"
    code, out = finish(start(script, processes=1, folder=tmp_path))
    assert (code, out.splitlines()) == (0, [f"[0] {line.format(1, 12)}", f"[0] x {line}"])


def test_the_device_count_of_the_caller_is_replaced_and_its_other_flags_stay():
    base = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_other=1"}
    assert local.environment(0, 2, 1, 3, base=base)["XLA_FLAGS"].split() == [
        "--xla_other=1", "--xla_force_host_platform_device_count=3",
    ]  # fmt: skip


def test_gpus_of_the_machine_are_dealt_out_in_order():
    given = [local.environment(i, 2, 1, 2, "gpu", base={})["JAX_LOCAL_DEVICE_IDS"] for i in range(2)]
    assert given == ["0,1", "2,3"]


def test_a_process_without_a_gpu_fails_unless_the_caller_names_another_platform():
    assert local.environment(0, 1, 1, 1, "gpu", base={})["JAX_PLATFORMS"] == "cuda"
    assert local.environment(0, 1, 1, 1, "gpu", base={"JAX_PLATFORMS": "rocm"})["JAX_PLATFORMS"] == "rocm"
    environment = local.environment(0, 1, 1, 1, "gpu") | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True)
    assert done.returncode == 1


def test_an_unknown_command_is_one_line_and_code_127(capsys):
    assert local.main(["--processes", "2", "--", "no-such-program"]) == 127
    assert capsys.readouterr().err == "error: 'no-such-program' was not found: is it installed, and on PATH?\n"


def test_a_command_that_is_no_program_is_one_line_and_code_126(tmp_path, capsys):
    (tmp_path / "data").write_text("not a program")
    for path, reason in ((tmp_path, "Permission denied"), (tmp_path / "data", "Permission denied")):
        assert local.main(["--processes", "2", "--", str(path)]) == 126
        assert capsys.readouterr().err == f"error: '{path}' cannot be run here: {reason}\n"
    (tmp_path / "data").chmod(0o755)
    assert local.main(["--processes", "2", "--", str(tmp_path / "data")]) == 126
    assert "cannot be run here: Exec format error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "0"], "--processes 0: expected at least 1"),
        (["--processes", "\u0662"], "--processes '\u0662': expected a whole number"),
        (["--processes", "1.5"], "--processes '1.5': expected a whole number"),
        (["--devices-per-process", "-1"], "--devices-per-process -1: expected at least 1"),
        (["--port", "0"], "--port 0: expected at least 1"),
        (["--port", "65536"], "--port 65536: expected at most 65535"),
        (["--max-restarts", "-1"], "--max-restarts -1: expected at least 0"),
        (["--processes", "3,0"], "--processes 0: expected at least 1"),
        (["--processes", "3,"], "--processes '': expected a whole number"),
        (["--max-parallel", "2"], "--max-parallel 2: expected a sweep: give its runs with --array"),
        (["--array", "0-7%2", "--max-parallel", "3"], "--max-parallel 3: expected that of --array 0-7%2, or none"),
        (["--grace", "nan"], "--grace 'nan': expected seconds, at least 0"),
        (["--grace", "-1"], "--grace '-1': expected seconds, at least 0"),
        (["--array", "7-0"], "--array '7-0': expected ranges that count upwards; did you mean 0-7?"),
    ],
)
def test_a_wrong_flag_is_one_line_and_code_2(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        local.main(["--processes", "2", *flags, "--", "true"])
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "2", "--plattform=cpu", "--", "true"], "--plattform=cpu; did you mean --platform?"),
        (["--procesess", "2", "--", "true"], "--procesess; did you mean --processes?"),
        (["--processes", "2", "--zzz", "--", "true"], "--zzz"),
        (["--processes", "2", "--config=c", "--", "true"], "--config=c; write `--` before the command"),
        (["--processes", "2", "maskformer", "train", "--steps=1"], "--steps=1; write `--` before the command"),
        (["--processes", "2", "maskformer", "--workdir", "x"], "--workdir x; write `--` before the command"),
    ],
)
def test_an_unknown_flag_says_what_was_probably_meant(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        local.main(words)
    assert capsys.readouterr().err == f"error: unrecognized arguments: {message}\n"


@pytest.mark.parametrize("command", [[], [""], ["true", "{index}"], ["true", "a\0b"]])
def test_a_command_that_cannot_be_run_is_one_line_and_code_2(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        local.main(["--processes", "2", "--", *command])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
