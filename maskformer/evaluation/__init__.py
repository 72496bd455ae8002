"""Metrics of trained models, and what a model says when asked."""

from maskformer.evaluation.fill import Guess, fill_masks
from maskformer.evaluation.metrics import KINDS, finish, prediction_sums
from maskformer.evaluation.unigram import unigram_baseline, unigram_log_probs

__all__ = ["KINDS", "Guess", "fill_masks", "finish", "prediction_sums", "unigram_baseline", "unigram_log_probs"]
