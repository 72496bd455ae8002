"""What the input hides and what is predicted.

An objective is built once by name (`create`) and then called on device: `objective(key, batch) -> Corrupted`.
"""

from maskformer.objectives import schedules
from maskformer.objectives.loss import cross_entropy
from maskformer.objectives.mlm import mlm
from maskformer.objectives.objective import Masking, Objective, attend_within_segments
from maskformer.objectives.registry import BUILDERS, create
from maskformer.objectives.rows import KEEP, MASK, RANDOM, Corrupted, Row, Selection
from maskformer.objectives.vocabulary import Vocabulary

__all__ = [
    "BUILDERS",
    "KEEP",
    "MASK",
    "RANDOM",
    "Corrupted",
    "Masking",
    "Objective",
    "Row",
    "Selection",
    "Vocabulary",
    "attend_within_segments",
    "create",
    "cross_entropy",
    "mlm",
    "schedules",
]
