"""Five recipes train as they did when their metrics were recorded: a change of structure changes no number.

`recipes.json` holds, for each recipe, the whole config of a run of 40 steps and the lines of its `metrics.jsonl`, made
by `maskformer train --config=configs/NAME.py:demo` on one CPU device. On the processor and JAX that made them the
numbers are equal to the bit; on another the first losses are near.

    python -m tests.golden.test_recorded_recipes    # record them anew, after a change that is meant to change them
"""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import pytest

GOLDEN = pathlib.Path(__file__).parent / "recipes.json"
TIMING = ("seconds", "tokens_per_second", "tflops_per_second", "mfu", "data_wait_seconds", "device_wait_seconds")
RUN = """
import json, pathlib, sys
from maskformer.training import train_and_evaluate
for name, run in json.loads(pathlib.Path(sys.argv[1]).read_text())["runs"].items():
    train_and_evaluate(run["config"], pathlib.Path(sys.argv[2]) / name)
"""

def machine():
    """What decides the order of floating-point operations."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    features = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]
    return {"jax": jax.__version__, "cpu": features, "cores": os.cpu_count()}


def run(golden, folder):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    root = str(pathlib.Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", RUN, golden, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [
            {key: value for key, value in json.loads(line).items() if key.split("/")[-1] not in TIMING}
            for line in (pathlib.Path(folder) / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in json.loads(GOLDEN.read_text())["runs"]
    }


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return run(GOLDEN, tmp_path_factory.mktemp("recipes"))


RECIPES = pytest.mark.parametrize("name", ["bert", "gpt", "electra", "diffusion", "ul2"])


@RECIPES
def test_the_recipe_begins_as_recorded(name, lines):
    recorded = json.loads(GOLDEN.read_text())["runs"][name]["lines"]
    assert [line["step"] for line in lines[name]] == [line["step"] for line in recorded]
    assert lines[name][0]["train/loss"] == pytest.approx(recorded[0]["train/loss"], rel=1e-3)


@RECIPES
def test_the_recipe_trains_as_recorded_to_the_bit(name, lines):
    golden = json.loads(GOLDEN.read_text())
    if golden["machine"] != machine():
        pytest.skip(f"recorded on {golden['machine']}, and this is {machine()}")
    assert lines[name] == golden["runs"][name]["lines"]


if __name__ == "__main__":
    golden = json.loads(GOLDEN.read_text())
    with tempfile.TemporaryDirectory() as folder:
        for name, recorded in run(GOLDEN, folder).items():
            golden["runs"][name]["lines"] = recorded
    golden["machine"] = machine()
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
