"""The mask expression: named leaves joined by ``&``, ``|`` and ``~``, as one pytree.

A mask is a predicate ``(query position, key position) -> may attend``. Arrays that a leaf captures (segment
ids, lengths, edges, ...) are pytree leaves, so a thousand different packings share one compilation; everything
else (window sizes, functions) is static. Each array may carry leading ``[batch]`` or ``[batch, heads]``
dimensions, which broadcast against each other.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import shown
from maskformer.masks.block_map import BlockMap, block_map
from maskformer.masks.builder_arguments import LARGEST, offset
from maskformer.masks.builders import BUILDERS, builder_name
from maskformer.masks.intervals import Interval
from maskformer.masks.tiles import Reading
from maskformer.masks.writing import Writable, Writer


class Mask(Writable):
    """Who may attend to whom. Build one with the functions of ``maskformer.masks``; combine with ``& | ~``.

    Attributes of subclasses are public: backends match on them (``isinstance(mask, masks.SlidingWindow)``).
    """

    ranks: ClassVar[dict[str, int]] = {}
    """For each array field, its number of dimensions without ``[batch, heads]`` in front."""

    axes: ClassVar[dict[str, str]] = {}
    """The array fields whose last dimension is a position: of the ``"query"``, of the ``"key"``, or of ``"both"``."""

    # NumPy must leave `array & mask` to the mask, which says what is wrong, and not try it on each entry.
    __array_ufunc__ = None

    # --- what a subclass says -------------------------------------------------------------------------------

    def attend(self, q: Any, k: Any) -> Any:
        """The predicate itself, elementwise, for a mask whose arrays have no batch or head dimension."""
        raise TypeError(f"{type(self).__name__} does not define attend(q, k)")

    def children(self) -> tuple[Mask, ...]:
        """The masks this one is made of; empty for a leaf."""
        return ()

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        """The same node over other children."""
        return self

    def arrays(self) -> Iterator[tuple[str, Any, int]]:
        """``(field, array, rank)`` of the arrays that this node itself holds."""
        for name, rank in self.ranks.items():
            array = getattr(self, name)
            if array is not None:
                yield name, array, rank

    def select_leaf(self, pick: Callable[[Any, int], Any]) -> Mask:
        """This leaf with every array replaced by ``pick(array, rank)``."""
        changed = {name: pick(array, rank) for name, array, rank in self.arrays()}
        return dataclasses.replace(self, **changed) if changed else self  # type: ignore[type-var]

    def spell(self) -> tuple[str, list[tuple[str | None, Any]]]:
        """How to write this leaf: its builder's name and ``(parameter, value)`` for each argument to write."""
        name = builder_name(type(self))
        parameters = BUILDERS[name].parameters
        values = [(key, getattr(self, key)) for key in parameters if hasattr(self, key)]
        return name, [(key, value) for key, value in values if not _is_default(value, parameters[key].default)]

    # --- what every mask can do -----------------------------------------------------------------------------

    def __and__(self, other: Mask) -> Mask:
        return all_of((self, check_mask("&", other)))

    def __or__(self, other: Mask) -> Mask:
        return any_of((self, check_mask("|", other)))

    __rand__ = __and__
    __ror__ = __or__

    def __invert__(self) -> Mask:
        return Not(self)

    def implies(self, other: Mask) -> bool:
        """Whether ``other`` is known to attend wherever this mask does.

        ``&`` leaves out what another term implies: an objective's mask and a config's may both say "segments".
        """
        return other.identity in self.implied

    @functools.cached_property
    def identity(self) -> Any:
        """Equal for two masks that are the same of the same arrays, whose values are not looked at."""
        identity = _identity(self)
        try:
            hash(identity)
        except TypeError:  # of a function that cannot be hashed: the same as itself alone
            return id(self)
        return identity

    @functools.cached_property
    def implied(self) -> frozenset[Any]:
        """The identities of the masks known to attend wherever this one does, and those that each of them implies."""
        return frozenset((self.identity,))

    def __getstate__(self) -> dict[str, Any]:
        # An identity holds for the arrays of this process.
        return {name: value for name, value in vars(self).items() if name not in ("identity", "implied")}

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value: combine masks with & | ~ (not `and`, `or`, `not`)")

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, Mask):
            return NotImplemented
        mine, theirs = jax.tree.flatten(self), jax.tree.flatten(other)
        return mine[1] == theirs[1] and all(map(_same_array, mine[0], theirs[0]))

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self))

    def __repr__(self) -> str:
        return self._write()[0]

    def bindings(self) -> dict[str, Any]:
        """The arrays and functions that ``str(mask)`` names: ``parse(str(mask), **mask.bindings()) == mask``."""
        return self._write()[1]

    def _write(self) -> tuple[str, dict[str, Any]]:
        writer = Writer(self.unbound)
        return self.write(writer), writer.named

    def write(self, writer: Writer) -> str:
        return writer.call(*self.spell())

    @property
    def unbound(self) -> tuple[str, ...]:
        """The names of a parsed mask's text that still stand for an array; see ``bind``."""
        return tuple(dict.fromkeys(name for leaf in self.leaves() for name in leaf.names()))

    def bind(self, **arrays: Any) -> Mask:
        """The mask with arrays in the place of the names that its text left open.

        A model offers all it has, ``mask.bind(segment_ids=..., valid=...)``; names that the mask does not use
        are of no concern to it, and a name still open raises when the mask is evaluated.
        """
        children = self.children()
        return self.rebuild([child.bind(**arrays) for child in children]) if children else self

    def names(self) -> tuple[str, ...]:
        """The open names of this leaf itself."""
        return ()

    def leaves(self) -> Iterator[Mask]:
        """All leaves, left to right."""
        children = self.children()
        for child in children:
            yield from child.leaves()
        if not children:
            yield self

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dimensions that the arrays carry: ``()``, ``(batch,)`` or ``(batch, heads)``."""
        leads = [tuple(np.shape(array)[: np.ndim(array) - rank]) for _, array, rank in self.arrays()]
        leads += [child.lead for child in self.children()]
        return broadcast_leads(leads)

    @property
    def shape(self) -> tuple[int, int]:
        """``(batch, heads)`` that the mask's arrays imply; 1 where they do not care."""
        batch, heads = (self.lead + (1, 1))[:2]
        return batch, heads

    def select(self, b: Any = 0, h: Any = 0) -> Mask:
        """The mask of batch entry ``b`` and head ``h`` (ints, possibly traced), of shape ``(1, 1)``."""
        children = self.children()
        if children:
            return self.rebuild([child.select(b, h) for child in children])

        def pick(array: Any, rank: int) -> Any:
            for index in (b, h)[: np.ndim(array) - rank]:
                array = _take_row(array, index)
            return array

        return self.select_leaf(pick)

    def __call__(self, q: Any, k: Any) -> jax.Array:
        """May position ``q`` attend to position ``k``? Elementwise over index arrays that broadcast together.

        Raises:
          ValueError: if the mask differs between batch entries or heads; ``select(b, h)`` one first.
        """
        if self.shape != (1, 1):
            raise ValueError(
                f"mask of shape (batch, heads) = {self.shape} was called on positions: "
                "choose one entry first, mask.select(b, h)(q, k)"
            )
        q, k = jnp.asarray(q), jnp.asarray(k)
        shape = jnp.broadcast_shapes(q.shape, k.shape)
        return jnp.broadcast_to(self.select(0, 0).attend(q, k), shape).astype(bool)

    def dense(self, q_len: int, kv_len: int, q_offset: Any = 0) -> jax.Array:
        """The whole matrix, bool ``[*batch, q_len, kv_len]`` with the batch dimensions of ``lead`` only.

        Row ``i`` is the query at position ``q_offset + i``. This costs ``q_len * kv_len`` memory: it is the
        oracle for tests and pictures, and the reference backend.
        """
        q_offset = offset("dense", "q_offset", q_offset)
        self.check_lengths(q_len, kv_len, q_offset)
        q = (jnp.arange(q_len, dtype=jnp.int32) + q_offset)[:, None]
        k = jnp.arange(kv_len, dtype=jnp.int32)[None, :]
        lead = self.lead
        matrix = functools.partial(Mask._matrix, self, q, k)
        if len(lead) == 0:
            return matrix(0, 0)
        if len(lead) == 1:
            return jax.vmap(lambda b: matrix(b, 0))(jnp.arange(lead[0]))
        return jax.vmap(lambda b: jax.vmap(lambda h: matrix(b, h))(jnp.arange(lead[1])))(jnp.arange(lead[0]))

    def _matrix(self, q: jax.Array, k: jax.Array, b: Any, h: Any) -> jax.Array:
        shape = (q.shape[0], k.shape[1])
        return jnp.broadcast_to(self.select(b, h).attend(q, k), shape).astype(bool)

    def sharpen(self) -> Mask:
        """An equal mask that the interval analysis sees through better; called once, on a mask of shape (1, 1)."""
        return self.rebuild([child.sharpen() for child in self.children()])

    def tile_bounds(self, reading: Reading) -> Interval:
        """``(all, any)`` on each tile: from the predicate's jaxpr, for a mask that does not know better."""
        return reading.trace(self)

    @property
    def has_per_head(self) -> bool:
        """Whether heads follow different expressions somewhere in the mask."""
        return any(child.has_per_head for child in self.children())

    def check_lengths(self, q_len: int, kv_len: int, q_offset: Any = 0) -> None:
        """Raises ValueError where an array does not cover the positions asked for, or int32 does not."""
        last = max(kv_len, q_offset + q_len if isinstance(q_offset, (int, np.integer)) else 0) - 1
        if last > LARGEST:
            raise ValueError(f"{shown(self)}: position {last} is asked for, and positions are int32, up to {LARGEST}")
        for child in self.children():
            child.check_lengths(q_len, kv_len, q_offset)
        for name, array, _ in self.arrays():
            axis = self.axes.get(name)
            needed = [kv_len] if axis in ("key", "both") else []
            if axis in ("query", "both") and isinstance(q_offset, (int, np.integer)):
                needed.append(q_offset + q_len)
            if not needed:
                continue
            size = np.shape(array)[-1]
            if size < max(needed):
                raise ValueError(
                    f"{builder_name(type(self))}: {name} has {size} entries; expected at least {max(needed)} for "
                    f"{q_len} queries from position {q_offset} on and {kv_len} keys"
                )

    def to_string(self, q_len: int, kv_len: int, q_offset: int = 0, batch: int = 0, head: int = 0) -> str:
        """A picture of one entry in text, a row per query: ``█`` attends, ``·`` does not."""
        matrix = np.asarray(self.select(batch, head).dense(q_len, kv_len, q_offset))
        return "\n".join(" ".join("·█"[int(cell)] for cell in row) for row in matrix)

    def block_map(self, q_len: int, kv_len: int, block: int | tuple[int, int], q_offset: Any = 0) -> BlockMap:
        """Which tiles are empty, full or partial: see ``maskformer.masks.block_map``."""
        return block_map(self, q_len, kv_len, block, q_offset)


