"""Synthetic scenes: the same bytes for the same seed, S5Mars' classes in S5Mars' shares, and an archive that survives a stop."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from raysal.archive.uris import join, list_names, read_bytes, write_bytes
from raysal.datasets import synthetic, synthetic_plan, synthetic_terrain
from raysal.datasets.synthetic import VAL_START, scene, write_archive
from raysal.datasets.synthetic_plan import group_of, plan_of
from raysal.datasets.synthetic_render import project, sunlight
from raysal.datasets.synthetic_terrain import BEDROCK, HOLE, RIDGE, ROCK, ROVER, SAND, SKY, SOIL, TRACE, Grid
from raysal.errors import DataError
from raysal.images.decode import decode_image
from raysal.images.masks import decode_mask
from raysal.labels import S5MARS, LabelSet

N = 300
# S5Mars: share of labelled pixels, and of images; rover, trace and hole are more frequent here, as the module says.
PIXELS = {SKY: 0.1027, RIDGE: 0.1521, SOIL: 0.1289, SAND: 0.056, BEDROCK: 0.5165, ROCK: 0.03, ROVER: 0.0036, TRACE: 0.0083, HOLE: 0.0019}
IMAGES = {SKY: 0.185, RIDGE: 0.26, SOIL: 0.59, SAND: 0.16, BEDROCK: 0.94, ROCK: 0.55, ROVER: 0.05, TRACE: 0.05, HOLE: 0.04}


@pytest.fixture(scope="module")
def pool() -> tuple[np.ndarray, np.ndarray]:
    """Images and masks of the first 300 scenes of seed 0 at 64 px."""
    images, masks = zip(*(scene(0, index, 64) for index in range(N)), strict=True)
    return np.stack(images), np.stack(masks)


def digest(pair: tuple[np.ndarray, np.ndarray]) -> str:
    return hashlib.sha256(pair[0].tobytes() + pair[1].tobytes()).hexdigest()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**21), st.integers(32, 90))
def test_every_pixel_of_any_scene_has_one_of_the_nine_classes(seed: int, index: int, size_px: int) -> None:
    image, mask = scene(seed, index, size_px)
    assert image.dtype == mask.dtype == np.uint8
    assert image.shape == (size_px, size_px, 3) and mask.shape == (size_px, size_px)
    assert mask.max() < 9
    assert image.std() > 1  # a picture, not one colour


def test_a_scene_does_not_depend_on_what_was_drawn_before() -> None:
    forward = {i: digest(scene(3, i, 48)) for i in range(24)}
    for cached in (synthetic_terrain.noise_texture, synthetic_terrain.slab_texture, synthetic_plan.site_of):
        cached.cache_clear()
    np.random.seed(7)
    assert {i: digest(scene(3, i, 48)) for i in reversed(range(24))} == forward
    assert len(set(forward.values())) == 24


def test_another_process_draws_the_same_bytes() -> None:
    code = "from tests.unit.test_synthetic import digest, scene; print(digest(scene(5, 11, 40)), digest(scene(5, 2, 96)))"
    root = Path(__file__).resolve().parents[2]
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONHASHSEED": "9"}, capture_output=True, check=True
    )
    assert other.stdout.decode().split() == [digest(scene(5, 11, 40)), digest(scene(5, 2, 96))]


def test_another_seed_is_another_planet() -> None:
    assert digest(scene(1, 0, 48)) != digest(scene(2, 0, 48))


def test_other_sizes_show_the_same_place() -> None:
    agree = [(scene(0, i, 64)[1] == scene(0, i, 192)[1][1::3, 1::3]).mean() for i in range(12)]
    assert np.mean(agree) > 0.85


@pytest.mark.parametrize(("seed", "index", "size_px"), [(-1, 0, 64), (0, -1, 64), (0, 0, 31)])
def test_a_scene_that_can_not_be_is_refused(seed: int, index: int, size_px: int) -> None:
    with pytest.raises(DataError, match="start at 0"):
        scene(seed, index, size_px)


def test_classes_cover_about_the_pixels_that_they_cover_in_s5mars(pool: tuple[np.ndarray, np.ndarray]) -> None:
    shares = np.bincount(pool[1].ravel(), minlength=9) / pool[1].size
    for kind, real in PIXELS.items():
        assert 0.7 * real < shares[kind] < 1.3 * real + 0.003, S5MARS.classes[kind]


def test_about_as_many_images_hold_a_class_as_in_s5mars(pool: tuple[np.ndarray, np.ndarray]) -> None:
    for kind, real in IMAGES.items():
        share = (pool[1] == kind).any(axis=(1, 2)).mean()
        assert abs(share - real) < 0.01 + 0.1 * real, (S5MARS.classes[kind], share)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2 * VAL_START))
def test_no_run_of_64_scenes_misses_a_rare_class(seed: int, start: int) -> None:
    plans = [plan_of(seed, start + k) for k in range(64)]
    for count in (sum(p.rover for p in plans), sum(p.kind == "trace" for p in plans), sum(p.kind == "hole" for p in plans)):
        assert 1 <= count <= 5


def test_color_alone_does_not_tell_soil_sand_and_bedrock_apart(pool: tuple[np.ndarray, np.ndarray]) -> None:
    """The best guess by 16 x 16 x 16 bins of colour, learnt on half of the sites, is wrong about as often as right on the others."""
    bins = (pool[0] // 16).astype(np.int64) @ np.array([256, 16, 1])
    train = np.array([group_of(0, i) % 2 == 0 for i in range(N)])
    kinds = (SOIL, SAND, BEDROCK)
    counts = np.stack([np.bincount(bins[train][pool[1][train] == k], minlength=4096) + 0.05 for k in kinds])
    guess = (counts / counts.sum(axis=1, keepdims=True)).argmax(axis=0)
    recall = [(guess[bins[~train][pool[1][~train] == k]] == n).mean() for n, k in enumerate(kinds)]
    assert np.mean(recall) < 0.55, recall


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_sites_are_short_runs_of_neighbours(seed: int) -> None:
    groups = [group_of(seed, i) for i in range(120)]
    assert groups == sorted(groups)
    sizes = np.unique(groups, return_counts=True)[1]
    assert sizes.min() >= 4 and sizes.max() <= 8
    assert not set(groups) & {group_of(seed, VAL_START + i) for i in range(120)}


def test_scenes_of_a_site_share_their_camera(pool: tuple[np.ndarray, np.ndarray]) -> None:
    gray = (np.ptp(pool[0].astype(int), axis=3) == 0).all(axis=(1, 2))
    groups = np.array([group_of(0, i) for i in range(N)])
    for group in np.unique(groups):
        assert len(set(gray[groups == group])) == 1
    assert 0.03 < gray.mean() < 0.45


def flat(horizon: float = -0.5) -> tuple[Grid, np.ndarray]:
    grid = Grid(64, horizon, 1.5, np.zeros((48, 2)))
    return grid, np.zeros(grid.shape, np.float32)


@pytest.mark.parametrize("azimuth", [0.5, 1.5, -1.2, 3.0])
def test_flat_ground_in_the_sun_has_brightness_one(azimuth: float) -> None:
    grid, height = flat()
    np.testing.assert_allclose(sunlight(grid, height, azimuth, 0.6, 0.3), 1, atol=1e-5)


@pytest.mark.parametrize(("azimuth", "lit", "dark"), [(np.pi / 2, 1, -1), (-np.pi / 2, -1, 1)])
def test_a_rock_casts_its_shadow_away_from_the_sun(azimuth: float, lit: int, dark: int) -> None:
    grid, height = flat()
    height[30:36, 29:35] = 0.2
    light = sunlight(grid, height, azimuth, 0.5, 0.3)
    assert light[33, 32 + 6 * dark] == pytest.approx(0.3, abs=0.02)
    assert light[33, 32 + 6 * lit] == pytest.approx(1, abs=0.02)


def test_flat_ground_is_seen_row_by_row() -> None:
    grid, height = flat()
    pixel, seen = project(grid, height)
    assert seen.all()
    np.testing.assert_allclose(grid.r_R[pixel // 64] * 64 - 0.5, np.arange(64)[:, None] * np.ones((1, 64)), atol=1e-6)
    np.testing.assert_array_equal(pixel % 64, np.arange(64)[None, :] * np.ones((64, 1)))


def test_a_wall_hides_what_lies_behind_it_up_to_its_height() -> None:
    grid, height = flat()
    wall, column = 30, 20
    height[wall:, column] = 0.0
    height[wall, column] = 0.25
    pixel, _ = project(grid, height)
    foot = grid.r_R[wall] * 64 - 0.5
    top = foot - 0.25 * grid.lift / grid.s_R[wall] * 64
    rows = pixel[:, column] // 64
    hidden = np.arange(64)[(np.arange(64) > top + 1) & (np.arange(64) < foot)]
    assert len(hidden) > 4 and (rows[hidden] == wall).all()
    assert (rows[: int(top)] > wall).all()
    np.testing.assert_array_equal(np.delete(pixel, column, axis=1), np.delete(project(*flat())[0], column, axis=1))


def tree(uri: str) -> dict[str, bytes]:
    names = [join(kind, name) for kind in ("images", "masks") for name in list_names(join(uri, kind))]
    return {name: read_bytes(join(uri, name)) for name in (*names, "classes.json", "splits.json", "groups.csv", "synthetic.json")}


def test_an_archive_holds_scenes_masks_classes_splits_and_groups(root: str) -> None:
    seen: list[tuple[int, int]] = []
    write_archive(root, 5, 3, 48, 4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 8) for k in range(1, 9)]
    splits = json.loads(read_bytes(join(root, "splits.json")))
    assert [len(splits["train"]), len(splits["val"])] == [5, 3]
    assert LabelSet.from_json(read_bytes(join(root, "classes.json"))) == S5MARS
    rows = read_bytes(join(root, "groups.csv")).decode().splitlines()
    assert rows[0] == "name,group" and [row.split(",")[0] for row in rows[1:]] == splits["train"] + splits["val"]
    for split, start in (("train", 0), ("val", VAL_START)):
        for k, name in enumerate(splits[split]):
            image, mask = scene(4, start + k, 48)
            values = decode_mask(read_bytes(join(root, "masks", f"{name}.png")), 10**6, name)
            np.testing.assert_array_equal(values, mask + 1)
            jpeg = decode_image(read_bytes(join(root, "images", f"{name}.jpg")), 10**6, name)
            assert np.abs(jpeg.astype(int) - image).mean() < 12


def test_a_stopped_archive_goes_on_to_the_same_bytes(root: str) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        write_archive(root, 9, 2, 40, 1, stop)
    assert "splits.json" not in list_names(root)
    write_archive(root, 9, 2, 40, 1)
    whole = tree(root)
    write_archive(root + "2", 9, 2, 40, 1)
    assert tree(root + "2") == whole


def test_a_repeat_mends_what_is_broken_and_leaves_the_rest(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_archive(str(root), 4, 1, 40, 1)
    whole = tree(str(root))
    (root / "images" / "scene_000001.jpg").unlink()
    (root / "images" / "scene_000002.jpg").write_bytes(whole["images/scene_000002.jpg"][:-40])
    (root / "masks" / "scene_000003.png").write_bytes(b"")
    before = (root / "images" / "scene_000000.jpg").stat().st_mtime_ns
    write_archive(str(root), 4, 1, 40, 1)
    assert tree(str(root)) == whole
    assert (root / "images" / "scene_000000.jpg").stat().st_mtime_ns == before


def test_an_archive_grows_without_changing_what_it_has(root: str) -> None:
    write_archive(root, 3, 2, 40, 1)
    small = tree(root)
    write_archive(root, 5, 2, 40, 1)
    large = tree(root)
    assert len(large) == len(small) + 4
    assert all(large[name] == small[name] for name in small if name.startswith(("images", "masks")))


def test_an_archive_of_another_seed_or_size_is_refused(root: str) -> None:
    write_archive(root, 1, 1, 40, 1)
    for seed, size_px in ((2, 40), (1, 48)):
        with pytest.raises(DataError, match="name another folder"):
            write_archive(root, 1, 1, size_px, seed)
    write_bytes(join(root, "synthetic.json"), b"?")
    with pytest.raises(DataError, match="unreadable"):
        write_archive(root, 1, 1, 40, 1)


@pytest.mark.parametrize("numbers", [(-1, 1, 64, 0), (VAL_START + 1, 1, 64, 0), (1, -1, 64, 0), (1, 1, 16, 0), (1, 1, 64, -1)])
def test_numbers_out_of_range_are_refused_before_anything_is_written(numbers: tuple[int, int, int, int], root: str) -> None:
    with pytest.raises(DataError, match="no negative number"):
        synthetic.write_archive(root, *numbers)
    assert list_names(root) == []
