"""The user guide says what the code does."""

import doctest
import pathlib

import pytest

from maskformer import masks

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "masks.md"


def test_every_example_of_the_guide_gives_what_it_shows():
    text = "\n".join("" if line.startswith("```") else line for line in GUIDE.read_text().splitlines())
    test = doctest.DocTestParser().get_doctest(text, {}, "masks.md", str(GUIDE), 0)
    result = doctest.DocTestRunner(verbose=False).run(test)
    assert result.attempted > 60 and result.failed == 0


@pytest.mark.parametrize("name", [name for name in masks.__all__ if name.islower()])
def test_the_guide_mentions_every_function(name):
    text = GUIDE.read_text()
    assert f"masks.{name}(" in text or f".{name}(" in text