def leaf(**ranks: int) -> Callable[[type], type]:
    """Class decorator: a frozen dataclass registered as a pytree, its ``ranks`` fields being the arrays."""

    def register(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        cls.ranks = dict(ranks)  # type: ignore[attr-defined]
        names = [field.name for field in dataclasses.fields(cls)]
        return pytree(cls, list(ranks), [name for name in names if name not in ranks])

    return register


def node(cls: type) -> type:
    """Class decorator: a frozen dataclass registered as a pytree, all of its fields being data."""
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    return pytree(cls, [field.name for field in dataclasses.fields(cls)], [])


def pytree(cls: type, data: Sequence[str], static: Sequence[str]) -> type:
    """Registers a dataclass of masks.

    Not by `jax.tree_util.register_dataclass`: JAX (0.10.2) then compares the fields alone, and `jax.jit` may run for
    ``a | b`` what it compiled for ``a & b``.
    """

    def flatten(mask: Any) -> tuple[Any, Any]:
        return tuple(getattr(mask, name) for name in data), tuple(getattr(mask, name) for name in static)

    def flatten_with_keys(mask: Any) -> tuple[Any, Any]:
        children, fixed = flatten(mask)
        return tuple((jax.tree_util.GetAttrKey(name), child) for name, child in zip(data, children)), fixed

    def unflatten(fixed: Any, children: Any) -> Any:
        return cls(**dict(zip(data, children)), **dict(zip(static, fixed)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


@node
class And(Mask):
    """Attends where every term does."""

    terms: tuple[Mask, ...]

    joined: ClassVar[bool] = True

    def children(self) -> tuple[Mask, ...]:
        return self.terms

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        return And(tuple(children))

    def write(self, writer: Writer) -> str:
        return writer.join("&", self.terms)

    def attend(self, q: Any, k: Any) -> Any:
        return functools.reduce(operator.and_, [term.attend(q, k) for term in self.terms])

    def tile_bounds(self, reading: Reading) -> Interval:
        return reading.combine(operator.and_, self.terms)


@node
class Or(Mask):
    """Attends where any term does."""

    terms: tuple[Mask, ...]

    joined: ClassVar[bool] = True

    def children(self) -> tuple[Mask, ...]:
        return self.terms

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        return Or(tuple(children))

    def write(self, writer: Writer) -> str:
        return writer.join("|", self.terms)

    def attend(self, q: Any, k: Any) -> Any:
        return functools.reduce(operator.or_, [term.attend(q, k) for term in self.terms])

    def tile_bounds(self, reading: Reading) -> Interval:
        return reading.combine(operator.or_, self.terms)


@node
class Not(Mask):
    """Attends where the term does not."""

    term: Mask

    def children(self) -> tuple[Mask, ...]:
        return (self.term,)

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        return Not(children[0])

    def __invert__(self) -> Mask:
        return self.term

    def write(self, writer: Writer) -> str:
        return "~" + writer.operand(self.term)

    def attend(self, q: Any, k: Any) -> Any:
        return ~self.term.attend(q, k)

    def tile_bounds(self, reading: Reading) -> Interval:
        inner = self.term.tile_bounds(reading)
        return Interval(~inner.hi, ~inner.lo, inner.depends)


def all_of(masks: Iterable[Mask]) -> Mask:
    """The masks joined by ``&``, in order, without the terms that another one implies; at least one mask."""
    kept: dict[Any, Mask] = {}
    implied: set[Any] = set()
    for term in _terms(And, masks):
        if term.identity in implied:
            continue
        for identity in term.implied:
            kept.pop(identity, None)
        kept[term.identity] = term
        implied |= term.implied
    return _joined(And, kept)


def any_of(masks: Iterable[Mask]) -> Mask:
    """The masks joined by ``|``, in order, without the terms that imply another one; at least one mask."""
    kept: dict[Any, Mask] = {}
    implying: dict[Any, list[Any]] = {}
    for term in _terms(Or, masks):
        if not kept.keys().isdisjoint(term.implied):
            continue
        for identity in implying.get(term.identity, ()):
            kept.pop(identity, None)
        kept[term.identity] = term
        for identity in term.implied:
            implying.setdefault(identity, []).append(term.identity)
    return _joined(Or, kept)


def _identity(node: Any) -> Any:
    """Of a pytree. Its structure would do, but that of JAX hashes alike for all windows, whatever their size."""
    level = jax.tree_util.default_registry.flatten_one_level(node)
    if level is None:
        return id(node)
    children = (child.identity if isinstance(child, Mask) else _identity(child) for child in level[0])
    return type(node), level[1], tuple(children)


def _terms(kind: type, masks: Iterable[Mask]) -> Iterator[Mask]:
    for mask in masks:
        yield from mask.terms if type(mask) is kind else (mask,)  # type: ignore[attr-defined]


def _joined(kind: type, kept: dict[Any, Mask]) -> Mask:
    terms = tuple(kept.values())
    return kind(terms) if len(terms) > 1 else terms[0]


def take(array: Any, index: Any) -> jax.Array:
    """``array[index]`` for positions, clamped: tiles that overhang the sequence read the last entry."""
    return jnp.asarray(array).at[index].get(mode="clip", wrap_negative_indices=False)


def _take_row(array: Any, index: Any) -> Any:
    size = np.shape(array)[0]
    if size == 1:
        return array[0]
    if isinstance(index, (int, np.integer)):
        if not 0 <= index < size:
            raise IndexError(f"select({index}) of a mask with {size} entries in that dimension")
        return array[int(index)]
    return jax.lax.dynamic_index_in_dim(jnp.asarray(array), index, keepdims=False)


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (int, float, tuple)) and value == default)


def check_mask(symbol: str, other: object) -> Mask:
    if isinstance(other, Mask):
        return other
    hint = "wrap the array with masks.dense(array)" if hasattr(other, "shape") else "expected another mask"
    raise TypeError(f"mask {symbol} {type(other).__name__}: {hint}")


def broadcast_leads(leads: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    rank = max(map(len, leads), default=0)
    if rank > 2:
        raise ValueError(f"mask arrays have leading dimensions {leads}: expected at most [batch, heads]")
    padded = [lead + (1,) * (rank - len(lead)) for lead in leads]
    try:
        return tuple(np.broadcast_shapes(*padded)) if padded else ()
    except ValueError:
        raise ValueError(
            f"mask arrays have leading [batch, heads] dimensions {sorted(set(leads))}, which do not broadcast"
        ) from None


def _same_array(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    return np.shape(a) == np.shape(b) and bool(np.all(np.asarray(a) == np.asarray(b)))
