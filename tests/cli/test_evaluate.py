"""`maskformer evaluate` and the corrections of a mistyped command line, as a user meets them."""

import json
import pathlib
import re

import jax
import pytest

from maskformer import cli, report
from maskformer.evaluation import measures
from maskformer.training import comparison
from tests.evaluation.conftest import corpus, load

__all__ = ["corpus", "load"]


@pytest.fixture
def folders(load, monkeypatch):
    """Names of folders that load as runs with random weights."""
    made = {name: load(name) for name in ("mlm", "diffusion", "causal_lm")}
    monkeypatch.setattr(comparison.runs, "load", lambda workdir, **_: made[workdir])


def run(capsys, *arguments):
    code = cli.main(["evaluate", *arguments])
    return code, *capsys.readouterr()


def test_one_run_is_json_and_a_bound_is_printed_as_one(folders, tmp_path, capsys):
    file = tmp_path / "results.json"
    code, out, err = run(capsys, "--workdir=diffusion", "--metric=nll_bound", "--samples=2", f"--json={file}")
    results = json.loads(out)
    assert code == 0 and results["split"] == "test" and results == json.loads(file.read_text())
    assert "nll <= " in err and "bits per byte <= " in err and "±" in err
    assert not any(name.startswith("perplexity") and "bound" not in name for name in results)


def test_several_metrics_of_one_run_stand_under_their_names(folders, capsys):
    code, out, err = run(capsys, "--workdir", "mlm", "--metric", "loss", "nll", "pseudo_perplexity", "--every=8")
    results = json.loads(out)
    assert code == 0 and results["loss"]["loss"] > 0 and results["pseudo_perplexity"]["scored"] > 0
    assert "never predicted the next token" in results["nll"]["undefined"] and "\nnll: this run" in err


def test_several_runs_and_rates_are_a_table(folders, tmp_path, capsys):
    file = tmp_path / "matrix.json"
    code, out, _ = run(capsys, "--workdir", "mlm", "causal_lm", "--rates", "0.15", "0.8", f"--json={file}")
    lines = out.splitlines()
    assert code == 0 and "rate 0.15" in lines[0] and "rate 0.8" in lines[0] and "n/a [1]" in lines[3]
    cells = json.loads(file.read_text())["runs"][0]["results"]
    assert cells["rate 0.8"]["predicted"] > 3 * cells["rate 0.15"]["predicted"]


def test_another_objective_by_flag_or_by_config(folders, capsys):
    code, out, _ = run(capsys, "--workdir=mlm", "--objective=causal_lm")
    assert code == 0 and json.loads(out)["predicted"] > 100
    code, _, err = run(capsys, "--workdir=mlm", "--objective=causl_lm")
    assert code == 2 and "causal_lm" in err and err.count("\n") == 1


