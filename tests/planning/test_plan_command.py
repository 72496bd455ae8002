"""`maskformer plan`: what it prints, its exit codes, its JSON, and the plan beside a run."""

import json
import os
import subprocess
import sys

import pytest

from maskformer import cli, planning
from maskformer.planning import planner
from tests.planning.cases import TINY, config_of

HERE = ["plan", *TINY, "--no-compile"]


@pytest.fixture(scope="module")
def printed():
    """The JSON of a plan, and the same rendered."""
    made = planning.plan(config_of(TINY), planning.parse_topology("v5e:2x2"), compile=False, search=True)
    return json.loads(json.dumps(planning.plain(made))), planning.render(made)


def test_a_plan_that_fits_ends_with_0_and_its_verdict(capsys):
    assert cli.main([*HERE, "--topology", "v5e:2x2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("fits: 0.0") and lines[-1].endswith("of 15.75 GiB of HBM per device (estimated)")
    assert "note: by the analytic model alone: nothing was compiled" in lines
    assert any(line.startswith("| data ") for line in lines)


def test_one_that_does_not_fit_ends_with_1_and_the_nearest_change(capsys):
    large = ["plan", "--config=configs/bert.py:large,seq=512", "--config.train.batch_size=4096", "--no-compile"]
    assert cli.main([*large, "--topology", "v5e:4x4"]) == 1
    verdict = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("does not fit"))
    assert "of 15.75 GiB" in verdict and "--config.train.accumulation_steps=" in verdict


@pytest.mark.parametrize("flags, says", [
    (["--topology", "v5p:4x5"], "expected a v5p slice of three sides, such as v5p:2x2x4"),
    (["--topology", "v55p:4x4x4"], "did you mean 'v5p'?"),
    (["--topology", "v5e:2x2", "--config.mesh.tensor=3"], "set --config.mesh.tensor=4"),
    (["--topology", "v5e:4x4", "--config.train.batch_size=20"], "set --config.train.batch_size=16"),
    (["--topology", "v5e:2x2", "--slices", "0"], "--slices=0: expected an integer of at least 1"),
    (["--topology", "v5e:2x2", "--search", "--best", "9"], "--best=9: expected an integer of at most 3"),
    (["--topology", "v5e:2x2", "--best", "2"], "--best=2: says how many of --search are compiled"),
    (["--topology", "v5e:2x2", "--search", "--no-compile", "--best", "2"], "--best=2: says how many of --search"),
    (["--topology", "v5e:2x2", "--price", "-1"], "--price=-1.0: expected dollars"),
    (["--topology", "v5e:2x2", "--search", "--config.train.batch_size=3"], "use a multiple of 4"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(capsys, flags, says):
    assert cli.main([*HERE, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and says in captured.err


def test_the_topology_is_asked_for(capsys):
    assert cli.main(HERE) == 2 and "--topology" in capsys.readouterr().err


def test_gpus_are_planned_by_the_model_alone_and_it_says_so(capsys):
    assert cli.main(["plan", *TINY, "--topology", "h100:8x2"]) == 0
    assert "by the analytic model alone: nothing was compiled for these GPUs" in capsys.readouterr().out
    assert cli.main(["plan", *TINY, "--topology", "h100:8x2", "--compile"]) == 2
    assert "expected --no-compile for h100:8x2" in capsys.readouterr().err


def test_without_libtpu_a_plan_is_analytic_and_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(planner.topologies, "has_compiler", lambda: False)
    assert cli.main(["plan", *TINY, "--topology", "v5e:2x2"]) == 0
    assert "pip install 'maskformer[tpu]'" in capsys.readouterr().out
    assert cli.main(["plan", *TINY, "--topology", "v5e:2x2", "--compile"]) == 2
    assert "the TPU's compiler is not installed" in capsys.readouterr().err


def test_the_json_has_the_documented_keys(printed):
    plain, _ = printed
    assert plain["schema"] == 1 and plain["fits"] is True
    assert set(plain) == {
        "schema", "topology", "model", "fits", "verdict", "estimate", "compiled", "layouts", "changes", "notes",
        "assumptions",
    }  # fmt: skip
    documented = open("docs/plan.md", encoding="utf-8").read()

    def keys(value, place=""):
        for key, inner in value.items() if isinstance(value, dict) else ():
            yield f"{place}{key}"
            inner = inner[0] if isinstance(inner, list) and inner else inner
            # The axes of a mesh are the model's, and the seconds of an axis go by its name.
            if key not in ("mesh", "dcn", "axis_seconds"):
                yield from keys(inner, f"{place}{key}.")

    assert not [key for key in keys(plain) if f"`{key.rpartition('.')[2]}`" not in documented]


def test_a_search_ranks_layouts_and_plans_the_best(printed):
    plain, text = printed
    assert len(plain["layouts"]) > 3
    assert plain["layouts"][0]["mesh"] == plain["estimate"]["mesh"]
    assert "| layout " in text


def test_json_is_all_that_is_printed(capsys):
    assert cli.main([*HERE, "--topology", "v5e:2x2", "--json", "--price", "2.5"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["topology"]["dollars_per_chip_hour"] == 2.5


def test_a_plan_is_stored_beside_its_run_and_compared_by_report(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert cli.main([*HERE, "--topology", "v5e:2x2", "--workdir", str(workdir)]) == 0
    plan = planning.read_plan(workdir)
    predicted = plan["estimate"]["roofline"]["tokens_per_second"]
    (workdir / "config.json").write_text(json.dumps({"evaluation": {"split": "validation"}}))
    lines = [
        {"step": step, "train/tokens_per_second": predicted * share} for step, share in ((1, 0.1), (2, 0.5), (3, 0.6))
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert planning.compare(plan, lines) == {"tokens_per_second": (predicted, 0.5 * predicted)}
    capsys.readouterr()
    assert cli.main(["report", str(workdir)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "v5e:2x2" in line)
    assert f"{predicted:,.0f}" in row and f"{predicted / 2:,.0f}" in row and "0.50" in row


def test_a_run_without_a_plan_is_reported_as_before(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert planning.read_plan(tmp_path) is None and planning.compared([tmp_path]) is None


@pytest.mark.parametrize(
    "text, says", [("{", "is not JSON"), ('{"schema": 0}', "schema=0: expected 1"), ("[]", "expected a JSON object")]
)
def test_a_damaged_plan_is_one_line_that_says_to_make_it_anew(tmp_path, text, says):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        planning.read_plan(tmp_path)
    assert "make it anew" in str(error.value) and "\n" not in str(error.value)


def test_a_plan_leaves_the_accelerators_of_this_machine_alone():
    # Where JAX was told to use one that is not there, it would fail.
    code = f"import sys; from maskformer import cli; sys.exit(cli.main({[*HERE, '--topology', 'v5e:2x2']!r}))"
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
