"""Masks that depend on the batch: segments, padding, and what follows from them.

Arrays are ``[batch, length]`` (or ``[length]``, shared; or ``[batch, heads, length]``) and are indexed by
position: the query in row ``i`` reads entry ``q_offset + i``.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.masks.builder_arguments import array, identifier, whole_number
from maskformer.masks.builders import builder
from maskformer.masks.expression import Mask, leaf, take


@leaf(q_ids=1, kv_ids=1)
class Segments(Mask):
    """Equal ids; ``kv_ids=None``: the keys are the queries' own sequence. ``padding``: an id that sees nothing."""

    q_ids: Any
    kv_ids: Any = None
    padding: int | None = None

    def attend(self, q: Any, k: Any) -> Any:
        q_id = take(self.q_ids, q)
        same = q_id == take(self.q_ids if self.kv_ids is None else self.kv_ids, k)
        return same if self.padding is None else same & (q_id != self.padding)

    def sharpen(self) -> Mask:
        """Renames a trailing id 0 (padding) to one past the largest, so that packed ids are sorted to the end.

        The tile where the last segment meets the padding would otherwise span all ids between, and be visited.
        """
        ids = [self.q_ids] if self.kv_ids is None else [self.q_ids, self.kv_ids]
        signed = all(jnp.issubdtype(each.dtype, jnp.signedinteger) for each in ids)
        if not signed or 0 in [each.shape[-1] for each in ids]:
            return self
        xp = np if all(isinstance(each, np.ndarray) for each in ids) else jnp
        largest = functools.reduce(xp.maximum, [xp.max(each) for each in ids])
        trailing = functools.reduce(operator.or_, [(each[-1] == 0) & (each[0] != 0) for each in ids])
        trailing = trailing & (largest < jnp.iinfo(ids[0].dtype).max) & (ids[0].dtype == ids[-1].dtype)
        past = largest + xp.asarray(trailing).astype(largest.dtype)
        ids = [xp.where(trailing & (each == 0), past, each).astype(each.dtype) for each in ids]
        renamed = Segments(ids[0], None if self.kv_ids is None else ids[1])
        # The id of padding may itself have been renamed; what it hides is said of the original.
        return renamed if self.padding is None else renamed & ~_Equals(self.q_ids, self.padding)

    @property
    def axes(self) -> dict[str, str]:  # type: ignore[override]
        return {"q_ids": "both" if self.kv_ids is None else "query", "kv_ids": "key"}


@leaf(ids=1)
class _Equals(Mask):
    """Queries whose id is ``value``; part of a sharpened ``Segments``."""

    ids: Any
    value: int

    def attend(self, q: Any, k: Any) -> Any:
        return take(self.ids, q) == self.value

    def spell(self) -> tuple[str, list[tuple[str | None, Any]]]:
        return "segments", [("q_ids", self.ids), ("padding", self.value)]


@leaf(ids=1, starts=1)
class Documents(Mask):
    """Equal ``starts``, which say where the run of equal ``ids`` begins that a position is in."""

    ids: Any
    starts: Any

    axes: ClassVar[dict[str, str]] = {"ids": "both", "starts": "both"}

    def attend(self, q: Any, k: Any) -> Any:
        return take(self.starts, q) == take(self.starts, k)

    @functools.cached_property
    def implied(self) -> frozenset[Any]:
        """A run of equal ids is part of a segment of the same ids."""
        return frozenset((self.identity, Segments(self.ids).identity))


@leaf(valid=1, lengths=0)
class KeyPadding(Mask):
    """Keys that exist: ``valid[k]`` and ``k < lengths``, whichever are given."""

    valid: Any = None
    lengths: Any = None

    axes: ClassVar[dict[str, str]] = {"valid": "key"}

    def attend(self, q: Any, k: Any) -> Any:
        return _exists(self.valid, self.lengths, k)


