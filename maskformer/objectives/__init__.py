"""What the input hides and what is predicted.

An objective is built once by name (`create`) and then called on device: `objective(key, batch) -> Corrupted`.
"""

from maskformer.objectives import schedules
from maskformer.objectives.denoising import denoising
from maskformer.objectives.diffusion import MaskedDiffusion, diffusion
from maskformer.objectives.lexicon import Lexicon, pmi_ngrams
from maskformer.objectives.loss import (
    cross_entropy,
    move_token_losses,
    token_cross_entropy,
    token_loss_sums,
    update_token_losses,
)
from maskformer.objectives.mixture import mixture
from maskformer.objectives.mlm import conditional_mlm, mlm, ngram_mlm, pmi_mlm, span_mlm
from maskformer.objectives.objective import Masking, Objective, attend_within_segments, with_attend
from maskformer.objectives.pairs import CorruptedPair, Pair, PairMasks, PairObjective
from maskformer.objectives.registry import BUILDERS, COMPAT, builder, create, parameters
from maskformer.objectives.rows import KEEP, MASK, RANDOM, Corrupted, Row, Selection
from maskformer.objectives.select_weighted import frequency_weights, inverse_document_frequencies, tag_weights
from maskformer.objectives.sequence import causal_lm, fim, prefix_lm, shift_right
from maskformer.objectives.span_corruption import span_corruption, span_corruption_lengths, ul2
from maskformer.objectives.translation import MaskedSource, augment, masked_source
from maskformer.objectives.vocabulary import Vocabulary

__all__ = [
    "BUILDERS",
    "COMPAT",
    "KEEP",
    "MASK",
    "RANDOM",
    "Corrupted",
    "CorruptedPair",
    "Lexicon",
    "MaskedDiffusion",
    "MaskedSource",
    "Masking",
    "Objective",
    "Pair",
    "PairMasks",
    "PairObjective",
    "Row",
    "Selection",
    "Vocabulary",
    "attend_within_segments",
    "augment",
    "builder",
    "causal_lm",
    "conditional_mlm",
    "create",
    "cross_entropy",
    "denoising",
    "diffusion",
    "fim",
    "frequency_weights",
    "inverse_document_frequencies",
    "masked_source",
    "mixture",
    "mlm",
    "move_token_losses",
    "ngram_mlm",
    "parameters",
    "pmi_mlm",
    "pmi_ngrams",
    "prefix_lm",
    "schedules",
    "shift_right",
    "span_corruption",
    "span_corruption_lengths",
    "span_mlm",
    "tag_weights",
    "token_cross_entropy",
    "token_loss_sums",
    "ul2",
    "update_token_losses",
    "with_attend",
]
