"""Augmentation of training images, and CutMix boxes: every draw is a function of a seed alone.

Seeds come from `draw_seed`, so that the i-th draw of a run is the same on 1 and on 64 workers, and after a restart.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysal.config import AugmentConfig
from raysal.labels import IGNORE

_SCALE, _TOP, _LEFT, _FLIP, _AUGIN, _BRIGHTNESS, _CONTRAST, _SATURATION = range(8)


class Augment:
    """Random scale, crop, flip, and optionally colour jitter and AugIN, of an image with its mask.

    Each effect has its own draw: turning one on leaves the others as they were.

    Args:
        cfg: Which effects, and how strong.
        input_scale: Images enter the network resized by this; the random scale comes on top.
    """

    def __init__(self, cfg: AugmentConfig, input_scale: float = 1.0) -> None:
        self.cfg = cfg
        self.input_scale = input_scale

    def __call__(
        self,
        image_HWC: np.ndarray,
        mask_HW: np.ndarray | None,
        valid_HW: np.ndarray,
        seed: int,
        other_HWC: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One training crop.

        Args:
            image_HWC: uint8 [H, W, 3].
            mask_HW: uint8 [H, W] class ids, 255 where not labelled; None for an unlabelled image.
            valid_HW: bool [H, W], False where the image holds no data (rover body, mosaic gaps).
            seed: 0 to 2^63 - 1, from `draw_seed`.
            other_HWC: uint8 [h, w, 3], another image of the pool, the style for AugIN; None: no AugIN.

        Returns:
            uint8 [3, crop, crop]; uint8 [crop, crop] class ids, 255 where not labelled or not valid (everywhere without a mask);
            bool [crop, crop], False exactly on padding and where valid_HW was False.

        Raises:
            ValueError: Sizes of image, mask and valid differ.
        """
        if valid_HW.shape != image_HWC.shape[:2] or (mask_HW is not None and mask_HW.shape != image_HWC.shape[:2]):
            shapes = (image_HWC.shape, None if mask_HW is None else mask_HW.shape, valid_HW.shape)
            raise ValueError(f"image, mask and valid must have one height and width, got {shapes}")
        draw = torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        low, high = self.cfg.scale
        scale = self.input_scale * (low + (high - low) * draw[_SCALE])
        rows = _window(image_HWC.shape[0], scale, self.cfg.crop_px, draw[_TOP])
        columns = _window(image_HWC.shape[1], scale, self.cfg.crop_px, draw[_LEFT])
        labels_2HW = _labels(mask_HW, valid_HW, rows, columns)
        image_CHW = torch.from_numpy(np.ascontiguousarray(image_HWC[rows.source, columns.source])).permute(2, 0, 1)
        size, F = [rows.length, columns.length], _transforms()
        image_CHW = F.resize(image_CHW, size, F.InterpolationMode.BILINEAR, antialias=True)
        labels_2HW = F.resize(labels_2HW, size, F.InterpolationMode.NEAREST_EXACT)
        if other_HWC is not None and draw[_AUGIN] < self.cfg.augin:
            image_CHW = _look_up(image_CHW, augin_table(image_HWC[valid_HW], other_HWC))
        image_CHW = self._jitter(image_CHW, draw)
        if draw[_FLIP] < self.cfg.hflip:
            image_CHW, labels_2HW, columns = F.horizontal_flip(image_CHW), F.horizontal_flip(labels_2HW), columns.flipped()
        padding = [columns.before, rows.before, columns.after, rows.after]
        if any(padding):
            image_CHW, labels_2HW = F.pad(image_CHW, padding, fill=0), F.pad(labels_2HW, padding, fill=0)
        valid = labels_2HW[1].bool()
        return image_CHW.contiguous(), torch.where(valid, labels_2HW[0], IGNORE), valid

    def _jitter(self, image_CHW: Tensor, draw: list[float]) -> Tensor:
        strength, F = self.cfg.color_jitter, _transforms()
        if strength > 0:
            brightness, contrast, saturation = (max(0.0, 1 + strength * (2 * draw[k] - 1)) for k in (_BRIGHTNESS, _CONTRAST, _SATURATION))
            image_CHW = F.adjust_brightness(image_CHW, brightness)
            image_CHW = F.adjust_contrast(image_CHW, contrast)
            image_CHW = F.adjust_saturation(image_CHW, saturation)
        return image_CHW


def _transforms() -> Any:
    """torchvision's, when the first crop is made: importing them takes seconds, and Ray's own processes only hand an `Augment` on."""
    return importlib.import_module("torchvision.transforms.v2.functional")


class _Window:
    """One axis of a crop: which source pixels, resized to which length, between how many padded ones."""

    def __init__(self, source: slice, length: int, before: int = 0, after: int = 0) -> None:
        self.source, self.length, self.before, self.after = source, length, before, after

    def flipped(self) -> _Window:
        return _Window(self.source, self.length, self.after, self.before)


def _window(source_px: int, scale: float, crop_px: int, draw: float) -> _Window:
    """Where a crop of the scaled image lies. Cropping before resizing gives the same pixels for a fraction of the work."""
    scaled_px = max(1, round(source_px * scale))
    if scaled_px <= crop_px:
        before = round(draw * (crop_px - scaled_px))
        return _Window(slice(0, source_px), scaled_px, before, crop_px - scaled_px - before)
    taken_px = min(source_px, max(1, round(crop_px / scale)))
    start = round(draw * (source_px - taken_px))
    return _Window(slice(start, start + taken_px), crop_px)