@leaf(valid=1, lengths=0)
class QueryPadding(Mask):
    """Queries that exist: ``valid[q]`` and ``q < lengths``, whichever are given."""

    valid: Any = None
    lengths: Any = None

    axes: ClassVar[dict[str, str]] = {"valid": "query"}

    def attend(self, q: Any, k: Any) -> Any:
        return _exists(self.valid, self.lengths, q)


@leaf(lengths=0, marked=1)
class Prefix(Mask):
    """Query and key both in the prefix: before ``lengths``, or ``marked``."""

    lengths: Any = None
    marked: Any = None

    axes: ClassVar[dict[str, str]] = {"marked": "both"}

    def attend(self, q: Any, k: Any) -> Any:
        return _exists(self.marked, self.lengths, q) & _exists(self.marked, self.lengths, k)


@leaf(marked=1)
class GlobalTokens(Mask):
    """Query or key is global: ``marked``, or among the first ``count``."""

    count: int | None = None
    marked: Any = None

    axes: ClassVar[dict[str, str]] = {"marked": "both"}

    def attend(self, q: Any, k: Any) -> Any:
        if self.marked is None:
            return (q < self.count) | (k < self.count)
        seen = take(self.marked, q).astype(bool) | take(self.marked, k).astype(bool)
        return seen if self.count is None else seen | (q < self.count) | (k < self.count)


@leaf(segment_ids=1)
class SharedPrefix(Mask):
    """The key's segment is the shared one, or the query's own."""

    segment_ids: Any
    shared_id: int = 0

    axes: ClassVar[dict[str, str]] = {"segment_ids": "both"}

    def attend(self, q: Any, k: Any) -> Any:
        k_id = take(self.segment_ids, k)
        return (k_id == self.shared_id) | (k_id == take(self.segment_ids, q))


@leaf(image_starts=1, key_images=1, images_before=1)
class ToLastImage(Mask):
    """The key belongs to the last image that starts at or before the query; images count from 1."""

    image_starts: Any
    key_images: Any
    images_before: Any

    axes: ClassVar[dict[str, str]] = {"image_starts": "query", "key_images": "key"}

    def attend(self, q: Any, k: Any) -> Any:
        image = take(self.images_before, q)
        return (image == take(self.key_images, k)) & (image > 0)


def _exists(marked: Any, lengths: Any, position: Any) -> Any:
    known = [] if marked is None else [take(marked, position).astype(bool)]
    known += [] if lengths is None else [position < lengths]
    return known[0] if len(known) == 1 else known[0] & known[1]


@builder("segment", q_ids="segment_ids", kv_ids="kv_segment_ids")
def segments(q_ids: Any, kv_ids: Any = None, padding: int | None = None) -> Mask:
    """Packed examples: a query sees the keys whose segment id equals its own.

    Ids may be in any order; sorted ones (as packing makes them) let whole tiles be skipped.

    Args:
      q_ids: int ``[batch, q_len]``.
      kv_ids: int ``[batch, kv_len]``; None where queries and keys are one sequence.
      padding: an id, usually 0, whose tokens see nothing at all. By default padding tokens are a segment like
        any other, which sees itself: harmless, since nothing else sees it.

    >>> import numpy as np
    >>> from maskformer import masks
    >>> ids = np.array([1, 1, 2, 2, 0])
    >>> print(masks.segments(ids).to_string(5, 5))
    █ █ · · ·
    █ █ · · ·
    · · █ █ ·
    · · █ █ ·
    · · · · █
    >>> print((masks.causal() & masks.segments(ids, padding=0)).to_string(5, 5))
    █ · · · ·
    █ █ · · ·
    · · █ · ·
    · · █ █ ·
    · · · · ·
    """
    q_ids = array("segments", "q_ids", q_ids, 1)
    kv_ids = None if kv_ids is None else array("segments", "kv_ids", kv_ids, 1)
    if kv_ids is not None:
        common = jax.dtypes.canonicalize_dtype(jnp.promote_types(q_ids.dtype, kv_ids.dtype))
        if any(jnp.iinfo(common).max < jnp.iinfo(each.dtype).max for each in (q_ids, kv_ids)):
            raise ValueError(
                f"segments: q_ids are {q_ids.dtype} and kv_ids {kv_ids.dtype}, which JAX compares as {common}, where "
                "large ids wrap around; give both in one dtype"
            )
    if padding is not None:
        padding = identifier("segments", "padding", padding, q_ids)
    return Segments(q_ids, kv_ids, padding)


