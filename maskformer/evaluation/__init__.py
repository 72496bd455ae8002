"""What is measured of trained models, by name, and what a model says when asked."""

from maskformer.evaluation.bound import create_bound_step, finish_bound, hide
from maskformer.evaluation.fill import Guess, example_texts, fill_masks, fill_text
from maskformer.evaluation.likelihood import create_nll_step, finish_nll
from maskformer.evaluation.measures import MEASURES, Column, Measure, Results
from maskformer.evaluation.measures import get as get_measure
from maskformer.evaluation.metrics import KINDS, Sums, finish, objective_sums, prediction_sums
from maskformer.evaluation.pseudo import create_pseudo_step, finish_pseudo
from maskformer.evaluation.text_bytes import SplitBytes, bytes_of_tokens, split_bytes, token_bytes
from maskformer.evaluation.unigram import unigram_baseline, unigram_log_probs

__all__ = [
    "KINDS",
    "MEASURES",
    "Column",
    "Guess",
    "Measure",
    "Results",
    "SplitBytes",
    "Sums",
    "bytes_of_tokens",
    "create_bound_step",
    "create_nll_step",
    "create_pseudo_step",
    "example_texts",
    "fill_masks",
    "fill_text",
    "finish",
    "finish_bound",
    "finish_nll",
    "finish_pseudo",
    "get_measure",
    "hide",
    "objective_sums",
    "prediction_sums",
    "split_bytes",
    "token_bytes",
    "unigram_baseline",
    "unigram_log_probs",
]