@pytest.fixture
def guide(tmp_path):
    """The recipe of `docs/evaluation.md` that adds a measure."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (block,) = re.findall(r"```python\n(?=[^`]*@measures.builder)(.*?)```", text, re.DOTALL)
    recipe = tmp_path / "my_measure.py"
    recipe.write_text(block)
    yield recipe
    measures.MEASURES.pop("confident", None)


def test_the_guides_measure_of_ones_own_is_a_metric_with_its_options_as_flags(
    folders, load, guide, capsys, quick_compilation
):
    asked = ["--workdir=mlm", f"--config={guide}", "--metric=confident"]
    code, out, err = run(capsys, *asked, "--above=0.02")
    results = json.loads(out)
    assert code == 0 and 0 < results["confident"] < 1 and f"confident: {results['confident']:.2%} are confident" in err
    assert load("mlm").measure("confident", above=0.0)["confident"] == 1.0
    code, _, err = run(capsys, "--workdir=mlm", f"--config={guide}", "--above=0.1")
    assert code == 2 and "--above: belongs to --metric=confident, and only loss is asked for" in err
    code, _, err = run(capsys, *asked, "--above=much")
    assert code == 2 and "--above: invalid float value: 'much'" in err
    with pytest.raises(SystemExit):
        cli.main(["evaluate", f"--config={guide}", "--help"])
    assert "confident: the share of predictions" in " ".join(capsys.readouterr().out.split())
    del measures.MEASURES["confident"]
    code, _, err = run(capsys, "--workdir=mlm", "--metric=confident")
    assert code == 2 and "one that a recipe registers needs --config=RECIPE.py" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["json", "workdir", "run", "verbose"])
def test_an_option_that_is_a_flag_of_evaluate_itself_is_refused(name, tmp_path, capsys):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from typing import Annotated\nfrom maskformer.evaluation import measures\n\n\n@measures.builder()\n"
        f"def mine(measured, split, *, {name}: Annotated[bool, 'of it'] = False):\n    return {{}}\n"
    )
    try:
        code, _, err = run(capsys, "--workdir=mlm", f"--config={recipe}")
        assert code == 2 and f"measure 'mine': --{name} is a flag of evaluate itself" in err and err.count("\n") == 1
    finally:
        del measures.MEASURES["mine"]


@pytest.mark.parametrize("workdirs", [["a"], ["a", "b"]])
def test_of_several_processes_one_prints_and_writes(workdirs, tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"

    def compared(names, columns, split, **_):
        each = {name: {column: {"loss": 1.0} for column in columns} for name in names}
        return comparison.Comparison(split, dict.fromkeys(names, 4), dict.fromkeys(names, (8, 8)), columns, each)

    monkeypatch.setattr(comparison, "compare", compared)
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        code, out, _ = run(capsys, "--workdir", *workdirs, f"--json={file}")
        assert code == 0 and bool(out) == file.exists() == (process == 0)
    assert json.loads(file.read_text())


def test_special_tokens_are_left_out_by_flag(folders, load, capsys, quick_compilation):
    """One flag for the two measures that have the option."""
    code, out, _ = run(capsys, "--workdir=causal_lm", "--metric=nll", "--no-markers")
    results = load("causal_lm").measure("nll", markers=False)
    assert code == 0 and json.loads(out).items() >= results.items()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["trian"], "command 'trian': expected one of train, evaluate"),
        (["trian"], "did you mean 'train'?"),
        (["evaluate", "--workdri=x"], "instead of --workdri, did you mean --workdir?"),
        (["evaluate", "--workdir=x", "--sampels=4"], "instead of --sampels, did you mean --samples?"),
        (["evaluate", "--workdir=x", "--metric=nl_bound"], "did you mean 'nll_bound'?"),
        (["evaluate", "--workdir=x", "--samples=4"], "--samples: belongs to --metric=nll_bound"),
        (["evaluate", "--workdir=x", "--metric=nll", "--rates", "0.1"], "--rates: belongs to --metric=loss"),
        (["evaluate", "--workdir=x", "--metric=nll", "--within-word-l2r"], "belongs to --metric=pseudo_perplexity"),
        (["evaluate", "--workdir=x", "--samples=many", "--metric=nll_bound"], "invalid int value: 'many'"),
        (["sweep", "--config=configs/gpt.py", "--list"], "configs/gpt.py has no sweep() of its own; use --sweep=seeds"),
        (["sweep", "--config=configs/gpt.py", "--sweep=sedes"], "no sweep_sedes(); use --sweep=seeds"),
    ],
)
def test_a_mistyped_command_is_one_line_with_what_was_meant(arguments, said, capsys):
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and said in message


def test_a_recipe_without_any_sweep_says_how_to_write_one(tmp_path, capsys):
    recipe = tmp_path / "plain.py"
    recipe.write_text("from configs.bert import get_config\n")
    assert cli.main(["sweep", f"--config={recipe}", "--list"]) == 2
    assert "has no sweep: give it a function sweep()" in capsys.readouterr().err


def test_help_still_ends_well(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "--help"])
    assert stop.value.code == 0 and "--within-word-l2r" in capsys.readouterr().out


def test_a_mask_with_a_bar_does_not_break_the_table_of_runs(tmp_path):
    for name, mask in (("a", "causal | sinks(1)"), ("b", "causal")):
        (tmp_path / name).mkdir()
        config = {"model": {"mask": mask}, "evaluation": {"split": "test"}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "test/loss": 1.0}) + "\n")
    lines = report.table([tmp_path / "a", tmp_path / "b"]).splitlines()
    columns = [line.replace("\\|", "").count("|") for line in lines]
    assert len(set(columns)) == 1 and "causal \\| sinks(1)" in lines[2]
