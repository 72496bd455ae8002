"""What a model under an objective can see, and what an objective does: found out before a step is spent."""

from maskformer.inspection.leaks import Leak, LeakReport, check_leaks
from maskformer.inspection.report import MaskReport, mask_report

__all__ = ["Leak", "LeakReport", "MaskReport", "check_leaks", "mask_report"]
