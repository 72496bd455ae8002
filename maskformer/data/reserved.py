"""Keeps the ids of special tokens for what is put in on purpose: no text of a corpus is to become one of them.

Clearing a text of the names of special tokens is not enough: a normalizer may make one of what looks like none (NFKC
makes `[MASK]` of fullwidth letters), and a model may have the name among its own pieces. So the tokenizer that encodes
a corpus is one whose special tokens have names that no text holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Not a character (Unicode 23.7): no text has it, and no normalizer makes one.
_NO_CHARACTER = "\U0010ffff"


def unreachable(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The definition of a tokenizer like `settings`, with the same ids, under which no text gives a token of `names`.

    Args:
      settings: the value of a `tokenizer.json`.
      names: of tokens; the one that the model itself writes for what it does not know keeps its name.

    >>> settings = {"model": {"vocab": {"[MASK]": 0, "cat": 1, "[UNK]": 2}, "unk_token": "[UNK]"}}
    >>> sorted(unreachable(settings, ["[MASK]", "[UNK]"])["model"]["vocab"].values())
    [0, 1, 2]
    >>> "[MASK]" in unreachable(settings, ["[MASK]"])["model"]["vocab"]
    False
    """
    model = dict(settings["model"])
    vocabulary = model["vocab"]
    is_list = isinstance(vocabulary, list)  # Unigram: pieces with scores, by id
    unknown = model.get("unk_token")
    if is_list and model.get("unk_id") is not None:
        unknown = vocabulary[model["unk_id"]][0]
    renamed = {name: f"{_NO_CHARACTER}{name}{_NO_CHARACTER}" for name in names if name != unknown}
    if is_list:
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {renamed.get(piece, piece): token for piece, token in vocabulary.items()}
    if model.get("merges"):
        merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        # A name that is put together from pieces is not put together any more.
        kept = [merge for merge in merges if not renamed.keys() & {*merge, "".join(merge)}]
        if len(kept) < len(merges):
            model["merges"] = kept
    added = [
        {**token, "content": renamed.get(token["content"], token["content"])}
        for token in settings.get("added_tokens", ())
    ]
    return {**settings, "model": model, "added_tokens": added}
