"""The house holds: nobody asks what class an objective, a task or a batch is, and a special case stays in its files."""

import ast
import pathlib

from maskformer import models
from maskformer.models.electra import ElectraConfig, ElectraModel
from maskformer.objectives import Corrupted, CorruptedPair, Objective
from maskformer.training.tasks import Task

PACKAGE = pathlib.Path(models.__file__).parents[1]
FILES = sorted(PACKAGE.rglob("*.py"))

# Tables and constructors, which are where a class is chosen or an argument refused.
MAY_ASK = {
    ("training/tasks.py", "__init__"),
    ("models/registry.py", "create"),
    ("objectives/translation.py", "masked_source"),
    ("objectives/mlm.py", "_disjoint"),  # of how tokens are selected, which has a class of that name too
}
ASKED = {"objective", "task", "part", "corrupted", "example"}


def names_of(*classes):
    found = {cls.__name__ for cls in classes}
    for cls in classes:
        found |= names_of(*cls.__subclasses__()) if cls.__subclasses__() else set()
    return found


KINDS = names_of(Objective, Corrupted, CorruptedPair, Task, models.Model, models.EncoderConfig) | {
    ElectraModel.__name__, ElectraConfig.__name__
}


def questions(source):
    """`(function, line, text)` of every place that asks what an objective, a task, a model or a batch is."""
    tree = ast.parse(source)
    for function in ast.walk(tree):
        for node in ast.iter_child_nodes(function):
            node.parent = function
    for node in ast.walk(tree):
        asks = False
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            named |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            asks = node.func.id in ("isinstance", "issubclass") and bool(named & KINDS)
            probed = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
            asks |= node.func.id in ("hasattr", "getattr") and probed and bool(named & ASKED)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            is_name = [isinstance(s, ast.Attribute) and s.attr == "name" for s in sides]
            of = {n.id for s in sides for n in ast.walk(s) if isinstance(n, ast.Name)}
            asks = any(is_name) and bool(of & ASKED) and any(isinstance(s, ast.Constant) for s in sides)
            # `type(objective).loss is Objective.loss`: whether a method was overridden.
            calls = {getattr(n.func, "id", "") for s in sides for n in ast.walk(s) if isinstance(n, ast.Call)}
            asks |= "type" in calls and bool(of & ASKED)
        if asks:
            holder = node
            while not isinstance(holder, ast.FunctionDef | ast.Module):
                holder = holder.parent
            yield getattr(holder, "name", "module"), node.lineno, ast.unparse(node)


def test_nothing_asks_for_the_class_of_an_objective_a_task_a_model_or_a_batch():
    found = [
        (name, *where)
        for name, source in ((str(file.relative_to(PACKAGE)), file.read_text()) for file in FILES)
        for where in questions(source)
        if (name, where[0]) not in MAY_ASK
    ]
    assert not found


def test_the_search_finds_each_way_to_ask():
    source = """
def f(objective, model, x):
    if isinstance(objective, Masking | MaskedDiffusion): pass
    if hasattr(objective, "make_pair"): pass
    if objective.name != "fim": pass
    if type(objective).loss is Objective.loss: pass
    if isinstance(model, models.Model): pass
    if isinstance(x, int) or x.name == "adamw": pass
"""
    assert [line for _, line, _ in questions(source)] == [3, 4, 5, 6, 7]


def test_two_networks_are_the_business_of_five_files():
    named = [str(file.relative_to(PACKAGE)) for file in FILES if "electra" in file.read_text().lower()]
    assert len(named) <= 5, named


def test_no_module_is_longer_than_a_reader_can_hold():
    long = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in FILES}
    assert not {name: lines for name, lines in long.items() if lines > 500}
