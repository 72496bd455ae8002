"""From a config to a trained model: state, step, loop, checkpoints, records."""

from maskformer.training.config import default_config, generator_section, objectives_section, resolve
from maskformer.training.loop import train_and_evaluate
from maskformer.training.preemption import EX_TEMPFAIL, Preempted
from maskformer.training.program import Program
from maskformer.training.recipes import load_config, parse_arg
from maskformer.training.recorder import NonFiniteError

__all__ = [
    "EX_TEMPFAIL",
    "NonFiniteError",
    "Preempted",
    "Program",
    "default_config",
    "generator_section",
    "load_config",
    "objectives_section",
    "parse_arg",
    "resolve",
    "train_and_evaluate",
]
