"""Parameters and what they compute: encoder layers, embeddings, heads."""

from maskformer.models.config import EncoderConfig
from maskformer.models.encoder import DetectionHead, PredictionHead
from maskformer.models.model import Model, Params
from maskformer.models.partitioning import ACTIVATION_AXES, PARAMETER_AXES, constrain, logical_rules
from maskformer.models.positions import alibi, apply_rotary, rotary_tables
from maskformer.models.registry import GeneratorConfig, create, with_generator

__all__ = [
    "ACTIVATION_AXES",
    "PARAMETER_AXES",
    "DetectionHead",
    "EncoderConfig",
    "GeneratorConfig",
    "Model",
    "Params",
    "PredictionHead",
    "alibi",
    "apply_rotary",
    "constrain",
    "create",
    "logical_rules",
    "rotary_tables",
    "with_generator",
]
