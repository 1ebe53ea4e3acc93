"""Parts of the report by themselves: pictures, figures, words and numbers from files."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib.figure import Figure
from PIL import Image

from raysal.labels import IGNORE, S5MARS
from raysal.report import figures
from raysal.report.asked import reasons
from raysal.report.pictures import heat, mask_uri, overlay, shrink
from raysal.report.theme import DARK, LIGHT, readable_on
from raysal.words import duration, number


def test_a_mask_on_the_page_keeps_every_class_id() -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16) % 9
    mask[0, 0] = IGNORE
    data = base64.b64decode(mask_uri(mask, S5MARS).partition(",")[2])
    with Image.open(io.BytesIO(data)) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), S5MARS.colorize(mask))


def test_an_overlay_tints_classes_and_greys_what_was_left_open() -> None:
    photo = np.full((2, 2, 3), (200, 100, 0), dtype=np.uint8)
    drawn = overlay(photo, np.array([[0, 8], [IGNORE, 0]], dtype=np.uint8), S5MARS, 0.5)
    assert drawn[0, 0].tolist() == [(200 + 107) // 2, (100 + 142) // 2, 35 // 2]
    assert drawn[1, 0].tolist() == [60, 60, 60]


def test_heat_runs_from_dark_to_bright() -> None:
    drawn = heat(np.array([[0.0, 0.25, 0.5, 9.0, np.nan]]), 0.5).astype(int).sum(axis=2)[0]
    assert drawn[0] < drawn[1] < drawn[2] == drawn[3]
    assert drawn[4] == drawn[0]


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 300))
def test_shrinking_keeps_to_the_side_and_to_the_classes(height: int, width: int, side: int) -> None:
    mask = (np.arange(height * width) % 5).astype(np.uint8).reshape(height, width)
    small = shrink(mask, side, smooth=False)
    assert max(small.shape) <= max(side, 1) or small.shape == mask.shape
    assert set(np.unique(small)) <= set(range(5))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "under 1 s"), (5.25, "5.2 s"), (9.97, "10 s"), (59.4, "59 s"), (724, "12 min 4 s"), (12_000, "3 h 20 min"), (None, "–")],
)
def test_times_are_said_as_people_say_them(seconds: float | None, said: str) -> None:
    assert duration(seconds) == said


@settings(deadline=None)
@given(st.one_of(st.none(), st.text(), st.booleans(), st.lists(st.integers()), st.floats(), st.integers(), st.just(10**400)))
def test_a_number_from_a_file_is_finite_or_no_number(value: object) -> None:
    found = number(value)
    assert math.isnan(found) or (math.isfinite(found) and found == float(value))  # type: ignore[arg-type]


def test_reasons_are_read_from_maps_however_they_arrive() -> None:
    assert reasons({"reasons": [("entropy", 0.5), ("nothing", None)]}) == [("entropy", 0.5)]
    assert reasons({"reasons": {"entropy": 0.5}}) == [("entropy", 0.5)]
    assert reasons({}) == []


def label_texts(fig: Figure) -> str:
    return " ".join(str(t.get_text()) for ax in fig.axes for t in (*ax.texts, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()))


@settings(deadline=None, max_examples=20)
@given(rounds=st.integers(1, 12), full=st.sampled_from([None, 0.8]))
def test_the_learning_curve_names_both_axes_and_full_supervision(rounds: int, full: float | None) -> None:
    labels = 16.0 * np.arange(1, rounds + 1)
    fig = figures.learning_curve(labels, np.linspace(0.1, 0.7, rounds), 400, full, LIGHT)
    ax = fig.axes[0]
    assert "labels bought" in ax.get_xlabel()
    assert "mIoU (%)" in ax.get_ylabel()
    assert ("full supervision 80.0" in label_texts(fig)) == bool(full)
    assert np.asarray(ax.lines[0].get_ydata())[-1] == pytest.approx(70.0 if rounds > 1 else 10.0)
    assert bool(ax.child_axes) == bool(full)


def test_heat_maps_write_each_number_and_say_where_there_is_none() -> None:
    fig = figures.class_iou(["0", "1"], ("sky", "soil"), ((0, 0, 0), (255, 255, 255)), np.array([[0.5, np.nan], [0.754, 0.001]]), DARK)
    assert [t.get_text() for t in fig.axes[0].texts] == ["50", "75", "n/a", "0"]
    fig = figures.confusion(("sky", "soil"), ((0, 0, 0), (255, 255, 255)), np.array([[3, 1], [0, 0]]), DARK)
    assert [t.get_text() for t in fig.axes[0].texts] == ["75", "25", "n/a", "n/a"]


@settings(deadline=None)
@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_numbers_in_cells_stand_out_from_them(rgb: tuple[int, int, int]) -> None:
    def luminance(channels: np.ndarray) -> float:
        return float(np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    text = 1.0 if readable_on((rgb[0] / 255, rgb[1] / 255, rgb[2] / 255)) == "#ffffff" else 0.0056
    high, low = sorted([text, luminance(np.array(rgb) / 255)], reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 4
