"""AI4Mars: both releases and cameras, whole drives held out, rover and range masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raysal.archive.uris import absolute
from raysal.datasets import ai4mars
from raysal.datasets.build import build, check
from raysal.errors import DataError
from raysal.images.masks import encode_mask
from raysal.labels import AI4MARS, IGNORE
from tests.unit.layouts import NAVCAM, config, names, put, put_ai4mars


@pytest.mark.parametrize("layout", ["msl", "msl/ncam", "ai4mars-dataset-merged-0.6/msl/ncam", ""])
def test_ai4mars_layouts_of_both_releases(root: str, layout: str) -> None:
    put_ai4mars(f"{root}/{layout}".rstrip("/"))
    dataset = ai4mars.read(config("ai4mars", root))
    assert {s: len(i) for s, i in dataset.splits.items()} == {"train": 36, "val": 4, "unlabeled": 1, "test": 1} or (
        {s: len(i) for s, i in dataset.splits.items()} == {"train": 35, "val": 5, "unlabeled": 1, "test": 1}
    )
    assert dataset.label_set == AI4MARS and dataset.name == "ai4mars-ncam"


def test_every_image_has_one_split_and_expert_images_train_nothing(root: str) -> None:
    stems = put_ai4mars(f"{root}/msl/ncam")
    put(f"{root}/msl/ncam", f"labels/train/{stems[41]}.png")  # labelled by the crowd and by experts
    by_level = {level: names(ai4mars.read(config("ai4mars", root, ai4mars_gold=level))) for level in ("min1", "min2", "min3")}
    assert {level: len(cut["test"]) for level, cut in by_level.items()} == {"min1": 3, "min2": 2, "min3": 1}
    for cut in by_level.values():
        assert not set(stems[40:43]) & {*cut["train"], *cut["val"], *cut["unlabeled"]}
        assert cut["unlabeled"] == [stems[43]]
        assert sorted(cut["train"] + cut["val"]) == stems[:40]


def test_val_holds_whole_drives(root: str) -> None:
    put_ai4mars(f"{root}/msl/ncam", n=100, drives=20)
    dataset = ai4mars.read(config("ai4mars", root))
    groups = {split: {i.group for i in dataset.split(split)} for split in ("train", "val")}
    assert not groups["train"] & groups["val"] and "058/0003" in groups["train"] | groups["val"]
    assert len(dataset.split("val")) == 10


def test_rover_and_range_masks_exclude_their_own_image(root: str) -> None:
    stems = put_ai4mars(f"{root}/msl/ncam")
    found = {i.name: i for items in ai4mars.read(config("ai4mars", root)).splits.values() for i in items}
    at = absolute(root) + "/msl/ncam/images"
    assert found[stems[0]].exclude == (f"{at}/rng-30m/{stems[0].replace('EDR', 'RNG')}.png",)
    assert found[stems[1]].exclude == (
        f"{at}/mxy/{stems[1].replace('EDR', 'MXY')}.png",
        f"{at}/rng-30m/{stems[1].replace('EDR', 'RNG')}.png",
    )


def test_excluded_pixels_are_not_labels(tmp_path: Path) -> None:
    put_ai4mars(str(tmp_path / "msl"))
    stem = NAVCAM.format(1, 58, 1)
    rover_HW = np.array([[0, 1], [0, 0]], np.uint8)
    put(str(tmp_path), f"msl/images/mxy/{stem.replace('EDR', 'MXY')}.png", data=encode_mask(rover_HW))
    dataset = ai4mars.read(config("ai4mars", str(tmp_path)))
    item = next(i for items in dataset.splits.values() for i in items if i.name == stem)
    np.testing.assert_array_equal(dataset.valid(item, (2, 2)), rover_HW == 0)
    np.testing.assert_array_equal(dataset.mask(item, (2, 2)), [[0, IGNORE], [0, 0]])


def test_cameras_are_never_mixed(root: str) -> None:
    """A Mastcam mask of the same stem must not label a Navcam image, nor the other way round."""
    stem = NAVCAM.format(999, 60, 0)
    put_ai4mars(f"{root}/msl/ncam")
    put(f"{root}/msl/ncam", f"images/edr/{stem}.JPG")
    mastcam = [f"{sol:04d}ML0000001{i:03d}C0_DXXX" for sol in range(5) for i in range(4)]
    put(f"{root}/msl/mcam", *(f"images/{s}.JPG" for s in mastcam), *(f"labels/train/{s}_merged.png" for s in [*mastcam, stem]))
    assert stem in names(ai4mars.read(config("ai4mars", root)))["unlabeled"]
    dataset = ai4mars.read(config("ai4mars", root, ai4mars_camera="mcam"))
    assert set(dataset.splits) == {"train", "val", "unlabeled"}
    found = {i.name: i for items in dataset.splits.values() for i in items}
    assert sorted(found) == mastcam and all(i.mask and "/mcam/" in i.mask and not i.exclude for i in found.values())
    groups = {split: {i.group for i in dataset.splits[split]} for split in ("train", "val")}
    assert groups["train"] | groups["val"] == {f"sol{sol:04d}" for sol in range(5)} and not groups["train"] & groups["val"]


@pytest.mark.parametrize(
    ("label", "image"),
    [
        ("NLB_1EDR_F058", "NLB_1EDR_F058"),
        ("NLB_1EDR_F058_merged", "NLB_1EDR_F058"),
        ("X_merged13", "X"),
        ("1N128286337EFF0000P1303L0M1_25_T0_merged", "1N128286337EFF0000P1303L0M1"),
        ("A_7_12_T3_merged", "A_7"),  # an image stem that ends in digits is not cut further
    ],
)
def test_label_names_lead_to_their_image(label: str, image: str) -> None:
    assert next(k for k in ai4mars.label_keys(label) if k in {image}) == image
    assert ai4mars.label_keys(label)[0] == label


def test_two_masks_of_one_image_are_refused(root: str) -> None:
    stems = put_ai4mars(f"{root}/msl")
    put(f"{root}/msl", f"labels/train/{stems[0]}_merged.png")
    with pytest.raises(DataError, match=rf"both label {stems[0]}; keep one"):
        ai4mars.read(config("ai4mars", root))


def test_masks_without_an_image_are_told_and_left_out(root: str, caplog: pytest.LogCaptureFixture) -> None:
    put_ai4mars(f"{root}/msl")
    put(f"{root}/msl", "labels/train/lost.png")
    ai4mars.read(config("ai4mars", root))
    assert "1 masks fit no image and are left out: lost.png" in caplog.text


@pytest.mark.parametrize(
    ("path", "camera", "words"),
    [
        ("mer/images/eff/a.JPG", "ncam", r"no AI4Mars ncam images here \(it holds mer\); looked for msl/ncam/images, msl/images/edr"),
        ("msl/images/edr/a.JPG", "mcam", "no AI4Mars mcam images here"),
        ("msl/ncam/labels/train/a.png", "ncam", r"msl/ncam/images/edr: no images \(\.JPG\) in it"),
        ("msl/ncam/images/edr/a.JPG", "ncam", r"labels/train: no mask \(\.png\) here fits"),
    ],
)
def test_ai4mars_elsewhere_says_what_was_looked_for(root: str, path: str, camera: str, words: str) -> None:
    put(root, path)
    with pytest.raises(DataError, match=words):
        ai4mars.read(config("ai4mars", root, ai4mars_camera=camera))


@pytest.mark.data
def test_the_real_ai4mars_sample_is_read(shared: Path) -> None:
    dataset = build(config("ai4mars", str(shared / "data/ai4mars_sample")), "unused")
    assert {s: len(i) for s, i in dataset.splits.items()} == {"train": 15, "val": 1, "unlabeled": 1}
    assert names(dataset)["unlabeled"] == ["NLA_397586928EDR_F0010008AUT_04096M1"]
    items = [i for items in dataset.splits.values() for i in items]
    assert all(len(i.exclude) == 2 for i in items) and {i.group for i in items} == {"001/0008", "002/0000"}
    assert any("without one labelled pixel" in w for w in check(dataset, ["train", "val", "unlabeled"]))
    item = dataset.split("train")[0]
    mask_HW = dataset.mask(item, (1024, 1024))
    assert set(np.unique(mask_HW)) <= {0, IGNORE} and (mask_HW[~dataset.valid(item, (1024, 1024))] == IGNORE).all()