def _labels(mask_HW: np.ndarray | None, valid_HW: np.ndarray, rows: _Window, columns: _Window) -> Tensor:
    """Mask and valid as one uint8 [2, h, w].

    A plain tensor and not a `tv_tensors.Mask`, which resizes by rounding down: labels would lie half a pixel off their image.
    """
    valid_hw = valid_HW[rows.source, columns.source]
    mask_hw = np.full(valid_hw.shape, IGNORE, np.uint8) if mask_HW is None else mask_HW[rows.source, columns.source]
    return torch.from_numpy(np.stack([mask_hw, valid_hw.astype(np.uint8)]))


def augin_table(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """AugIN as a look-up table: gives an image another one's channel means and standard deviations.

    Adaptive instance normalisation (Huang & Belongie, ICCV 2017, eq. 8) on pixels: (v - mean) / std * other std + other mean.

    Args:
        image: uint8 [..., 3].
        other: uint8 [..., 3], the style.

    Returns:
        float32 [3, 256]: new value of channel c's old value v, neither rounded nor clipped.
    """
    (mean_C, std_C), (other_mean_C, other_std_C) = _statistics(image), _statistics(other)
    gain_C = np.where(std_C > 0, other_std_C / np.maximum(std_C, 1e-6), 0)  # a flat channel stays flat
    values = np.arange(256, dtype=np.float64)
    return ((values - mean_C[:, None]) * gain_C[:, None] + other_mean_C[:, None]).astype(np.float32)


def _statistics(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean and standard deviation of each channel, float64 [3], from histograms; 0 for no pixels at all."""
    pixels_NC = image.reshape(-1, 3)
    values = np.arange(256, dtype=np.float64)
    counts = np.stack([np.bincount(pixels_NC[:, c], minlength=256) for c in range(3)]) / max(len(pixels_NC), 1)
    mean_C = (counts * values).sum(axis=1)
    return mean_C, np.sqrt(np.maximum((counts * (values - mean_C[:, None]) ** 2).sum(axis=1), 0))


def _look_up(image_CHW: Tensor, table: np.ndarray) -> Tensor:
    bytes_C256 = torch.from_numpy(table).round().clamp(0, 255).to(torch.uint8)
    return torch.stack([row[channel.long()] for row, channel in zip(bytes_C256, image_CHW, strict=True)])


def draw_seed(seed: int, stream: str, draw: int) -> int:
    """A seed for one draw of one stream: 63 bits of blake2b, the same on every machine and Python.

    Args:
        seed: The run's seed.
        stream: Which use, for example "labeled" or "cutmix"; streams don't share draws.
        draw: Number of the draw within the stream.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{draw}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def cutmix_boxes(n: int, height: int, width: int, boxes: int, area: tuple[float, float], seed: int) -> Tensor:
    """Box masks of CutMix for segmentation (French et al., BMVC 2020), as CPS uses them.

    Each image draws a total area, uniform in `area`, splits it evenly over its boxes, and draws each box's aspect and place.
    Boxes may overlap: their areas add up to the total (within rounding to whole pixels), what they cover together may be less.

    Args:
        n: Images.
        height: Of the images, pixels.
        width: Of the images, pixels.
        boxes: Boxes per image.
        area: Least and most total area, as shares of the image.
        seed: 0 to 2^63 - 1, from `draw_seed`.

    Returns:
        bool [n, height, width], True where the pixel comes from the other image.
    """
    top_NB, left_NB, high_NB, wide_NB = box_places(n, height, width, boxes, area, seed)
    y_H, x_W = torch.arange(height), torch.arange(width)
    rows_NBH = (y_H >= top_NB[..., None]) & (y_H < (top_NB + high_NB)[..., None])
    columns_NBW = (x_W >= left_NB[..., None]) & (x_W < (left_NB + wide_NB)[..., None])
    return (rows_NBH[..., :, None] & columns_NBW[..., None, :]).any(dim=1)


def box_places(n: int, height: int, width: int, boxes: int, area: tuple[float, float], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height, width of the boxes of `cutmix_boxes`, int64 [n, boxes] each.

    With total area p, a box is p^a / sqrt(boxes) high and p^(1-a) / sqrt(boxes) wide, a uniform in 0..1.
    """
    generator = torch.Generator().manual_seed(seed)
    total_N1 = area[0] + (area[1] - area[0]) * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    aspect_NB, down_NB, across_NB = torch.rand(3, n, boxes, generator=generator, dtype=torch.float64)
    total_N1 = total_N1.clamp(min=1e-9)
    high_NB = (height * total_N1**aspect_NB / math.sqrt(boxes)).round().long()
    wide_NB = (width * total_N1 ** (1 - aspect_NB) / math.sqrt(boxes)).round().long()
    top_NB = (down_NB * (height - high_NB + 1)).floor().long()
    left_NB = (across_NB * (width - wide_NB + 1)).floor().long()
    return top_NB, left_NB, high_NB, wide_NB
