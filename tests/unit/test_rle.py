"""Run-length codes are those of the tools' own libraries, for any mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from raysal.images.rle import brush_rle, coco_rle

coco = pytest.importorskip("pycocotools.mask")
brush = pytest.importorskip("label_studio_converter.brush")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools with newer numpy

insides = arrays(np.bool_, st.tuples(st.integers(1, 20), st.integers(1, 20)))


@settings(deadline=None)
@given(insides)
def test_coco_decodes_every_mask_and_agrees_on_area_and_box(inside_HW: np.ndarray) -> None:
    found = coco_rle(inside_HW)
    np.testing.assert_array_equal(coco.decode(found["segmentation"]), inside_HW)
    assert found["area"] == inside_HW.sum()
    y, x = np.nonzero(inside_HW)
    tight = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1] if x.size else [0, 0, 0, 0]
    assert found["bbox"] == tight


@settings(deadline=None)
@given(insides)
def test_label_studio_decodes_every_mask(inside_HW: np.ndarray) -> None:
    rgba = brush.decode_rle(brush_rle(inside_HW)).reshape(*inside_HW.shape, 4)
    np.testing.assert_array_equal(rgba, np.where(inside_HW, 255, 0)[:, :, None].repeat(4, 2))


@settings(deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4, 5, 63, 64, 65, 16383, 16384, 16385, 40000]), min_size=1, max_size=6), st.booleans())
def test_label_studio_decodes_runs_about_every_length_that_its_code_changes_at(lengths: list[int], first: bool) -> None:
    flags = (np.arange(len(lengths)) + first) % 2 == 0
    inside_HW = np.repeat(flags, lengths)[None]
    np.testing.assert_array_equal(brush.decode_rle(brush_rle(inside_HW))[3::4], np.where(inside_HW[0], 255, 0))


def test_the_brush_code_is_label_studios_own_to_the_byte() -> None:
    """But for the whole byte of padding that its encoder adds where none is needed."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        inside_HW = rng.random((13, 17)).repeat(5, 0).repeat(3, 1) < 0.5
        theirs = bytes(brush.mask2rle(np.where(inside_HW, 255, 0).astype(np.uint8)))
        ours = brush_rle(inside_HW)
        assert theirs in (ours, ours + b"\0")
