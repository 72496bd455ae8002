"""Estimates of recipes, made once for all tests: tracing a model takes a second."""

import functools
import json
import pathlib

from maskformer.planning import topologies, workload
from maskformer.planning.estimate import estimate
from maskformer.planning.layouts import resolve
from maskformer.planning.parameters import parameters
from maskformer.training import recipes
from maskformer.training import resolve as resolve_config

COMPILED = json.loads(pathlib.Path(__file__).with_name("compiled.json").read_text())
MINI = ("--config=configs/bert.py:mini,seq=512", "--config.train.batch_size=64")
TINY = ("--config=configs/gpt.py:tiny,seq=32,vocab=500", "--config.train.batch_size=16")


def config_of(flags):
    return recipes.load_config(list(flags))[0]


@functools.cache
def workload_of(flags, target="tpu"):
    # What the mesh is does not matter to a workload.
    return workload.trace(workload.Planned(resolve_config(config_of(flags))), target)


def estimate_of(flags, topology, slices=1, price=1.0):
    topology = topologies.parse(topology, slices)
    made = workload_of(tuple(flags), topology.chip.platform)
    return estimate(made, topology, resolve(made.experiment.mesh, topology), price)


def parameters_of(flags, sizes):
    program = workload_of(tuple(flags)).program
    return parameters(program, sizes, program.placed(sizes).rules)
