"""Where an error comes from: the user's own line under ours, or ours."""

import runpy

import pytest

from maskformer import checks, masks


def test_the_origin_of_an_error_is_the_users_line_that_we_called(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine(q, k):\n    return int('x')\n")
    mine = runpy.run_path(str(file))["mine"]
    with pytest.raises(ValueError) as error:
        masks.predicate(mine).dense(4, 4)
    assert checks.origin(error.value).endswith("mine.py:2: ")


def test_an_error_that_we_raised_ourselves_has_no_origin():
    with pytest.raises(ValueError) as error:
        masks.parse("windw(2)")
    assert checks.origin(error.value) == ""
