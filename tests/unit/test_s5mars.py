"""S5Mars: both published layouts, presets of the published sizes, split files."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from raysal.archive.uris import absolute
from raysal.datasets import s5mars
from raysal.errors import DataError
from raysal.images.masks import encode_mask
from raysal.labels import IGNORE, S5MARS
from tests.unit.layouts import config, names, put, put_json


@pytest.mark.parametrize(
    "layout",
    [
        ("images/{}.jpg", "labels/{}.png"),
        ("Final/images/{}.jpg", "Final/labels/{}.png"),
        ("Images/{}.JPG", "Masks/{}.png"),
    ],
)
def test_s5mars_flat_layouts(root: str, layout: tuple[str, str]) -> None:
    image, mask = layout
    put(root, *(image.format(i) for i in range(20)), *(mask.format(i) for i in range(20)))
    dataset = s5mars.read(config("s5mars", root))
    found = [i for items in dataset.splits.values() for i in items]
    assert {i.name for i in found} == {str(i) for i in range(20)} and len(found) == 20
    at = absolute(root)
    assert all(i.image == f"{at}/{image.format(i.name)}" and i.mask == f"{at}/{mask.format(i.name)}" for i in found)
    assert dataset.label_set == S5MARS


@pytest.mark.parametrize(("image", "mask"), [("images/{}.jpg", "labels/{}.png"), ("images/{}.jpg", "masks/{}.png"), ("{}.jpg", "{}.png")])
@pytest.mark.parametrize("shared_stems", [False, True])
def test_s5mars_easy_and_hard(root: str, image: str, mask: str, shared_stems: bool) -> None:
    for part, first in (("easy", 0), ("hard", 0 if shared_stems else 10)):
        for stem in range(first, first + 10):
            put(root, f"{part}/{image.format(stem)}", f"{part}/{mask.format(stem)}")
    found = {i.name: i for items in s5mars.read(config("s5mars", root)).splits.values() for i in items}
    assert len(found) == 20
    name, at = ("hard/3" if shared_stems else "13"), absolute(root)
    assert found[name].image == f"{at}/hard/{image.format(name[-1] if shared_stems else name)}"
    assert found[name].mask == f"{at}/hard/{mask.format(name[-1] if shared_stems else name)}"


def test_half_of_s5mars_is_said(root: str, caplog: pytest.LogCaptureFixture) -> None:
    put(root, *(f"easy/images/{i}.jpg" for i in range(9)), *(f"easy/labels/{i}.png" for i in range(9)))
    with caplog.at_level(logging.WARNING):
        s5mars.read(config("s5mars", root))
    assert "only easy of easy and hard" in caplog.text and "here are 9" in caplog.text


def test_s5mars_elsewhere_says_what_was_looked_for(root: str) -> None:
    put(root, "pictures/a.jpg", "images/b.jpg")
    with pytest.raises(DataError, match=r"it holds images, pictures\); looked for images/.*labels/.*in Final/, in easy/ and in hard/"):
        s5mars.read(config("s5mars", root))


@pytest.mark.parametrize(
    ("preset", "sizes"), [("5400", (5400, 600, 600)), ("5000/200/800", (5000, 200, 800)), ("5000/500/500", (5000, 500, 500))]
)
def test_presets_have_the_published_sizes_and_nest(preset: str, sizes: tuple[int, int, int]) -> None:
    stems = [f"{i:04d}" for i in range(6000)]
    cut = s5mars.preset_split(stems, preset)
    assert tuple(len(cut[s]) for s in ("train", "val", "test")) == sizes
    assert (cut["val"] == cut["test"]) == (preset == "5400")
    assert sorted({*cut["train"], *cut["val"], *cut["test"]}) == stems
    assert not set(cut["train"]) & {*cut["val"], *cut["test"]}
    assert set(cut["test"]) <= set(s5mars.preset_split(stems, "5000/200/800")["test"])
    assert cut == s5mars.preset_split(stems[::-1], preset)


@given(st.integers(3, 300), st.sampled_from(sorted(s5mars.PRESETS)))
def test_presets_of_fewer_images_keep_their_proportions(n: int, preset: str) -> None:
    cut = s5mars.preset_split([f"x{i}" for i in range(n)], preset)
    _, val, test = s5mars.PRESETS[preset]
    assert abs(len(cut["test"]) - n * test / 6000) <= 1
    assert cut["train"] and cut["val"] and cut["test"]
    assert len(cut["train"]) + len(cut["test"]) + (len(cut["val"]) if val else 0) == n


def test_two_images_are_no_s5mars(root: str) -> None:
    put(root, "images/a.jpg", "labels/a.png", "images/b.jpg", "labels/b.png")
    with pytest.raises(DataError, match="2 images can't be split"):
        s5mars.read(config("s5mars", root))


@pytest.fixture
def twenty(root: str) -> str:
    put(root, *(f"Final/images/{i}.jpg" for i in range(20)), *(f"Final/labels/{i}.png" for i in range(20)))
    return root


@pytest.mark.parametrize("where", ["", "Final/"])
def test_the_authors_lists_win_keep_their_order_and_leave_the_rest_to_val(
    twenty: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    put_json(twenty, where + "new_train_random.json", ["7", "3", "11"])
    put_json(twenty, where + "new_test_random.json", ["0", "1"])
    cut = names(s5mars.read(config("s5mars", twenty)))
    assert cut["train"] == ["7", "3", "11"] and cut["test"] == ["0", "1"]
    assert cut["val"] == sorted({str(i) for i in range(20)} - {"7", "3", "11", "0", "1"})
    assert "3 training images, not the preset's" in caplog.text


def test_lists_without_a_rest_make_val_the_test_set(twenty: str) -> None:
    put_json(twenty, "new_train_random.json", [str(i) for i in range(15)])
    put_json(twenty, "new_test_random.json", [str(i) for i in range(15, 20)])
    cut = names(s5mars.read(config("s5mars", twenty)))
    assert cut["val"] == cut["test"] and len(cut["test"]) == 5


def test_a_split_file_of_ones_own_wins_over_all(twenty: str) -> None:
    put_json(twenty, "new_train_random.json", ["7"])
    put_json(twenty, "splits.json", {"train": ["4", "2"], "test": ["9"]})
    assert names(s5mars.read(config("s5mars", twenty))) == {"train": ["4", "2"], "test": ["9"], "val": ["9"]}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"new_train_random.json": ["1"]}, r"new_test_random\.json is missing beside the other list"),
        (
            {"new_train_random.json": ["99"], "new_test_random.json": ["1"]},
            r"train_random\.json: names 1 of 1 images that are not there: 99",
        ),
        ({"new_train_random.json": {"a": 1}, "new_test_random.json": ["1"]}, "expected a list"),
        ({"splits.json": {"train": ["1"]}}, r"val or test may be missing"),
        ({"splits.json": {"train": ["1"], "val": ["77"]}}, "not there: 77"),
    ],
)
def test_split_files_that_do_not_fit_are_refused(twenty: str, files: dict[str, object], words: str) -> None:
    for name, value in files.items():
        put_json(twenty, name, value)
    with pytest.raises(DataError, match=words):
        s5mars.read(config("s5mars", twenty))


def test_s5mars_values_become_ids_and_null_becomes_ignore(tmp_path: Path) -> None:
    values_HW = np.arange(12, dtype=np.uint8).clip(0, 9).reshape(3, 4)
    for i in range(4):
        put(str(tmp_path), f"images/{i}.jpg", f"labels/{i}.png", data=encode_mask(values_HW))
    dataset = s5mars.read(config("s5mars", str(tmp_path)))
    mask_HW = dataset.mask(dataset.split("test")[0], (3, 4))
    np.testing.assert_array_equal(mask_HW.reshape(-1), [IGNORE, *range(9), 8, 8])
