"""Building a data set from a configuration, and checking it before long work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from raysal.archive.uris import open_fs
from raysal.datasets import folder
from raysal.datasets.base import Dataset
from raysal.datasets.build import build, check, class_pixels
from raysal.errors import DataError
from raysal.images.masks import encode_mask
from raysal.labels import IGNORE, S5MARS
from tests.unit.layouts import config, names, put, put_folder, put_json


@given(st.integers(2, 12), st.data())
def test_class_pixels_count_each_class(n: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.one_of(st.integers(0, n - 1), st.just(IGNORE)), min_size=1, max_size=50))
    counts_C = class_pixels(np.array([values], np.uint8), n)
    assert counts_C.dtype == np.int64 and counts_C.tolist() == [values.count(c) for c in range(n)]


def test_build_reads_what_the_configuration_names(root: str) -> None:
    put_folder(root)
    assert names(build(config("folder", root, max_pixels=77), "unused")) == {"train": ["a", "b"], "val": ["c"]}
    assert build(config("folder", root, max_pixels=77), "unused").max_pixels == 77


def test_synthetic_scenes_are_made_once_and_never_mixed(tmp_path: Path) -> None:
    pytest.importorskip("raysal.datasets.synthetic")
    small = config("synthetic", None, synthetic={"images": 3, "val_images": 2, "size_px": 32, "seed": 5})
    first = build(small, str(tmp_path))
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = build(small, str(tmp_path))
    assert first == again and first.name == "synthetic" and times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert {s: len(i) for s, i in first.splits.items()} == {"train": 3, "val": 2}
    assert first.label_set.classes == S5MARS.classes
    check(first, ["train", "val"])
    with pytest.raises(DataError, match="holds synthetic scenes made with"):
        build(small.model_copy(update={"synthetic": small.synthetic.model_copy(update={"seed": 6})}), str(tmp_path))


def mixed(root: str) -> Dataset:
    """Two classes in train, one in val, nothing wrong."""
    put_folder(root, ["a", "b"], ["c", "d"])
    put(root, "masks/a.png", "masks/b.png", data=encode_mask(np.array([[0, 1], [1, 255]], np.uint8)))
    return folder.read(config("folder", root))


def test_a_sound_data_set_has_only_true_warnings(root: str) -> None:
    assert check(mixed(root), ["train", "val"]) == ["class 'rock' appears in no mask of split 'val'"]


@pytest.mark.parametrize(
    ("path", "data", "words"),
    [
        ("masks/c.png", b"<html>", r"mask .*masks/c\.png: not a PNG or TIFF"),
        ("masks/c.png", encode_mask(np.zeros((2, 3), np.uint8)), r"masks/c\.png: mask is 3 x 2, its image 2 x 2"),
        ("masks/c.png", encode_mask(np.full((2, 2), 7, np.uint8)), r"masks/c\.png: mask values \[7\] are not in label set"),
        ("images/c.png", b"", r"images/c\.png: the file is empty"),
    ],
)
def test_check_names_what_is_wrong_with_a_val_image(root: str, path: str, data: bytes, words: str) -> None:
    dataset = mixed(root)
    put(root, path, data=data)
    with pytest.raises(DataError, match=words):
        check(dataset, ["train", "val"])
    assert check(dataset, ["train"]) == []


def test_check_lists_five_problems_and_counts_the_rest(root: str) -> None:
    put_folder(root, [f"t{i}" for i in range(9)], ["v"])
    put_json(root, "splits.json", {"train": [f"t{i}" for i in range(9)], "val": ["v"]})
    fs, path = open_fs(root)
    for i in range(8):
        fs.rm(f"{path}/masks/t{i}.png")
    with pytest.raises(DataError) as caught:
        check(folder.read(config("folder", root)), ["train", "val"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 7 and lines[-1] == "and 3 more problems" and all("has no mask; add one" in line for line in lines[1:-1])


def test_an_unreadable_pool_image_is_only_a_warning(root: str) -> None:
    dataset = mixed(root)
    put(root, "images/a.png", data=b"<html>503</html>")
    warnings = check(dataset, ["train"])
    assert len(warnings) == 1 and "images of split 'train' that can't be used: 1, first" in warnings[0] and "a.png" in warnings[0]
    with pytest.raises(DataError, match=r"images/a\.png"):
        check(dataset, ["train"], pool=())


def test_an_image_that_vanished_is_reported_with_its_name(root: str) -> None:
    dataset = mixed(root)
    fs, path = open_fs(root)
    fs.rm(f"{path}/images/c.png")
    with pytest.raises(DataError, match=r"images/c\.png: FileNotFoundError"):
        check(dataset, ["val"])


def test_splits_that_share_images_are_refused_but_equal_ones_are_told(root: str) -> None:
    put_folder(root, ["a", "b"], ["c", "d"])
    for splits, refused in (
        ({"train": ["a", "b"], "val": ["b", "c"]}, True),
        ({"train": ["a"], "val": ["c", "d"], "test": ["d", "c"]}, False),
    ):
        put_json(root, "splits.json", splits)
        dataset = folder.read(config("folder", root))
        if refused:
            with pytest.raises(DataError, match="splits 'train' and 'val' share images: b; keep each in one split"):
                check(dataset, list(splits))
        else:
            assert any("splits 'val' and 'test' are the same images" in w for w in check(dataset, list(splits)))


def test_shared_groups_and_blank_masks_are_told(root: str) -> None:
    mixed(root)
    put(root, "masks/b.png", data=encode_mask(np.full((2, 2), 255, np.uint8)))
    put(root, "groups.csv", data=b"name,group\na,g1\nb,g2\nc,g1\n")
    warnings = check(folder.read(config("folder", root)), ["train", "val"])
    assert any("share groups (site and drive, or panorama): g1" in w for w in warnings)
    assert "masks of split 'train' without one labelled pixel: 1" in warnings


def test_unlabeled_images_need_no_mask(root: str) -> None:
    mixed(root)
    put(root, "unlabeled/u.png")
    put_json(root, "splits.json", {"train": ["a"], "unlabeled": ["u"]})
    dataset = folder.read(config("folder", root, val_split="unlabeled"))
    assert check(dataset, ["train", "unlabeled"]) == []
    with pytest.raises(DataError, match=r"u\.png: has no mask"):
        check(dataset, ["unlabeled"], unlabeled=())


@pytest.mark.parametrize(("split", "words"), [("test", "has no split 'test'; it has train, val"), ("val", "split 'val' of .* is empty")])
def test_check_needs_splits_with_images(root: str, split: str, words: str) -> None:
    put_folder(root, ["a"], [])
    with pytest.raises(DataError, match=words):
        check(folder.read(config("folder", root)), ["train", split])


def test_a_quick_check_looks_at_some_images_of_each_split(root: str) -> None:
    put_folder(root, [f"t{i}" for i in range(20)], ["v"])
    dataset = folder.read(config("folder", root))
    put(root, "masks/t1.png", data=b"broken")
    assert check(dataset, ["train"], n=4) == ["class 'rock' appears in no mask of the 4 of 20 images looked at of split 'train'"]
    with pytest.raises(DataError, match=r"t1\.png"):
        check(dataset, ["train"])


@pytest.mark.data
def test_the_real_tiles_are_whole(shared: Path) -> None:
    dataset = build(config("folder", str(shared / "data/mars")), "unused")
    assert {s: len(i) for s, i in dataset.splits.items()} == {"train": 1017, "val": 203, "test": 44, "unlabeled": 1475}
    assert check(dataset, ["train", "val", "test", "unlabeled"], n=40, unlabeled=["unlabeled"]) is not None
    assert dataset.split("train")[0].group == "122_1" and all(i.group for items in dataset.splits.values() for i in items)
    item = dataset.split("val")[0]
    image_HWC = dataset.image(item)
    assert dataset.mask(item, image_HWC.shape[:2]).shape == (256, 256)
