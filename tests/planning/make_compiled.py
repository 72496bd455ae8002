"""Compile the cases of compiled.json with the TPU's own compiler, and write down what it says of each.

    python -m tests.planning.make_compiled [NAME ...]

Needs `pip install 'maskformer[tpu]'`, no TPU, and some minutes for each case; the estimates of tests/planning are held
against it.
"""

import json
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from maskformer import planning
from maskformer.training import recipes

FILE = pathlib.Path(__file__).with_name("compiled.json")


def compile_case(case):
    """The case with what the compiler says."""
    config, _ = recipes.load_config(case["flags"])
    topology = planning.parse_topology(case["topology"], case.get("slices", 1))
    plan = planning.plan(config, topology, compile=True)
    compiled = planning.plain(plan)["compiled"]
    axes = {one["axis"]: 0 for one in compiled["collectives"]}
    for one in compiled["collectives"]:
        axes[one["axis"]] += one["payload_bytes"]
    return {**case, **{key: compiled[key] for key in ("arguments", "temporaries", "peak", "needed")}, "payload": axes}


if __name__ == "__main__":
    cases = json.loads(FILE.read_text())
    for name in sys.argv[1:] or list(cases):
        cases[name] = compile_case(cases[name])
        print(name, cases[name]["peak"] or cases[name]["needed"], flush=True)
        FILE.write_text(json.dumps(cases, indent=1) + "\n")
