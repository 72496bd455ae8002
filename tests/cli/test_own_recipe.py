"""A mask and an objective that a recipe registers, from training to evaluation, as a user meets them."""

import json

import pytest

from maskformer import cli, masks, objectives
from maskformer.masks import builders
from tests.training.tiny import write_corpus

RECIPE = """
import dataclasses
from maskformer import masks, objectives
from maskformer.training import objectives_section
from tests.training.tiny import tiny_config

@masks.builder()
def same_third():
    return masks.predicate(lambda q, k: (k - q) % 3 == 0)

@objectives.builder
def light_mlm(vocabulary, length, *, rate=0.2):
    return objectives.create("mlm", vocabulary, length, rate=rate)

def get_config(arg=None):
    config = tiny_config({corpus!r}, train__steps=2, evaluation__every=0, checkpoint__every=0, mesh__data=-1)
    config.objective = objectives_section("light_mlm")
    config.model.mask = "same_third | window(1, 1)"
    return config
"""


def forget():
    builders.NAMES.pop("same_third", None)
    builders.BUILDERS.pop("same_third", None)
    objectives.BUILDERS.pop("light_mlm", None)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    file = folder / "my_mask.py"
    file.write_text(RECIPE.format(corpus=str(write_corpus(folder / "corpus"))))
    assert cli.main(["train", f"--config={file}", f"--workdir={folder / 'run'}"]) == 0
    yield file
    forget()


@pytest.fixture(autouse=True)
def another_process(recipe):
    """What a process of its own knows: nothing of the recipe."""
    forget()


def test_evaluate_and_fill_know_the_recipe_that_they_are_given(recipe, capsys):
    workdir = f"--workdir={recipe.parent / 'run'}"
    assert cli.main(["evaluate", workdir]) == 2
    error = capsys.readouterr().err
    assert "needs --config=RECIPE.py" in error and str(recipe.parent / "run") in error and error.count("\n") == 1
    assert cli.main(["evaluate", workdir, f"--config={recipe}", "--config.evaluation.max_batches=1"]) == 0
    out, err = capsys.readouterr()
    results = json.loads(out)
    assert results["loss"] > 0 and results["rows"] == 8 < results["split_rows"] and "8 of " in err
    assert cli.main(["fill", workdir, f"--config={recipe}", "the lady [MASK] the garden."]) == 0
    assert "[MASK] 1:" in capsys.readouterr().out
    # Without a text, passages of the test split are shown, from the beginning of a word.
    assert cli.main(["fill", workdir, f"--config={recipe}", "--examples=3"]) == 0
    passages = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")]
    assert passages and all("[MASK]" in line and not line.startswith("##") for line in passages)


def test_an_objective_of_ones_own_must_not_take_a_name_of_ours():
    with pytest.raises(ValueError, match="'mlm' is there already"):
        objectives.builder(mlm)
    with pytest.raises(ValueError, match="first parameters must be vocabulary and length"):
        objectives.builder(no_length)


def mlm(vocabulary, length):
    """A name that is taken."""


def no_length(rate):
    """Parameters that no objective has."""


@pytest.mark.parametrize(
    "body, said",
    [
        ("masks.predicate(lambda q, k: k > q and k < q + 4)", "use &, |, ~ and jnp.where"),
        ("lambda q, k: k > q", "becomes one by masks.predicate"),
    ],
)
def test_mistakes_in_a_mask_of_ones_own_are_one_line(tmp_path, capsys, body, said):
    file = tmp_path / "bad.py"
    file.write_text(RECIPE.format(corpus="unread").replace("masks.predicate(lambda q, k: (k - q) % 3 == 0)", body))
    assert cli.main(["mask", "same_third", "--length=8", f"--config={file}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_recipe_that_imports_what_is_not_there_is_named(tmp_path, capsys):
    file = tmp_path / "lost.py"
    file.write_text("import no_such_project\n")
    assert cli.main(["check", f"--config={file}"]) == 2
    assert f"{file}: the recipe imports 'no_such_project'" in capsys.readouterr().err


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="length=0, expected an int of at least 1"):
        masks.picture("causal", 0)


def test_a_mistake_inside_of_what_a_recipe_registers_is_named_by_file_and_line(tmp_path, capsys, monkeypatch):
    """A ValueError of JAX or NumPy in code that we call says nothing of where it was written."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from maskformer import objectives\n"
        "from configs import bert\n"
        "@objectives.builder\n"
        "def broken_mlm(vocabulary, length):\n"
        "    return int('x')\n"
        "def get_config(arg=None):\n"
        "    config = bert.get_config('tiny')\n"
        "    with config.unlocked():\n"
        "        config.objective = {'name': 'broken_mlm'}\n"
        "    config.evaluation.objective = {}\n"
        "    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    # Registered for this test only: others try all builders that there are.
    monkeypatch.setitem(objectives.BUILDERS, "broken_mlm", lambda vocabulary, length: None)
    assert cli.main(["check", "--config=mine.py"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: mine.py:5: ") and "invalid literal for int()" in said and said.count("\n") == 1
