"""A recipe is Python that others wrote: what goes wrong in it is one line with its file and line."""

import textwrap

import pytest

from maskformer.training import load_config
from maskformer.training.recipes import load_sweep

START = "from maskformer.training import default_config, objectives_section\n"


def error_of(load, tmp_path, source):
    path = tmp_path / "mine.py"
    path.write_bytes(source if isinstance(source, bytes) else textwrap.dedent(source).encode())
    with pytest.raises(ValueError) as caught:
        load(str(path))
    message = str(caught.value)
    assert message.isprintable() and len(message) < 800
    return message.replace(str(path), "mine.py")


@pytest.mark.parametrize(
    "source, expected",
    [
        ("def get_config(arg=None)\n    pass", "mine.py:1: expected ':'"),
        ("x = 1\ny = (", "mine.py:2: '(' was never closed"),
        ("x = 1\nraise RuntimeError('two\\nlines')", r"mine.py:2: RuntimeError: two\nlines"),
        ("def get_config(arg=None):\n    pass", "mine.py:1: get_config returned None: expected the ConfigDict"),
        ("def get_config(arg=None):\n    return {}", "get_config returned {}: expected the ConfigDict"),
        ("\ndef get_config(arg=None):\n    return 1 / 0", "mine.py:3: ZeroDivisionError: division by zero"),
        ("\ndef get_config():\n    pass", "mine.py:2: TypeError: get_config() takes 0 positional arguments"),
        ("get_config = 3", "mine.py has no get_config(arg=None)"),
        ("assert False", "mine.py:1: AssertionError: no message"),
        (b"\xff\xfe", "mine.py:"),
        (b"x = 1\0", "mine.py:"),
        (
            START + "def get_config(arg=None):\n    c = default_config()\n    c.checkpoint = [None]\n    return c",
            "mine.py:4: TypeError:",
        ),
        (
            START + "def get_config(arg=None):\n    return objectives_section('mlmm')",
            "mine.py:3: objective.name='mlmm': expected one of",
        ),
    ],
)
def test_a_recipe_that_fails_is_one_line_with_its_file_and_line(source, expected, tmp_path):
    message = error_of(lambda path: load_config([f"--config={path}:tiny"]), tmp_path, source)
    assert expected in message, message


@pytest.mark.parametrize(
    "source, expected",
    [
        ("def sweep():\n    yield {}\n    raise KeyError('seed')", "mine.py:3: KeyError: 'seed'"),
        ("def sweep():\n    return None", "mine.py:1: sweep() gives=None: expected an iterable"),
        ("def sweep():\n    yield 'seed'", "mine.py:1: sweep() yields='seed': expected a dict"),
    ],
)
def test_a_sweep_that_fails_is_one_line_with_its_file_and_line(source, expected, tmp_path):
    message = error_of(load_sweep, tmp_path, source)
    assert expected in message, message


def test_a_wrong_argument_of_a_recipe_is_no_fault_of_the_recipe():
    with pytest.raises(ValueError, match=r"^config argument 'tinyy': expected one of"):
        load_config(["--config=configs/bert.py:tinyy"])