@builder(ids="segment_ids")
def documents(ids: Any) -> Mask:
    """Packed documents: query and key in the same run of equal ids.

    What `segments` says of ids that stand together, as packing puts them. That they do is no assumption here but the
    definition, so every query sees one run of keys, whatever the ids turn out to be: all that some GPU kernels take.

    Args:
      ids: int ``[batch, length]``; a document ends where the id changes. Padding is a document like any other.

    >>> import numpy as np
    >>> from maskformer import masks
    >>> print((masks.causal() & masks.documents(np.array([1, 1, 2, 2, 1, 0]))).to_string(6, 6))
    █ · · · · ·
    █ █ · · · ·
    · · █ · · ·
    · · █ █ · ·
    · · · · █ ·
    · · · · · █
    """
    ids = array("documents", "ids", ids, 1)
    known = isinstance(ids, np.ndarray)
    xp = np if known else jnp
    changes = xp.concatenate([xp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], axis=-1)
    starts = xp.where(changes, xp.arange(ids.shape[-1], dtype=np.int32), 0)
    starts = np.maximum.accumulate(starts, axis=-1) if known else jax.lax.cummax(starts, axis=starts.ndim - 1)
    return Documents(ids, starts)


@builder(valid="valid", lengths="lengths")
def key_padding(valid: Any = None, lengths: Any = None) -> Mask:
    """Hides keys that are padding.

    Args:
      valid: bool ``[batch, kv_len]``, True for a real token.
      lengths: int ``[batch]``, how many keys are real; both may be given.

    >>> import numpy as np
    >>> from maskformer import masks
    >>> print(masks.key_padding(lengths=np.array([3])).to_string(3, 5))
    █ █ █ · ·
    █ █ █ · ·
    █ █ █ · ·
    >>> print(masks.key_padding(np.array([True, False, True])).to_string(2, 3))
    █ · █
    █ · █
    """
    return KeyPadding(*_padding("key_padding", valid, lengths))


@builder(valid="valid", lengths="lengths")
def query_padding(valid: Any = None, lengths: Any = None) -> Mask:
    """Lets padding queries see nothing: their attention output is exactly 0. Arguments as ``key_padding``.

    >>> import numpy as np
    >>> from maskformer import masks
    >>> print(masks.query_padding(lengths=np.array(2)).to_string(4, 3))
    █ █ █
    █ █ █
    · · ·
    · · ·
    """
    return QueryPadding(*_padding("query_padding", valid, lengths))


def _padding(name: str, valid: Any, lengths: Any) -> tuple[Any, Any]:
    if valid is None and lengths is None:
        raise ValueError(f"{name}: give valid=[batch, length], lengths=[batch], or both")
    valid = None if valid is None else array(name, "valid", valid, 1, "bool")
    return valid, None if lengths is None else array(name, "lengths", lengths, 0)


