"""Words and other runs of tokens, described without compaction: a unit is named by its first position."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maskformer.objectives import randomness
from maskformer.objectives.rows import Row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Units:
    """A partition of the member positions of a row into contiguous runs; all fields `[length]`.

    Attributes:
      member: bool, the position belongs to a unit.
      start: bool, the position is the first of its unit.
      first: int32, the first position of the unit holding this one (members only).
      size: int32, number of tokens of the unit that starts here (0 elsewhere).
    """

    member: jax.Array
    start: jax.Array
    first: jax.Array
    size: jax.Array


def units_from_starts(member: jax.Array, start: jax.Array) -> Units:
    """Units that begin where `start` is True or a run of members begins, and end before the next one.

    >>> units = units_from_starts(jnp.array([0, 1, 1, 1, 0, 1], bool), jnp.array([0, 1, 0, 1, 0, 0], bool))
    >>> units.size.tolist()
    [0, 2, 0, 1, 0, 1]
    """
    length = member.shape[0]
    index = jnp.arange(length, dtype=jnp.int32)
    start = member & (start | ~jnp.concatenate([jnp.zeros(1, bool), member[:-1]]))
    first = jax.lax.cummax(jnp.where(start, index, 0))
    boundary = jnp.where(start | ~member, index, length)
    following = jax.lax.cummin(boundary, reverse=True)
    end = jnp.concatenate([following[1:], jnp.full(1, length, jnp.int32)])
    return Units(member, start, first, jnp.where(start, end - index, 0))


def segment_starts(row: Row) -> jax.Array:
    """bool `[length]`: the first position of each segment (and of the padding)."""
    return jnp.concatenate([jnp.ones(1, bool), row.segment_ids[1:] != row.segment_ids[:-1]])


def words(row: Row, member: jax.Array, alone: jax.Array | bool = False) -> Units:
    """Words among the member positions; those that are `alone` are words of their own.

    A row that opens in mid-word counts the rest of that word as a word.
    """
    start = row.word_starts | segment_starts(row)
    if not isinstance(alone, bool):
        start = start | alone | jnp.concatenate([jnp.zeros(1, bool), alone[:-1]])
    return units_from_starts(member, start)


def spread(units: Units, taken: jax.Array) -> jax.Array:
    """bool `[length]`: a decision made at the first position of each unit, given to all its positions."""
    return units.member & taken[units.first]


def take_in_random_order(random_bits: jax.Array, units: Units, room: jax.Array, skip: bool = True) -> jax.Array:
    """Whole units in random order until `room` tokens are full; bool at the first position of each taken unit.

    A unit that would overshoot is passed over and smaller ones later in the order may still fit (`skip`, BERT), or
    ends the walk. Equivalent to the loop over a shuffled list, in a handful of parallel rounds: in each round
    the longest prefix of still-fitting units is taken at once, and the first that no longer fits is passed over for
    good, since the room only shrinks.
    """
    length = units.start.shape[0]
    score = jnp.where(units.start, randomness.sortable(random_bits), 0.0)
    _, order = jax.lax.top_k(score, length)
    size = jnp.where(units.start, units.size, 0)[order]
    exists = units.start[order]

    def more(state):
        _, candidates, room = state
        return jnp.any(candidates & (size <= room))

    def round_of_taking(state):
        taken, candidates, room = state
        candidates &= size <= room
        total = jnp.cumsum(jnp.where(candidates, size, 0))
        fits = candidates & (total <= room)
        left = room - jnp.max(jnp.where(fits, total, 0), initial=0)
        return taken | fits, candidates & ~fits, left

    state = (jnp.zeros(length, bool), exists, room)
    if skip:
        taken, _, _ = jax.lax.while_loop(more, round_of_taking, state)
    else:
        taken = exists & (jnp.cumsum(size) <= room)
    return jnp.zeros(length, bool).at[order].set(taken)
