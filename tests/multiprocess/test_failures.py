"""An error on one process ends the whole run: the launcher sees its exit code, and stops those that wait for it."""

import pathlib
import subprocess
import sys

import pytest

from maskformer.training.lock import Lock
from tests.training.tiny import write_corpus

pytestmark = pytest.mark.multiprocess
ROOT = pathlib.Path(__file__).parents[2]

FAIL = '''"""Fail on some of the processes."""


def add_arguments(parser):
    parser.add_argument("who")


def run(arguments, config_flags):
    from maskformer.training import distributed

    distributed.initialize()
    import jax
    from jax._src.distributed import global_state

    if arguments.who in ("both", str(jax.process_index())):
        raise KeyError("broken")
    global_state.client.wait_at_barrier("never", 600_000)
'''


def launch(*command):
    """Exit code and output of two processes; JAX would wait five minutes for one that does not come."""
    launcher = [sys.executable, "-m", "launch.local", "--processes=2", "--", sys.executable, *map(str, command)]
    done = subprocess.run(launcher, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, timeout=60)
    return done.returncode, done.stdout


def test_a_workdir_that_another_training_has_is_a_mistake_of_two_processes_too(tmp_path):
    corpus, recipe, workdir = write_corpus(tmp_path / "text"), tmp_path / "tiny.py", tmp_path / "run"
    recipe.write_text(
        "from tests.training.tiny import tiny_config\n"
        f"def get_config(arg=None):\n    return tiny_config({str(corpus)!r})\n"
    )
    workdir.mkdir()
    with Lock(workdir):
        code, out = launch(
            "-m", "maskformer.cli", "train", f"--config={recipe}", "--config.mesh.data=-1", f"--workdir={workdir}"
        )
    assert code == 2, out
    assert f"[0] error: workdir {workdir}: process " in out and "is training in it" in out
    assert "Traceback" not in out


@pytest.mark.parametrize("who", ["1", "both"])
def test_an_error_of_the_program_shows_where_and_ends_the_run(who, tmp_path):
    (tmp_path / "fail.py").write_text(FAIL)
    code, out = launch(
        "-c",
        f"import sys; from maskformer import cli; cli.__path__.append({str(tmp_path)!r}); "
        f"sys.argv = ['maskformer', 'fail', {who!r}]; sys.exit(cli.main())",
    )
    assert code == 1, out
    for index in (0, 1):
        assert (f"[{index}] KeyError: 'broken'" in out) == (who in ("both", str(index)))
    # Those that fail together end in good order: none is cut off by the end of another.
    assert who != "both" or "coordination service" not in out.lower(), out
