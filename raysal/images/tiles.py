"""Large images in pieces: where tiles lie, how much each counts at each pixel, and their blending back into one answer.

Tiles of one size cover the image and overlap. In the middle of each overlap one tile fades into the next over a ramp; outside of the ramp a
pixel belongs to one tile alone, and a margin of every tile counts for nothing, as a network sees too little there. Weights sum to 1
at every pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np


@dataclass(frozen=True)
class Span:
    """A tile along one axis.

    Attributes:
        start, stop: The pixels that it sees.
        low, high: Those of them at which it counts.
        fades: Where it fades in from the tile before and out into the next one, in pixels; infinite where there is none.
        ramp: Pixels that a fade takes.
    """

    start: int
    stop: int
    low: int
    high: int
    fades: tuple[float, float] = (-math.inf, math.inf)
    ramp: int = 1

    @property
    def seen(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def weight(self) -> np.ndarray:
        """float32 [stop - start] in [0, 1]; above 0 from low to high. Made anew each time: a line of pixels has very many tiles."""
        return _weight(self.start, self.stop, self.fades, self.ramp)


def _weight(start: int, stop: int, fades: tuple[float, float], ramp: int) -> np.ndarray:
    x = np.arange(start, stop) + 0.5
    rise, fall = (np.clip((x - middle) / ramp + 0.5, 0, 1) for middle in fades)
    weight: np.ndarray = (rise * (1 - fall)).astype(np.float32)
    return weight


def spans(length: int, side: int, overlap: int) -> list[Span]:
    """Tiles along one axis: as few as overlap by so many pixels, spread evenly; one alone where a side holds the whole length.

    Raises:
        ValueError: The side is shorter than three overlaps: then more than two tiles would meet at a pixel.
    """
    if side < 3 * overlap or overlap < 4:
        raise ValueError(f"tiles of {side} px can't overlap by {overlap} px; at least 4 px, at most a third of the side")
    if length <= side:
        return [Span(0, length, 0, length)]
    n = math.ceil((length - overlap) / (side - overlap))
    starts = [round(k * (length - side) / (n - 1)) for k in range(n)]
    ramp = overlap // 4
    middles = [(a + side + b) / 2 for a, b in pairwise(starts)]
    found = []
    for start, fades in zip(starts, pairwise([-math.inf, *middles, math.inf]), strict=True):
        counts = np.flatnonzero(_weight(start, start + side, fades, ramp))
        found.append(Span(start, start + side, start + int(counts[0]), start + int(counts[-1]) + 1, fades, ramp))
    return found


@dataclass(frozen=True)
class Tile:
    """One tile of an image, across both axes."""

    rows: Span
    cols: Span

    def of(self, image: np.ndarray) -> np.ndarray:
        """Its pixels of an array [H, W, ...], contiguous."""
        return np.ascontiguousarray(image[self.rows.seen, self.cols.seen])

    @property
    def weight_HW(self) -> np.ndarray:
        """float32: how much it counts at each of its pixels."""
        weight_HW: np.ndarray = self.rows.weight[:, None] * self.cols.weight
        return weight_HW


@dataclass(frozen=True)
class Grid:
    """The tiles of an image, all of one size."""

    rows: Sequence[Span]
    cols: Sequence[Span]

    @classmethod
    def over(cls, size_HW: tuple[int, int], side: int, overlap: int) -> Grid:
        """Tiles of at most side x side pixels over an image; see `spans`."""
        height, width = size_HW
        return cls(spans(height, side, overlap), spans(width, side, overlap))

    def tiles(self) -> Iterator[Tile]:
        """Row by row."""
        return (Tile(rows, cols) for rows, cols in product(self.rows, self.cols))

    def blend(self, values: Iterable[np.ndarray]) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Joins what was computed on each tile.

        Memory holds a tile and one overlap as wide as the image, whatever the image's height.

        Args:
            values: float32 [C, h, w] of each tile, in the order of `tiles`.

        Yields:
            Rows and columns of the image, and its blended values [C, rows, columns] there; together they cover it once.
        """
        given, width = iter(values), self.cols[-1].stop
        above: np.ndarray | None = None  # what the last row of tiles adds to the first lines of this one
        for i, rows in enumerate(self.rows):
            ends = self.rows[i + 1].low if i + 1 < len(self.rows) else rows.high
            below: np.ndarray | None = None
            left: np.ndarray | None = None  # what the last tile adds to the first columns of this one
            for j, cols in enumerate(self.cols):
                stops = self.cols[j + 1].low if j + 1 < len(self.cols) else cols.high
                part_Chw = next(given) * Tile(rows, cols).weight_HW
                part_Chw = part_Chw[:, rows.low - rows.start : rows.high - rows.start, cols.low - cols.start : cols.high - cols.start]
                if left is not None:
                    part_Chw[:, :, : left.shape[2]] += left
                left, part_Chw = part_Chw[:, :, stops - cols.low :].copy(), part_Chw[:, :, : stops - cols.low]
                if above is not None:
                    part_Chw[:, : above.shape[1]] += above[:, :, cols.low : stops]
                if below is None:
                    below = np.empty((len(part_Chw), rows.high - ends, width), np.float32)
                below[:, :, cols.low : stops] = part_Chw[:, ends - rows.low :]
                yield slice(rows.low, ends), slice(cols.low, stops), part_Chw[:, : ends - rows.low]
            above = below
