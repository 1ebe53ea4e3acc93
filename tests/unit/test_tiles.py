"""Tiles cover an image once, fade into each other, and what a local network says in tiles is what it says of the whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from raysal.images.tiles import Grid, spans

SIDES = st.integers(4, 40).flatmap(lambda overlap: st.tuples(st.integers(3 * overlap, 5 * overlap + 7), st.just(overlap)))


@given(length=st.integers(1, 2000), shape=SIDES)
@settings(max_examples=300, deadline=None)
def test_weights_sum_to_1_at_every_pixel_and_no_three_tiles_meet(length: int, shape: tuple[int, int]) -> None:
    side, overlap = shape
    found = spans(length, side, overlap)
    total, tiles = np.zeros(length), np.zeros(length, int)
    for span in found:
        assert 0 <= span.start <= span.low < span.high <= span.stop <= length and len(span.weight) == span.stop - span.start
        total[span.seen] += span.weight
        tiles[span.low : span.high] += 1
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert tiles.min() == 1 and tiles.max() <= 2
    assert len({len(s.weight) for s in found}) == 1, "tiles of one size: one compiled shape"
    for a, b in pairwise(found):
        assert a.stop - b.start >= overlap - 1, "rounding may take one pixel"
        # A pixel that counts lies some way inside of its tile, but at the image's own edges.
        assert a.stop - a.high >= (overlap - 1) // 2 - overlap // 8 - 1 and b.low - b.start >= (overlap - 1) // 2 - overlap // 8 - 1


@pytest.mark.parametrize(("side", "overlap"), [(10, 4), (100, 34), (12, 3)])
def test_tiles_that_would_meet_three_at_a_time_are_refused(side: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        spans(100, side, overlap)


@given(size=st.tuples(st.integers(1, 90), st.integers(1, 90)), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_blending_values_that_do_not_depend_on_the_tile_gives_them_back(size: tuple[int, int], seed: int) -> None:
    whole = np.random.default_rng(seed).random((3, *size)).astype(np.float32)
    grid = Grid.over(size, 24, 8)
    seen = np.zeros(size, int)
    for rows, cols, part in grid.blend(np.ascontiguousarray(whole[:, t.rows.seen, t.cols.seen]) for t in grid.tiles()):
        seen[rows, cols] += 1
        np.testing.assert_allclose(part, whole[:, rows, cols], atol=1e-6)
    assert (seen == 1).all(), "every pixel is given once"


def test_a_step_between_tiles_becomes_a_ramp() -> None:
    grid = Grid.over((24, 40), 24, 8)
    line = np.zeros(40)
    for _, cols, part in grid.blend(np.full((1, 24, 24), float(k), np.float32) for k, _ in enumerate(grid.tiles())):
        line[cols] = part[0, 0]
    assert (np.diff(line) >= 0).all() and line[0] == 0 and line[-1] == 1
    assert 0 < np.diff(line).max() <= 0.5 and 2 <= (np.diff(line) > 0).sum() <= 3


def test_memory_of_blending_does_not_grow_with_the_height() -> None:
    import tracemalloc

    def peak(height: int) -> int:
        grid = Grid.over((height, 300), 96, 32)
        tracemalloc.start()
        for _ in grid.blend(np.zeros((4, 96, 96), np.float32) for _ in grid.tiles()):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(9600) < 1.5 * peak(960)
