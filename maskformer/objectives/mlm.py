"""Masked language modelling and its conventions."""

from __future__ import annotations

from typing import Any

from maskformer.objectives import schedules
from maskformer.objectives.counting import Count, check_length
from maskformer.objectives.objective import Masking
from maskformer.objectives.replace import Replace, check_policy
from maskformer.objectives.select import Tokens, Words, word_limit
from maskformer.objectives.vocabulary import Vocabulary

# Never hidden by the BERT convention. [UNK] is text there, as in the reference implementation.
_MARKERS = ("pad", "mask", "cls", "sep", "bos", "eos", "sentinels", "special")


def mlm(
    vocabulary: Vocabulary,
    length: int,
    *,
    rate: Any = 0.15,
    compat: str = "bert",
    replacement: tuple[float, float, float] = (0.8, 0.1, 0.1),
    whole_word: bool = False,
    max_predictions: int | None = None,
    static_copies: int = 0,
) -> Masking:
    """Hide some tokens, predict them from both sides (Devlin et al. 2019; Liu et al. 2019).

    The sequence of both conventions is the packed row: all tokens of it that are not padding.

    Args:
      vocabulary: needs `mask` where the policy masks.
      length: tokens per row.
      rate: fraction of tokens, in (0, 1], or a `Schedule`.
      compat: `bert` takes min(max_predictions, max(1, round(rate * size))) tokens, never a marker, and its random
        ids may be any id; `roberta` takes floor(rate * size + U) positions, markers included as in fairseq, and its
        random ids are never special.
      replacement: (mask, random, keep).
      whole_word: hide all pieces of a word or none. `bert` counts tokens and decides mask/random/keep per piece;
        `roberta` counts words and decides per word.
      max_predictions: slots per row; by default what the rate needs. Fewer lower the realised rate.
      static_copies: see `Objective`.

    Raises:
      ValueError: naming the parameter, its value and the fix.

    >>> vocabulary = Vocabulary(size=100, pad=0, unk=1, cls=2, sep=3, mask=4)
    >>> mlm(vocabulary, 128).budget, mlm(vocabulary, 128, compat="roberta").budget, mlm(vocabulary, 512).budget
    (19, 20, 77)
    """
    length = check_length(length)
    rate = schedules.as_rate("rate", rate)
    most = schedules.maximum(rate)
    policy = check_policy(replacement)
    if policy[0] > 0:
        vocabulary.require("mask", "mlm")
    if max_predictions is not None and not 1 <= max_predictions <= length:
        raise ValueError(f"max_predictions={max_predictions}: expected between 1 and the row length {length}")
    if static_copies < 0:
        raise ValueError(f"static_copies={static_copies}: expected 0 (dynamic) or a number of fixed copies")
    markers = vocabulary.ids(_MARKERS)
    if compat == "bert":
        count = Count("round", most, length, minimum=1, maximum=max_predictions)
        avoid, never = markers, ()
    elif compat == "roberta":
        count = Count("stochastic", most, length, maximum=None if whole_word else max_predictions)
        avoid, never = vocabulary.ids(("pad",)), vocabulary.special_ids
    else:
        raise ValueError(f"compat={compat!r}: expected 'bert' or 'roberta'")
    if whole_word:
        limit = count.largest() if compat == "bert" else max_predictions or word_limit(most, length)
        select = Words(count, avoid, vocabulary.special_ids, vocabulary.size, "tokens" if compat == "bert" else "words", limit)
    else:
        select = Tokens(count, avoid, vocabulary.size)
    return Masking(
        "mlm",
        vocabulary,
        length,
        select.most(),
        rate,
        static_copies,
        select.needs_words,
        f"mlm ({compat}), rate {rate if isinstance(rate, float) else rate.description}, replacement {policy}"
        + (", whole words" if whole_word else ""),
        select=select,
        replace=Replace(policy, vocabulary.mask, vocabulary.size, never, per_unit=whole_word and compat == "roberta"),
    )
