"""Parameters and what they compute: encoder layers, embeddings, heads."""

from maskformer.models.config import EncoderConfig
from maskformer.models.model import Model, Params, create
from maskformer.models.partitioning import ACTIVATION_AXES, PARAMETER_AXES, constrain, logical_rules
from maskformer.models.positions import alibi, apply_rotary, rotary_tables

__all__ = [
    "ACTIVATION_AXES",
    "PARAMETER_AXES",
    "EncoderConfig",
    "Model",
    "Params",
    "alibi",
    "apply_rotary",
    "constrain",
    "create",
    "logical_rules",
    "rotary_tables",
]
