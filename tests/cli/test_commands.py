"""How commands are found, and what it costs to find them."""

import os
import subprocess
import sys

import pytest

from maskformer import cli

GREET = '''"""Greet someone, as often as asked.

More about it.
"""


def add_arguments(parser):
    parser.epilog = f"recipes: {parser.recipes}"
    parser.add_argument("name")
    parser.add_argument("--times", type=int, default=1)


def run(arguments, config_flags):
    if arguments.times < 1:
        raise ValueError(f"--times={arguments.times}: expected at least 1")
    print(*[arguments.name] * arguments.times, *config_flags)
    return 3
'''


@pytest.fixture
def greet(tmp_path, monkeypatch):
    """A new command, `say-hello`: one file beside the others."""
    (tmp_path / "say_hello.py").write_text(GREET)
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    yield
    sys.modules.pop("maskformer.cli.say_hello", None)
    if hasattr(cli, "say_hello"):
        del cli.say_hello


def test_a_new_command_is_one_file(greet, capsys):
    assert cli.main(["say-hello", "Jane", "--times=2", "--config=a.py"]) == 3
    assert capsys.readouterr().out == "Jane Jane --config=a.py\n"
    assert cli.main(["--verbose", "say-hello", "Jane"]) == 3
    assert cli.main(["say-hello", "Jane", "--times=0"]) == 2
    assert cli.main(["say-hello", "Jane", "--tims=2"]) == 2
    assert "instead of --tims, did you mean --times?" in capsys.readouterr().err
    assert cli.main(["say-helo"]) == 2
    assert "did you mean 'say-hello'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "Greet someone, as often as asked." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["say-hello", "--config=a.py", "--help"])
    assert "recipes: ['a.py']" in capsys.readouterr().out


def test_every_command_says_in_a_sentence_what_it_does_and_ours_come_in_the_order_of_their_use():
    names = list(cli.commands())
    assert names[: len(cli.ORDER)] == list(cli.ORDER) and names[len(cli.ORDER) :] == sorted(names[len(cli.ORDER) :])
    for name, module in cli.commands().items():
        summary = (module.__doc__ or "").partition("\n")[0]
        assert summary.endswith(".") and callable(module.add_arguments), name


def test_help_comes_without_importing_jax():
    code = (
        "import sys\nfrom maskformer import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert cli.main(['trian']) == cli.main(['train', '--workdri=x']) == 2\n"
        "print([name for name in ('jax', 'numpy', 'ml_collections', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    assert "mask-report" in result.stdout and result.stdout.splitlines()[-1] == "[]"


def test_the_package_gives_its_names_when_they_are_asked_for():
    code = (
        "import maskformer as mf, sys\nassert 'jax' not in sys.modules\n"
        "assert mf.dot_product_attention is mf.attention.dot_product_attention and mf.explain is mf.attention.explain\n"
        "assert mf.masks.causal() is not None and {*mf.__all__} <= {*dir(mf)}\n"
        "from maskformer import *\nassert masks is mf.masks\n"
        "try:\n    mf.atention\nexcept AttributeError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "module 'maskformer' has no attribute 'atention'\n"
