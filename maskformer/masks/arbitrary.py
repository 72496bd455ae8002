"""Masks given as a matrix or as any function of two positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.checks import shown
from maskformer.masks.builder_arguments import array as check_array
from maskformer.masks.builder_arguments import as_array, canonical
from maskformer.masks.builders import builder
from maskformer.masks.expression import Mask, leaf, take


@leaf(array=2)
class Dense(Mask):
    """``array[q, k]``."""

    array: Any

    def check_lengths(self, q_len: int, kv_len: int, q_offset: Any = 0) -> None:
        rows, columns = np.shape(self.array)[-2:]
        needed = q_offset + q_len if isinstance(q_offset, (int, np.integer)) else 0
        if rows < needed or columns < kv_len:
            raise ValueError(
                f"dense: array is {rows} x {columns}, but there are {q_len} queries from position {q_offset} on "
                f"and {kv_len} keys"
            )

    def attend(self, q: Any, k: Any) -> Any:
        return take(self.array, (q, k)).astype(bool)


@jax.tree_util.register_pytree_node_class
class Predicate(Mask):
    """``fn(q, k, *captured)``; ``array_ranks`` counts each captured array's dimensions without ``[batch, heads]``."""

    def __init__(self, fn: Callable[..., Any], captured: tuple[Any, ...] = (), array_ranks: tuple[int, ...] = ()):
        self.fn, self.captured, self.array_ranks = fn, tuple(captured), tuple(array_ranks)

    def tree_flatten(self) -> tuple[Any, Any]:
        return self.captured, (self.fn, self.array_ranks)

    @classmethod
    def tree_unflatten(cls, static: Any, captured: Any) -> Predicate:
        return cls(static[0], tuple(captured), static[1])

    def arrays(self) -> Iterator[tuple[str, Any, int]]:
        for index, (array, rank) in enumerate(zip(self.captured, self.array_ranks)):
            yield f"captured[{index}]", array, rank

    def select_leaf(self, pick: Callable[[Any, int], Any]) -> Mask:
        return Predicate(self.fn, tuple(pick(a, r) for _, a, r in self.arrays()), self.array_ranks)

    def spell(self) -> tuple[str, list[tuple[str | None, Any]]]:
        arguments: list[tuple[str | None, Any]] = [("fn", self.fn), *((None, array) for array in self.captured)]
        batch_dims = max((np.ndim(a) - rank for _, a, rank in self.arrays()), default=0)
        return "predicate", arguments + ([("batch_dims", batch_dims)] if batch_dims else [])

    def attend(self, q: Any, k: Any) -> Any:
        # The function is written for one query and one key; broadcasting is ours to do.
        arrays = [jnp.asarray(array) for array in self.captured]
        name = getattr(self.fn, "__name__", "fn")

        def one(q: Any, k: Any) -> Any:
            answer = self.fn(q, k, *arrays)
            if answer is None or isinstance(answer, (tuple, list, dict, Mask)):
                raise ValueError(f"predicate({name}) returned a {type(answer).__name__}, expected one bool")
            # A number attends unless it is 0; `&` and `~` of the mask must not see its bits.
            return jnp.asarray(answer).astype(bool)

        try:
            return jnp.vectorize(one)(q, k)
        except jax.errors.TracerBoolConversionError as error:
            raise ValueError(
                f"predicate({name}): `and`, `or`, `not` and `if` ask for one answer, and q and k stand for all "
                "positions at once; use &, |, ~ and jnp.where"
            ) from error
        except (jax.errors.TracerArrayConversionError, jax.errors.TracerIntegerConversionError) as error:
            raise ValueError(
                f"predicate({name}): NumPy and Python cannot compute with q and k, nor read an array at them; use "
                "jax.numpy, and give arrays as arguments, predicate(fn, array)"
            ) from error

    def open(self) -> Predicate:
        """The same predicate with the traced arrays that its function closes over among its ``captured`` ones."""
        arrays = [(np.shape(a)[np.ndim(a) - rank :], jnp.result_type(a)) for _, a, rank in self.arrays()]
        avals = [jax.ShapeDtypeStruct(*array) for array in arrays]
        position = jax.ShapeDtypeStruct((), np.int32)
        # A fresh function each time: make_jaxpr caches by identity and would keep the tracers alive.
        program = lambda q, k, *given: Predicate(self.fn, given, self.array_ranks).attend(q, k)
        closed = jax.make_jaxpr(program)(position, position, *avals)
        if not any(isinstance(const, jax.core.Tracer) for const in closed.consts):
            return self

        def fn(q: Any, k: Any, *given: Any) -> Any:
            own, consts = given[: len(avals)], given[len(avals) :]
            q, k = (jnp.asarray(position).astype(jnp.int32) for position in (q, k))
            return jax.core.eval_jaxpr(closed.jaxpr, consts, q, k, *own)[0]

        fn.__name__ = getattr(self.fn, "__name__", "fn")
        ranks = self.array_ranks + tuple(np.ndim(const) for const in closed.consts)
        return Predicate(fn, self.captured + tuple(closed.consts), ranks)


