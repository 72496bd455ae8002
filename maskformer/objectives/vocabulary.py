"""The ids an objective needs to know about: which tokens are special, and what stands for a hidden one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import shown

_NAMED = ("pad", "mask", "cls", "sep", "unk", "bos", "eos")
# Below this many ids a chain of comparisons fuses into the neighbouring elementwise work and beats a gather.
_COMPARE_AT_MOST = 16


class VocabularyError(ValueError):
    """An objective needs an id that the vocabulary does not have.

    Attributes:
      problem, fix: the message, and its end, which says what to do about a `Vocabulary`.
    """

    def __init__(self, problem: str, fix: str):
        super().__init__(problem + fix)
        self.problem, self.fix = problem, fix


@dataclass(frozen=True)
class Vocabulary:
    """Size and special ids of a tokenizer; `None` where it has no such token.

    Args:
      size: number of ids; every id below is in `[0, size)`.
      pad, mask, cls, sep, unk, bos, eos: the usual special ids. Two names may share one id (GPT-2 uses one
        id for `bos` and `eos`), except that `mask` and `pad` stand alone: a mask that is also a real token
        makes a hidden position look like a visible one.
      sentinels: ids that stand for removed spans, in the order in which they are used (T5: descending from
        `size - 1`).
      special: any further ids that are never text (mode tokens, infix markers).

    Raises:
      ValueError: an id lies outside the vocabulary, or `mask`, `pad` or a sentinel is used twice.

    >>> vocabulary = Vocabulary(size=100, pad=0, unk=1, cls=2, sep=3, mask=4)
    >>> vocabulary.special_ids
    (0, 1, 2, 3, 4)
    >>> vocabulary.is_special(jnp.array([0, 4, 5, 99])).tolist()
    [True, True, False, False]
    """

    size: int
    pad: int | None = None
    mask: int | None = None
    cls: int | None = None
    sep: int | None = None
    unk: int | None = None
    bos: int | None = None
    eos: int | None = None
    sentinels: tuple[int, ...] = ()
    special: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "sentinels", tuple(int(i) for i in self.sentinels))
        object.__setattr__(self, "special", tuple(int(i) for i in self.special))
        if self.size < 1:
            raise ValueError(f"vocabulary.size={self.size}: expected at least 1")
        for name in (*_NAMED, "sentinels", "special"):
            value = getattr(self, name)
            for token in value if isinstance(value, tuple) else (value,):
                if token is not None and not 0 <= token < self.size:
                    raise ValueError(
                        f"vocabulary.{name}={token}: expected an id in [0, {self.size}); "
                        "pass the tokenizer's own size, which counts its added tokens"
                    )
        named = {name: getattr(self, name) for name in _NAMED if getattr(self, name) is not None}
        for alone in ("mask", "pad"):
            for name, token in named.items():
                if alone in named and name != alone and token == named[alone]:
                    raise ValueError(
                        f"vocabulary.{alone}={token} is also vocabulary.{name}: "
                        f"give the tokenizer a {alone} token of its own"
                    )
        if len(set(self.sentinels)) != len(self.sentinels):
            raise ValueError(f"vocabulary.sentinels={self.sentinels}: an id appears twice; each span needs its own")
        for name, token in named.items():
            if token in self.sentinels:
                raise ValueError(
                    f"vocabulary.sentinels contains {token}, which is vocabulary.{name}: "
                    "reserve ids that no text and no other special token uses"
                )
        overlap = sorted(set(self.sentinels) & set(self.special))
        if overlap:
            raise ValueError(f"vocabulary.sentinels and vocabulary.special share {overlap}: list each id once")

    @property
    def special_ids(self) -> tuple[int, ...]:
        """All ids that are not text, ascending, each once."""
        ids = {getattr(self, name) for name in _NAMED} | set(self.sentinels) | set(self.special)
        return tuple(sorted(ids - {None}))

    @property
    def marker_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text, ascending, each once. By the convention of BERT an unknown word is text.

        >>> Vocabulary(size=100, pad=0, unk=1, cls=2, sep=3, mask=4, sentinels=(99,)).marker_ids
        (0, 2, 3, 4, 99)
        """
        return self.ids(("pad", "mask", "cls", "sep", "bos", "eos", "sentinels", "special"))

    def ids(self, names: Iterable[str]) -> tuple[int, ...]:
        """Ids of the named special tokens that exist, ascending, each once; `sentinels`, `special` allowed."""
        found: set[int] = set()
        for name in names:
            value = getattr(self, name)
            found |= set(value) if isinstance(value, tuple) else ({value} - {None})
        return tuple(sorted(found))

    def is_special(self, tokens: jax.Array) -> jax.Array:
        """True where `tokens` (any shape) holds a special id."""
        return is_any_of(tokens, self.special_ids, self.size)

    def require(self, name: str, objective: str) -> int:
        """The id called `name`; ValueError naming the objective when the vocabulary has none."""
        value = getattr(self, name)
        if value is None:
            raise VocabularyError(
                f"objective '{objective}' needs vocabulary.{name}, which is None",
                f": add a {name} token to the tokenizer or choose an objective without one",
            )
        return value

    def require_sentinels(self, count: int, objective: str) -> tuple[int, ...]:
        """The first `count` sentinels; ValueError when there are fewer."""
        if len(self.sentinels) < count:
            raise VocabularyError(
                f"objective '{objective}' needs {count} sentinels and vocabulary.sentinels has {len(self.sentinels)}",
                ": add sentinel tokens, or use a lower rate, longer spans or shorter rows",
            )
        return self.sentinels[:count]

    def require_special(self, name: str, token: object) -> int:
        """The id `token`, called `name`; ValueError unless it is one of those that no text has."""
        if not isinstance(token, int) or token not in self.special_ids:
            raise VocabularyError(
                f"{name}={shown(token)}: not a special id of the vocabulary, one that no text has",
                "; list it in vocabulary.special",
            )
        return token


def is_any_of(tokens: jax.Array, ids: tuple[int, ...], size: int) -> jax.Array:
    """True where `tokens` (any shape) is one of `ids`, all below `size`."""
    if not ids:
        return jnp.zeros(tokens.shape, bool)
    if len(ids) <= _COMPARE_AT_MOST:
        found = tokens == ids[0]
        for token in ids[1:]:
            found |= tokens == token
        return found
    table = np.zeros(size, bool)
    table[list(ids)] = True
    return jnp.asarray(table)[tokens]
