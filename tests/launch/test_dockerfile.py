import fnmatch
import pathlib
import re
import subprocess
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def instructions():
    """Each instruction as its word and its text, over all of its lines."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    joined = re.sub(r"\\\n", " ", text)
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def installed(accelerator, extras, tmp_path):
    """Runs the step that installs packages in a shell, with a pip that only notes its arguments."""
    (script,) = [text for word, text in instructions() if word == "RUN" and "constraints.txt" in text]
    script = re.sub(r"^--mount=\S+ ", "", script)
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ACCELERATOR": accelerator, "EXTRAS": extras}
    return subprocess.run(["/bin/sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("accelerator", "extras", "wanted"),
    [("cpu", "gcs", "gcs"), ("tpu", "gcs", "tpu,gcs"), ("gpu", "", "gpu"), ("tpu", "gcs,wandb", "tpu,gcs,wandb"),
     ("cpu", "", "")],
)  # fmt: skip
def test_the_image_gets_the_pinned_packages_of_its_accelerator(accelerator, extras, wanted, tmp_path):
    done = installed(accelerator, extras, tmp_path)
    assert done.returncode == 0
    assert f"--constraint constraints.txt .[{wanted}]" in done.stdout.splitlines()[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {extra for extra in wanted.split(",") if extra} <= set(project["optional-dependencies"])


def test_an_unknown_accelerator_ends_the_build(tmp_path):
    done = installed("npu", "gcs", tmp_path)
    assert (done.returncode, done.stderr) == (2, "ACCELERATOR=npu: expected cpu, tpu or gpu\n")


def test_the_user_of_the_image_is_the_group_that_gke_lets_write_to_mounts():
    from launch import jobset

    words = [(word, text) for word, text in instructions() if word in ("USER", "COPY", "RUN")]
    (user,) = [text for word, text in words if word == "USER"]
    assert user == f"{jobset._GROUP}:{jobset._GROUP}" and words[-1] == ("USER", user)


def test_what_the_image_needs_is_neither_missing_nor_ignored():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    copied = [text.split()[:-1] for word, text in instructions() if word == "COPY" and not text.startswith("--from")]
    needed = {"maskformer", "configs", "experiments", "launch", *(name for names in copied for name in names)}
    for name in needed:
        assert (ROOT / name).exists()
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
    for name in (".git", ".venv", "runs", "tests", ".pytest_cache"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
