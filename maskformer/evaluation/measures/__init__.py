"""One file for each measure: the function that joins a run to what is computed of it, and its options.

A new file here is a new `--metric` of `maskformer evaluate`, with its options as flags; a recipe may register one of
its own in the same way:

    from typing import Annotated
    from maskformer.evaluation import measures

    @measures.builder()
    def rows(run, split, *, every: Annotated[int, "count each K-th row"] = 1):
        '''How many rows there are.'''
        return {"rows": len(run.dataset(split)) // every}
"""

import importlib
import pkgutil

from maskformer.evaluation.measure import MEASURES, Column, Help, Measurable, Measure, Option, Results, builder, get

__all__ = ["MEASURES", "Column", "Help", "Measurable", "Measure", "Option", "Results", "builder", "get"]

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
