"""Who may attend to whom: predicates, their algebra, block maps and pictures."""

from maskformer.masks.arbitrary import Dense, Predicate, dense, predicate
from maskformer.masks.block_map import BlockMap, TileLists, block_map
from maskformer.masks.expression import And, Choice, Mask, Not, Or, PerHead, Shift, per_head, shift
from maskformer.masks.parse import MaskSyntaxError, parse
from maskformer.masks.positions import (
    Causal,
    Everything,
    Nothing,
    SlidingWindow,
    causal,
    everything,
    nothing,
    sliding_window,
)
from maskformer.masks.sequences import KeyPadding, Segments, key_padding, segments

__all__ = [name for name in dir() if not name.startswith("_")]
