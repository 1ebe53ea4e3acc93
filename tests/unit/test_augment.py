"""Augmentation: all randomness from one seed, image and mask stay on each other, and nothing is invented where there is no data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from raysal.config import AugmentConfig
from raysal.datasets.augment import Augment, augin_table, box_places, cutmix_boxes, draw_seed

SEEDS = st.integers(0, 2**63 - 1)
SIZES = st.integers(8, 90)


def config(
    crop_px: int = 32, scale: tuple[float, float] = (1.0, 1.0), hflip: float = 0.0, augin: float = 0.0, jitter: float = 0.0
) -> AugmentConfig:
    return AugmentConfig(crop_px=crop_px, scale=scale, hflip=hflip, augin=augin, color_jitter=jitter)


def picture(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A mask of blocks of 12 px, the image that encodes it (25 a class, all channels), all valid."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 9, (height // 12 + 1, width // 12 + 1), dtype=np.uint8)
    mask = blocks.repeat(12, axis=0).repeat(12, axis=1)[:height, :width].copy()
    return np.repeat(mask[..., None] * 25, 3, axis=2), mask, np.ones((height, width), bool)


def noise(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng.integers(0, 9, (height, width), dtype=np.uint8), rng.random((height, width)) < 0.8


@settings(max_examples=40, deadline=None)
@given(SEEDS, SIZES, SIZES, st.integers(1, 60), st.floats(0.3, 3))
def test_the_same_seed_gives_the_same_bytes(seed: int, height: int, width: int, crop_px: int, input_scale: float) -> None:
    augment = Augment(config(crop_px, (0.5, 2.0), 0.5, 0.5, 0.4), input_scale)
    image, mask, valid = noise(height, width)
    other = noise(20, 30, 1)[0]
    first = augment(image, mask, valid, seed, other)
    torch.manual_seed(seed % 1000)
    state = torch.get_rng_state()
    again = augment(image, mask, valid, seed, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [t.shape for t in first] == [(3, crop_px, crop_px), (crop_px, crop_px), (crop_px, crop_px)]
    assert [t.dtype for t in first] == [torch.uint8, torch.uint8, torch.bool]


def test_other_seeds_give_other_crops() -> None:
    augment = Augment(config(32, (0.5, 2.0), 0.5), 1.0)
    image, mask, valid = noise(64, 64)
    crops = {augment(image, mask, valid, draw_seed(0, "labeled", k))[0].numpy().tobytes() for k in range(50)}
    assert len(crops) == 50


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(24, 120), st.integers(24, 120), st.sampled_from([24, 48, 64]), st.floats(0.6, 1.5))
def test_image_and_mask_stay_aligned(seed: int, height: int, width: int, crop_px: int, input_scale: float) -> None:
    source, labels, everywhere = picture(height, width)
    image, mask, valid = (t.numpy() for t in Augment(config(crop_px, (0.75, 1.5), 0.5), input_scale)(source, labels, everywhere, seed))
    reach = 3  # pixels over which the resampling of the image mixes neighbours
    padded = np.pad(mask, reach, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    inside = valid & (windows.min(axis=(2, 3)) == windows.max(axis=(2, 3)))
    assert (mask[valid] < 9).all()
    for channel in image:
        assert (channel[inside] == mask[inside] * 25).all()


@pytest.mark.parametrize("scale", [0.25, 0.4, 0.5, 1.0, 2.0, 3.0])
def test_labels_lie_at_most_half_a_source_pixel_off_their_image(scale: float) -> None:
    ramp = np.tile(np.arange(240, dtype=np.uint8), (240, 1))
    crop_px = round(240 * scale * 0.5)
    image, mask, _ = Augment(config(crop_px, (scale, scale)))(np.repeat(ramp[..., None], 3, axis=2), ramp, np.ones((240, 240), bool), 5)
    off = (image[0].double() - mask.double())[:, 4:-4]
    assert off.abs().max() <= 1.01
    assert abs(off.mean()) <= 0.51


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(8, 70), st.integers(8, 70), st.floats(0.3, 1.2))
def test_padding_is_not_valid_and_all_else_is(seed: int, height: int, width: int, scale: float) -> None:
    crop_px = 64
    image, mask, valid = noise(height, width)
    image, everywhere = np.maximum(image, 1), np.ones_like(valid)
    out, labels, known = Augment(config(crop_px, (scale, scale), 0.5))(image, mask, everywhere, seed)
    rows, columns = (min(crop_px, max(1, round(n * scale))) for n in (height, width))
    assert int(known.sum()) == rows * columns
    assert int(known.any(dim=1).sum()) == rows and int(known.any(dim=0).sum()) == columns
    assert (labels[~known] == 255).all() and (out[:, ~known] == 0).all()
    assert (labels[known] < 9).all() and (out[:, known] > 0).all()


def test_pixels_that_were_not_valid_carry_no_label() -> None:
    image, mask, valid = noise(40, 40)
    _, labels, known = Augment(config(40))(image, mask, valid, 3)
    np.testing.assert_array_equal(known.numpy(), valid)
    np.testing.assert_array_equal(labels.numpy(), np.where(valid, mask, 255))


def test_an_unlabelled_image_gets_a_mask_of_255_and_stays_valid() -> None:
    image, mask, valid = noise(40, 40)
    augment = Augment(config(24, (0.5, 2.0), 0.5))
    out, labels, known = augment(image, None, valid, 8)
    assert (labels == 255).all()
    with_mask = augment(image, mask, valid, 8)
    assert torch.equal(out, with_mask[0]) and torch.equal(known, with_mask[2])


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 60))
def test_with_all_effects_off_nothing_changes(seed: int, size_px: int) -> None:
    image, mask, valid = noise(size_px, size_px)
    out, labels, known = Augment(config(size_px))(image, mask, valid, seed, noise(9, 9, 2)[0])
    np.testing.assert_array_equal(out.numpy(), image.transpose(2, 0, 1))
    np.testing.assert_array_equal(labels.numpy(), np.where(valid, mask, 255))
    np.testing.assert_array_equal(known.numpy(), valid)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_one_effect_leaves_the_draws_of_the_others(seed: int) -> None:
    image, mask, valid = noise(50, 70)
    other = noise(30, 30, 1)[0]
    plain = Augment(config(32, (0.4, 2.0)))(image, mask, valid, seed, other)
    flipped = Augment(config(32, (0.4, 2.0), hflip=1.0))(image, mask, valid, seed, other)
    assert all(torch.equal(a, b.flip(-1)) for a, b in zip(plain, flipped, strict=True))
    colored = Augment(config(32, (0.4, 2.0), augin=1.0, jitter=0.5))(image, mask, valid, seed, other)
    assert torch.equal(plain[1], colored[1]) and torch.equal(plain[2], colored[2])
    assert not torch.equal(plain[0], colored[0])


def test_half_of_the_images_are_flipped() -> None:
    image, mask, valid = noise(16, 16)
    augment = Augment(config(16, hflip=0.5))
    flips = [not torch.equal(augment(image, mask, valid, draw_seed(1, "x", k))[2], torch.from_numpy(valid)) for k in range(400)]
    assert 150 < sum(flips) < 250


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 40), st.integers(1, 255), st.integers(1, 255))
def test_augin_gives_the_other_images_mean_and_std_before_clipping(seed: int, size: int, bright: int, dark: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, bright + 1, (size, size, 3), dtype=np.uint8)
    other = rng.integers(0, dark + 1, (size, 7, 3), dtype=np.uint8)
    image[0, 0], image[1, 1] = 0, bright  # not flat
    table = augin_table(image, other)
    new = np.stack([table[c][image[..., c]] for c in range(3)], axis=-1).astype(np.float64)
    np.testing.assert_allclose(new.mean(axis=(0, 1)), other.mean(axis=(0, 1)), atol=1e-3)
    np.testing.assert_allclose(new.std(axis=(0, 1)), other.std(axis=(0, 1)), atol=1e-3)


def test_augin_of_a_flat_image_is_the_others_mean() -> None:
    other = noise(20, 20)[0]
    table = augin_table(np.full((5, 5, 3), 90, np.uint8), other)
    np.testing.assert_allclose(table[:, 90], other.mean(axis=(0, 1)), atol=1e-3)
    assert np.isfinite(table).all()


def test_augin_measures_valid_pixels_only_and_clips() -> None:
    image, mask, _ = noise(32, 32)
    valid = np.zeros((32, 32), bool)
    valid[:, :20] = True
    other = (noise(32, 32, 1)[0] > 127).astype(np.uint8) * 255
    out = Augment(config(32, augin=1.0))(image, mask, valid, 0, other)[0].numpy()
    table = augin_table(image[:, :20], other)
    wanted = np.stack([np.clip(np.round(table[c]), 0, 255)[image[..., c]] for c in range(3)])
    np.testing.assert_array_equal(out, wanted.astype(np.uint8))
    assert table.max() > 255 and table.min() < 0


def test_an_image_without_one_valid_pixel_passes_through_augin() -> None:
    image, mask, _ = noise(16, 16)
    out, labels, known = Augment(config(16, augin=1.0))(image, mask, np.zeros((16, 16), bool), 0, image)
    assert not known.any() and (labels == 255).all() and out.shape == (3, 16, 16)


def test_a_mask_of_another_size_is_refused() -> None:
    image, mask, valid = noise(16, 16)
    with pytest.raises(ValueError, match="one height and width"):
        Augment(config())(image, mask[:8], valid, 0)
    with pytest.raises(ValueError, match="one height and width"):
        Augment(config())(image, mask, valid[:8], 0)


def test_draw_seeds_are_the_same_everywhere_and_never_shared() -> None:
    assert draw_seed(0, "labeled", 0) == 8294862814111050006
    seeds = {draw_seed(s, stream, k) for s in range(5) for stream in ("labeled", "unlabeled", "cutmix") for k in range(200)}
    assert len(seeds) == 3000 and min(seeds) >= 0 and max(seeds) < 2**63


AREAS = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).map(tuple)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5), st.integers(1, 80), st.integers(1, 80), st.integers(1, 6), AREAS, SEEDS)
def test_cutmix_boxes_add_up_to_an_area_in_range(n: int, height: int, width: int, boxes: int, area: tuple[float, float], seed: int) -> None:
    top, left, high, wide = box_places(n, height, width, boxes, area, seed)
    assert (top >= 0).all() and (left >= 0).all() and (top + high <= height).all() and (left + wide <= width).all()
    total = (high * wide).sum(dim=1)
    rounding = boxes * (0.5 * (height + width) + 0.25)
    assert (total >= area[0] * height * width - rounding - 1e-6).all()
    assert (total <= area[1] * height * width + rounding + 1e-6).all()
    mask = cutmix_boxes(n, height, width, boxes, area, seed)
    assert mask.shape == (n, height, width) and mask.dtype == torch.bool
    covered = mask.sum(dim=(1, 2))
    assert (covered <= total).all() and (covered >= (high * wide).amax(dim=1)).all()
    assert torch.equal(mask, cutmix_boxes(n, height, width, boxes, area, seed))


def test_one_cutmix_box_covers_its_whole_area_and_differs_by_image() -> None:
    mask = cutmix_boxes(200, 128, 128, 1, (0.25, 0.5), 3)
    share = mask.float().mean(dim=(1, 2))
    assert 0.24 < share.min() < 0.28 and 0.47 < share.max() < 0.51
    assert len({m.numpy().tobytes() for m in mask}) == 200
    aspect = mask.any(dim=2).sum(dim=1) / mask.any(dim=1).sum(dim=1)
    assert aspect.min() < 0.6 and aspect.max() > 1.7


def test_cutmix_reaches_every_pixel_and_keeps_every_pixel() -> None:
    often = cutmix_boxes(2000, 24, 24, 3, (0.25, 0.5), 1).float().mean(dim=0)
    assert often.min() > 0 and often.max() < 0.8