def open_closures(mask: Mask) -> Mask:
    """A mask whose predicates close over no traced array, for a transformation that such arrays must not escape."""
    if isinstance(mask, Predicate):
        return mask.open()
    children = mask.children()
    return mask.rebuild([open_closures(child) for child in children]) if children else mask


@builder(array="array")
def dense(array: Any) -> Mask:
    """A mask given as its matrix, for what no other builder says.

    Args:
      array: bool ``[q_len, kv_len]``, ``[batch, q_len, kv_len]`` or ``[batch, heads, q_len, kv_len]``; True (or any
        integer but 0) attends. The matrix is all the memory it costs; tiles are still skipped.

    >>> import numpy as np
    >>> from maskformer import masks
    >>> print(masks.dense(np.array([[1, 0, 1], [0, 1, 0]])).to_string(2, 3))
    █ · █
    · █ ·
    """
    return Dense(check_array("dense", "array", array, 2, "bool"))


@builder(fn="fn")
def predicate(fn: Callable[..., Any], *arrays: Any, batch_dims: int = 0) -> Mask:
    """Any function of one query position and one key position: FlexAttention's ``mask_mod``.

    ``fn(q, k, *arrays) -> bool`` is written for a single query and key, scalars. It is traced once; give arrays as
    arguments rather than closing over them, so that new values do not compile again, and define ``fn`` once
    rather than a fresh lambda in each step.

    Args:
      fn: the function, with ``& | ~`` and ``jnp.where`` in the place of ``and or not if``. Its tiles are classified by
        interval analysis; ``block_map(...).widened`` names the operations that the analysis knows nothing about,
        whose tiles are all visited.
      *arrays: what ``fn`` reads, as JAX arrays.
      batch_dims: 0 if all arrays are shared; 1 if each has ``[batch]`` in front, 2 for ``[batch, heads]`` (size 1
        broadcasts). ``fn`` sees them without.

    >>> import numpy as np
    >>> from maskformer import masks
    >>> print(masks.predicate(lambda q, k: (k - q) % 3 == 0).to_string(4, 4))
    █ · · █
    · █ · ·
    · · █ ·
    █ · · █
    >>> kind = np.array([0, 1, 1, 0])
    >>> print(masks.predicate(lambda q, k, kind: kind[q] >= kind[k], kind).to_string(4, 4))
    █ · · █
    █ █ █ █
    █ █ █ █
    █ · · █
    """
    if not callable(fn):
        raise ValueError(f"predicate takes a function of (q, k, *arrays); got {type(fn).__name__} {shown(fn)}")
    if type(batch_dims) is not int or batch_dims not in (0, 1, 2):
        raise ValueError(f"predicate: batch_dims={shown(batch_dims)}, expected 0, 1 or 2")
    arrays = tuple(_as_jax_would(index, array) for index, array in enumerate(arrays))
    _check_parameters(fn, len(arrays))
    ranks = tuple(np.ndim(array) - batch_dims for array in arrays)
    if min(ranks, default=0) < 0:
        raise ValueError(f"predicate: an array has fewer dimensions than batch_dims={batch_dims}")
    return Predicate(fn, arrays, ranks)


def _check_parameters(fn: Callable[..., Any], arrays: int) -> None:
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # of a function that is not Python's
        return
    try:
        signature.bind(*[None] * (2 + arrays))
    except TypeError as error:
        raise ValueError(
            f"predicate: fn is called with q, k and {arrays} array{'s' * (arrays != 1)}, and it takes "
            f"{shown(str(signature))[1:-1]}: {error}"
        ) from None


def _as_jax_would(index: int, value: Any) -> Any:
    """What the function will see of an argument: lists become arrays, 64 bits become 32 unless enabled."""
    name = f"arrays[{index}]"
    known = value if hasattr(value, "dtype") else as_array("predicate", name, value)
    kinds = (np.number, np.bool_, jax.dtypes.extended)
    if not any(jnp.issubdtype(known.dtype, kind) for kind in kinds):
        raise ValueError(f"predicate: {name} has dtype {known.dtype}, expected numbers")
    if isinstance(known, np.ndarray):
        known = canonical("predicate", name, known)
    return known if hasattr(value, "dtype") or isinstance(value, (list, tuple)) else value
