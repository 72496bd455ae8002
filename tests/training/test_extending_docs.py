"""The recipes of `docs/extending.md` train as the page says."""

import json
import pathlib
import re
import runpy

import pytest

from maskformer import cli

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "extending.md").read_text()
QUICK = [
    "--config.train.steps=2", "--config.optimizer.warmup_steps=0", "--config.train.batch_size=4",
    "--config.data.length=16", "--config.data.vocabulary_size=200", "--config.data.segment_by=sentence",
    "--config.train.log_every=1", "--config.evaluation.every=2", "--config.evaluation.max_batches=1",
    "--config.model.width=16", "--config.mesh.data=1", "--config.writers.progress=False",
    "--config.writers.tensorboard=False",
]  # fmt: skip


def recipe(name, folder):
    """The block of the page that begins with the file's name, as that file."""
    (text,) = re.findall(rf"```python\n# {name}\n(.*?)```", PAGE, flags=re.DOTALL)
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", ["my_recipe.py", "my_task.py"])
def test_the_pages_recipe_is_checked_and_trains(name, corpus, devices, tmp_path, capsys):
    file, workdir = recipe(name, tmp_path), tmp_path / "run"
    flags = [f"--config={file}", f"--config.data.name={corpus}", *QUICK]
    assert cli.main(["train", f"--workdir={workdir}", *flags]) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2] and "validation/loss" in lines[-1]
    if name == "my_recipe.py":
        assert cli.main(["check", *flags, "--rows=1"]) == 0
        assert "objective 'every_third': no leak found" in capsys.readouterr().out


def test_every_place_that_the_table_names_is_there():
    root = pathlib.Path(__file__).parents[2]
    for place in ("maskformer/evaluation/measures", "maskformer/cli", "launch/job.py", "experiments"):
        assert (root / place).exists()
    assert runpy.run_path(str(root / "launch" / "job.py"))["Job"]
