"""Masks of images and videos: positions that stand for points of a grid."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from maskformer.checks import shown
from maskformer.masks.builder_arguments import LARGEST, whole_numbers
from maskformer.masks.builders import builder
from maskformer.masks.expression import Mask, leaf


@leaf()
class Neighborhood(Mask):
    """The ``kernel`` nearest points of a grid, ``dilation`` apart, moved inwards at its edges, or ``causal``.

    Positions run over the grid row by row, or ``tile`` by tile and row by row within.
    """

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    tile: tuple[int, ...] | None = None

    def attend(self, q: Any, k: Any) -> Any:
        seen = _inside(q, self.grid) & _inside(k, self.grid)
        points = (_points(position, self.grid, self.tile) for position in (q, k))
        axes = zip(*points, self.grid, self.kernel, self.dilation, self.causal)
        for q_at, k_at, size, kernel, dilation, causal in axes:
            if dilation > 1:
                # Points a multiple of the dilation apart form a grid of their own.
                seen = seen & (q_at % dilation == k_at % dilation)
                size = (size - q_at % dilation + dilation - 1) // dilation
                q_at, k_at = q_at // dilation, k_at // dilation
            first = q_at - (kernel - 1) if causal else jnp.clip(q_at - kernel // 2, 0, size - kernel)
            seen = seen & (k_at >= first) & (k_at < first + kernel)
        return seen


@leaf()
class Tiles(Mask):
    """Tiles of a grid, each tile's points together in the sequence, see the ``window`` tiles around their own."""

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    window: tuple[int, ...]

    def attend(self, q: Any, k: Any) -> Any:
        tiles = tuple(size // tile for size, tile in zip(self.grid, self.tile))
        per_tile = math.prod(self.tile)
        seen = _inside(q, self.grid) & _inside(k, self.grid)
        axes = zip(_coordinates(q // per_tile, tiles), _coordinates(k // per_tile, tiles), tiles, self.window)
        for q_at, k_at, size, window in axes:
            first = jnp.clip(q_at - window // 2, 0, size - window)
            seen = seen & (k_at >= first) & (k_at < first + window)
        return seen


def _inside(position: Any, grid: tuple[int, ...]) -> Any:
    return (position >= 0) & (position < math.prod(grid))


def _coordinates(position: Any, grid: tuple[int, ...]) -> list[Any]:
    """Row-major coordinates of a position, one array per axis."""
    return [position // math.prod(grid[axis + 1 :]) % grid[axis] for axis in range(len(grid))]


def _points(position: Any, grid: tuple[int, ...], tile: tuple[int, ...] | None) -> list[Any]:
    """Coordinates of a position, the sequence going through the grid by rows or by tiles."""
    if tile is None:
        return _coordinates(position, grid)
    tiles, within = tuple(size // side for size, side in zip(grid, tile)), math.prod(tile)
    corners, offsets = _coordinates(position // within, tiles), _coordinates(position % within, tile)
    return [corner * side + offset for corner, side, offset in zip(corners, tile, offsets)]


@builder("natten")
def neighborhood(
    grid: tuple[int, ...],
    kernel: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    tile: tuple[int, ...] | None = None,
) -> Mask:
    """Neighborhood attention (arXiv:2204.07143) on a grid of any number of dimensions; NATTEN's conventions.

    Every point sees exactly ``kernel`` points along each axis: the ones around it (one more before than after, if
    even), or the nearest that fit at an edge. Positions past the grid see nothing and are not seen; join text or
    class tokens with ``| global_tokens(...)``.

    Args:
      grid: points along each axis, e.g. ``(height, width)``.
      kernel: at most the axis; one int, or one per axis.
      dilation: distance between the points seen; one int, or one per axis.
      causal: along such an axis a point sees itself and the ``kernel - 1`` before it, fewer at the edge.
      tile: the sequence holds the grid tile by tile (multiples of the tile along each axis) and not row by row.
        Neighbours then lie closer together, so that fewer blocks are visited.

    The point in the middle of a 4 x 4 image, and the one in its corner:

    >>> import numpy as np
    >>> from maskformer import masks
    >>> mask = masks.neighborhood((4, 4), 3)
    >>> for point in (10, 0):
    ...     print(np.asarray(mask.dense(16, 16))[point].reshape(4, 4).astype(int))
    [[0 0 0 0]
     [0 1 1 1]
     [0 1 1 1]
     [0 1 1 1]]
    [[1 1 1 0]
     [1 1 1 0]
     [1 1 1 0]
     [0 0 0 0]]
    >>> print(masks.neighborhood((5,), 3).to_string(5, 5))
    █ █ █ · ·
    █ █ █ · ·
    · █ █ █ ·
    · · █ █ █
    · · █ █ █
    """
    grid = _grid("neighborhood", grid)
    kernels = _per_axis("neighborhood", "kernel", kernel, grid)
    dilations = _per_axis("neighborhood", "dilation", dilation, grid)
    causals = tuple(causal) if isinstance(causal, (tuple, list)) else (causal,) * len(grid)
    if len(causals) != len(grid) or not all(isinstance(flag, bool) for flag in causals):
        raise ValueError(f"neighborhood: causal={shown(causal)}, expected one bool, or {len(grid)} as in grid={grid}")
    if any(width * step > size for size, width, step in zip(grid, kernels, dilations)):
        raise ValueError(
            f"neighborhood: kernel={shown(kernel)} with dilation={shown(dilation)} on grid={shown(grid)}; expected "
            "kernel * dilation <= size along each axis"
        )
    if tile is not None:
        tile = _per_axis("neighborhood", "tile", tile, grid)
        if any(size % side for size, side in zip(grid, tile)):
            raise ValueError(f"neighborhood: grid={shown(grid)} is not a multiple of tile={tile} along each axis")
    return Neighborhood(grid, kernels, dilations, causals, tile)


@builder("sliding_tiles")
def tiles(grid: tuple[int, ...], tile: tuple[int, ...], window: int | tuple[int, ...]) -> Mask:
    """Sliding tile attention (STA, arXiv:2502.04507) in two, three or any number of dimensions.

    The sequence holds the grid tile by tile (the points of one tile side by side), so that a tile is a run of
    ``prod(tile)`` positions and the mask is made of whole blocks. Each tile sees the ``window`` tiles around it
    (one more before than after, if even), moved inwards at the edges. Positions past the grid see nothing and are
    not seen; join text with ``| global_tokens(...)``.

    Args:
      grid: points along each axis, multiples of ``tile``.
      tile: points of one tile along each axis.
      window: tiles seen along each axis; one int, or one per axis.

    >>> from maskformer import masks
    >>> print(masks.tiles((2, 8), (1, 2), (1, 3)).to_string(16, 16))
    █ █ █ █ █ █ · · · · · · · · · ·
    █ █ █ █ █ █ · · · · · · · · · ·
    █ █ █ █ █ █ · · · · · · · · · ·
    █ █ █ █ █ █ · · · · · · · · · ·
    · · █ █ █ █ █ █ · · · · · · · ·
    · · █ █ █ █ █ █ · · · · · · · ·
    · · █ █ █ █ █ █ · · · · · · · ·
    · · █ █ █ █ █ █ · · · · · · · ·
    · · · · · · · · █ █ █ █ █ █ · ·
    · · · · · · · · █ █ █ █ █ █ · ·
    · · · · · · · · █ █ █ █ █ █ · ·
    · · · · · · · · █ █ █ █ █ █ · ·
    · · · · · · · · · · █ █ █ █ █ █
    · · · · · · · · · · █ █ █ █ █ █
    · · · · · · · · · · █ █ █ █ █ █
    · · · · · · · · · · █ █ █ █ █ █
    """
    grid = _grid("tiles", grid)
    tile = _per_axis("tiles", "tile", tile, grid)
    windows = _per_axis("tiles", "window", window, grid)
    for size, width, count in zip(grid, tile, windows):
        if size % width or count > size // width:
            raise ValueError(
                f"tiles: grid={shown(grid)}, tile={shown(tile)}, window={shown(window)}; expected sizes that are "
                "multiples of the tile and a window of at most the number of tiles, along each axis"
            )
    return Tiles(grid, tile, windows)


def _grid(builder_name: str, grid: Any) -> tuple[int, ...]:
    sizes = whole_numbers(builder_name, "grid", grid, 1)
    if math.prod(sizes) > LARGEST:
        raise ValueError(f"{builder_name}: grid={shown(grid)}, expected at most {LARGEST} points")
    return sizes


def _per_axis(builder_name: str, name: str, value: Any, grid: tuple[int, ...]) -> tuple[int, ...]:
    values = value if isinstance(value, (tuple, list)) else (value,) * len(grid)
    if len(values) != len(grid):
        raise ValueError(f"{builder_name}: {name}={shown(value)}, expected one int, or {len(grid)} as in grid={grid}")
    return whole_numbers(builder_name, name, tuple(values), 1)
