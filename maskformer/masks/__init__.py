"""Who may attend to whom: predicates, their algebra, block maps and pictures.

>>> from maskformer import masks
>>> mask = masks.causal() & (masks.sliding_window(2) | masks.sinks(1))
>>> mask
causal & (sliding_window(2) | sinks(1))
>>> mask == masks.parse("causal & (window(2) | sinks(1))")
True
"""

from maskformer.masks.arbitrary import Dense, Predicate, dense, predicate
from maskformer.masks.block_map import BlockMap, block_map
from maskformer.masks.builders import builder
from maskformer.masks.composites import Choice, PerHead, Shift, per_head, shift
from maskformer.masks.draw import draw, picture
from maskformer.masks.expression import And, Mask, Not, Or
from maskformer.masks.graphs import Graph, Tree, bigbird, graph, longformer, random_blocks, tree
from maskformer.masks.grids import Neighborhood, Tiles, neighborhood, tiles
from maskformer.masks.parse import MaskSyntaxError, Unbound, parse
from maskformer.masks.positions import (
    BlockDiffusion,
    Causal,
    Chunked,
    DilatedWindow,
    Everything,
    Nothing,
    Sinks,
    SlidingWindow,
    Strided,
    block_diffusion,
    causal,
    chunked,
    dilated_window,
    everything,
    nothing,
    sinks,
    sliding_window,
    strided,
)
from maskformer.masks.ranges import (
    BlockDiagonal,
    KeyRanges,
    QueryRanges,
    block_diagonal,
    key_ranges,
    query_ranges,
)
from maskformer.masks.sequences import (
    Documents,
    GlobalTokens,
    KeyPadding,
    Prefix,
    QueryPadding,
    Segments,
    SharedPrefix,
    ToLastImage,
    documents,
    global_tokens,
    key_padding,
    prefix,
    query_padding,
    segments,
    shared_prefix,
    to_last_image,
)
from maskformer.masks.tile_lists import Band, TileLists

__all__ = [
    "And",
    "Band",
    "BlockDiagonal",
    "BlockDiffusion",
    "BlockMap",
    "Causal",
    "Choice",
    "Chunked",
    "Dense",
    "DilatedWindow",
    "Documents",
    "Everything",
    "GlobalTokens",
    "Graph",
    "KeyPadding",
    "KeyRanges",
    "Mask",
    "MaskSyntaxError",
    "Neighborhood",
    "Not",
    "Nothing",
    "Or",
    "PerHead",
    "Predicate",
    "Prefix",
    "QueryPadding",
    "QueryRanges",
    "Segments",
    "SharedPrefix",
    "Shift",
    "Sinks",
    "SlidingWindow",
    "Strided",
    "TileLists",
    "Tiles",
    "ToLastImage",
    "Tree",
    "Unbound",
    "bigbird",
    "block_diagonal",
    "block_diffusion",
    "block_map",
    "builder",
    "causal",
    "chunked",
    "dense",
    "dilated_window",
    "documents",
    "draw",
    "everything",
    "global_tokens",
    "graph",
    "key_padding",
    "key_ranges",
    "longformer",
    "neighborhood",
    "nothing",
    "parse",
    "per_head",
    "picture",
    "predicate",
    "prefix",
    "query_padding",
    "query_ranges",
    "random_blocks",
    "segments",
    "shared_prefix",
    "shift",
    "sinks",
    "sliding_window",
    "strided",
    "tiles",
    "to_last_image",
    "tree",
]