@builder(lengths="prefix_lengths", marked="prefix")
def prefix(lengths: Any = None, marked: Any = None) -> Mask:
    """Query and key both in the prefix, which sees itself both ways; ``causal | prefix`` is a prefix-LM.

    Args:
      lengths: int ``[batch]``, one prefix per row.
      marked: bool ``[batch, length]``, True in a prefix: one per segment, with ``& segments`` around it (T5X's
        ``decoder_causal_attention``).

    >>> import numpy as np
    >>> from maskformer import masks
    >>> print((masks.causal() | masks.prefix(lengths=np.array(3))).to_string(5, 5))
    █ █ █ · ·
    █ █ █ · ·
    █ █ █ · ·
    █ █ █ █ ·
    █ █ █ █ █
    >>> mask = masks.parse("(causal | prefix(marked=inputs)) & segments",
    ...                    inputs=np.array([1, 1, 0, 1, 1, 0]), segment_ids=np.array([1, 1, 1, 2, 2, 2]))
    >>> print(mask.to_string(6, 6))
    █ █ · · · ·
    █ █ · · · ·
    █ █ █ · · ·
    · · · █ █ ·
    · · · █ █ ·
    · · · █ █ █
    """
    if lengths is None and marked is None:
        raise ValueError("prefix: give lengths=[batch] or marked=[batch, length]")
    lengths = None if lengths is None else array("prefix", "lengths", lengths, 0)
    return Prefix(lengths, None if marked is None else array("prefix", "marked", marked, 1, "bool"))


@builder(marked="global_tokens")
def global_tokens(count: int | None = None, marked: Any = None) -> Mask:
    """Global tokens see everything and are seen by everything (Longformer, BigBird).

    Args:
      count: the first ``count`` tokens are global.
      marked: bool ``[batch, length]``, True for a global token.

    >>> from maskformer import masks
    >>> print((masks.sliding_window(1, 1) | masks.global_tokens(1)).to_string(5, 5))
    █ █ █ █ █
    █ █ █ · ·
    █ █ █ █ ·
    █ · █ █ █
    █ · · █ █
    """
    if count is None and marked is None:
        raise ValueError("global_tokens: give count or marked=[batch, length]")
    count = None if count is None else whole_number("global_tokens", "count", count, 0)
    return GlobalTokens(count, None if marked is None else array("global_tokens", "marked", marked, 1, "bool"))


@builder(segment_ids="segment_ids")
def shared_prefix(segment_ids: Any, shared_id: int = 0) -> Mask:
    """One prompt, many continuations in a row: a token sees the shared segment and its own.

    Args:
      segment_ids: int ``[batch, length]``; the prompt has ``shared_id``, each continuation its own id.

    >>> import numpy as np
    >>> from maskformer import masks
    >>> ids = np.array([0, 0, 1, 1, 2, 2])
    >>> print((masks.causal() & masks.shared_prefix(ids)).to_string(6, 6))
    █ · · · · ·
    █ █ · · · ·
    █ █ █ · · ·
    █ █ █ █ · ·
    █ █ · · █ ·
    █ █ · · █ █
    """
    segment_ids = array("shared_prefix", "segment_ids", segment_ids, 1)
    return SharedPrefix(segment_ids, identifier("shared_prefix", "shared_id", shared_id, segment_ids))


@builder(image_starts="image_starts", key_images="key_images")
def to_last_image(image_starts: Any, key_images: Any) -> Mask:
    """Text sees the last image before it (cross-attention of Flamingo, arXiv:2204.14198, section 3.1.3).

    Args:
      image_starts: bool ``[batch, q_len]``, True at the text position where an image stands. Text before the
        first image sees nothing.
      key_images: int ``[batch, kv_len]``, which image each key belongs to, counted from 1; 0 is padding.

    >>> import numpy as np
    >>> from maskformer import masks
    >>> mask = masks.to_last_image(np.array([0, 1, 0, 1, 0]), np.array([1, 1, 2, 2]))
    >>> print(mask.to_string(5, 4))
    · · · ·
    █ █ · ·
    █ █ · ·
    · · █ █
    · · █ █
    """
    starts = array("to_last_image", "image_starts", image_starts, 1, "bool")
    images = array("to_last_image", "key_images", key_images, 1)
    return ToLastImage(starts, images, jnp.cumsum(jnp.asarray(starts).astype(bool), axis=-1, dtype=jnp.int32))
