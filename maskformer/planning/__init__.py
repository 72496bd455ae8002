"""What a config needs on chips that are not here: memory, traffic, time and money, and whether it fits.

    topology = planning.parse_topology("v5p:4x4x8")
    made = planning.plan(config, topology, compile=False)
    print(planning.render(made)); made.fits

`maskformer plan` is its command line; docs/plan.md explains what it prints.
"""

from maskformer.planning.comparison import compare, compared
from maskformer.planning.comparison import read as read_plan
from maskformer.planning.comparison import write as write_plan
from maskformer.planning.planner import Plan, plan
from maskformer.planning.rendering import render
from maskformer.planning.schema import plain
from maskformer.planning.topologies import Topology
from maskformer.planning.topologies import parse as parse_topology

__all__ = [
    "Plan", "Topology", "compare", "compared", "parse_topology", "plain", "plan", "read_plan", "render",
    "write_plan",
]  # fmt: skip
