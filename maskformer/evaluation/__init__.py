"""Metrics of trained models, and what a model says when asked."""

from maskformer.evaluation.bound import create_bound_step, finish_bound, hide
from maskformer.evaluation.fill import Guess, fill_masks
from maskformer.evaluation.metrics import KINDS, Sums, finish, prediction_sums
from maskformer.evaluation.unigram import unigram_baseline, unigram_log_probs

__all__ = [
    "KINDS",
    "Guess",
    "Sums",
    "create_bound_step",
    "fill_masks",
    "finish",
    "finish_bound",
    "hide",
    "prediction_sums",
    "unigram_baseline",
    "unigram_log_probs",
]
