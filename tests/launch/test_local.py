import signal
import subprocess
import sys
import textwrap
import time

import pytest

from launch import local


def start(script, *options, processes=2, folder):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.Popen(
        [sys.executable, "-m", "launch.local", "--processes", str(processes), *options, "--", "python", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
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
    code, _ = finish(start(script, folder=tmp_path))
    assert code == 3
    assert time.monotonic() - begin < 30


def test_a_killed_process_gives_128_plus_the_signal(tmp_path):
    code, _ = finish(start("import os; os.kill(os.getpid(), 9)", processes=1, folder=tmp_path))
    assert code == 137


def test_the_others_may_save_after_the_first_exit_code_75(tmp_path):
    script = """
        import os, sys, time
        if os.environ["JAX_PROCESS_ID"] == "0":
            sys.exit(75)
        time.sleep(7)  # longer than the patience after a crash
        print("saved")
        sys.exit(75)
    """
    code, out = finish(start(script, folder=tmp_path))
    assert code == 75
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
    launcher = start(script, "--requeue", "5", folder=tmp_path)
    seen = ""
    while seen.count("ready") < 2:
        seen += launcher.stdout.readline()
    launcher.send_signal(number)
    code, out = finish(launcher)
    assert code == 75
    assert sorted(out.splitlines()) == [f"[{i}] got {number.value}" for i in range(2)]


def test_exit_code_75_starts_again_up_to_the_limit(tmp_path):
    marks = tmp_path / "marks"
    script = f"""
        import sys
        with open({str(marks)!r}, "a+") as file:
            file.write("x")
            file.seek(0)
            sys.exit(75 if len(file.read()) < 3 else 0)
    """
    assert finish(start(script, "--requeue", "1", processes=1, folder=tmp_path))[0] == 75
    assert marks.read_text() == "xx"
    assert finish(start(script, "--requeue", "5", processes=1, folder=tmp_path))[0] == 0
    assert marks.read_text() == "xxx"


def test_lines_of_a_progress_bar_are_prefixed_one_by_one(tmp_path):
    code, out = finish(start(r"print('a\rb\rc')", processes=1, folder=tmp_path))
    assert (code, out.splitlines()) == (0, ["[0] a", "[0] b", "[0] c"])


def test_the_device_count_of_the_caller_is_replaced_and_its_other_flags_stay():
    base = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_other=1"}
    assert local.environment(0, 2, 1, 3, base=base)["XLA_FLAGS"].split() == [
        "--xla_other=1", "--xla_force_host_platform_device_count=3",
    ]  # fmt: skip


def test_gpus_of_the_machine_are_dealt_out_in_order():
    given = [local.environment(i, 2, 1, 2, "gpu", base={})["JAX_LOCAL_DEVICE_IDS"] for i in range(2)]
    assert given == ["0,1", "2,3"]


def test_an_unknown_command_is_one_line_and_code_127(capsys):
    assert local.main(["--processes", "2", "--", "no-such-program"]) == 127
    assert capsys.readouterr().err == "error: 'no-such-program' was not found: is it installed, and on PATH?\n"


def test_zero_processes_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        local.main(["--processes", "0", "--", "true"])
    assert "--processes 0: expected at least 1" in capsys.readouterr().err
