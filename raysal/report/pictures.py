"""Pictures for the page: fetched, shrunk, overlaid, and written as data URIs so that the page needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from matplotlib import colormaps
from PIL import Image

from raysal.archive.fetch import fetch_image, fetch_label
from raysal.errors import ImageError
from raysal.images.decode import decode_image
from raysal.images.masks import decode_mask
from raysal.labels import IGNORE, LabelSet

T = TypeVar("T")

READERS = 8
"""Images fetched at once: archives are mostly latency."""

UNCERTAINTY_MAP = "inferno"
"""A perceptually even map that readers with colour-blindness can use."""


@dataclass(frozen=True)
class Limits:
    """What an image of the run may weigh; from the run's configuration."""

    max_bytes: int = 256 * 2**20
    max_pixels: int = 64 * 2**20


def fetch(uri: str, limits: Limits) -> np.ndarray | str:
    """uint8 [H, W, 3], or the reason why it can't be had."""
    try:
        return decode_image(fetch_image(uri, limits.max_bytes), limits.max_pixels, uri, partial(fetch_label, uri))
    except ImageError as error:
        return f"{error.status}: {error}"


def fetch_small(uris: Sequence[str], side_px: int, limits: Limits) -> list[np.ndarray | str]:
    """Like `fetch` for many, each shrunk to side_px at its longer side."""

    def one(uri: str) -> np.ndarray | str:
        image = fetch(uri, limits)
        return image if isinstance(image, str) else shrink(image, side_px)

    return in_threads(one, uris)


def under_mask(uri: str, mask_png: bytes, limits: Limits, side_px: int) -> tuple[np.ndarray, np.ndarray] | str:
    """An image, uint8 [h, w, 3], and its mask, uint8 [h, w], both shrunk; or the reason why they can't be shown."""
    image = fetch(uri, limits)
    if isinstance(image, str):
        return image
    try:
        mask_HW = decode_mask(mask_png, limits.max_pixels, uri)
    except ImageError as error:
        return str(error)
    if mask_HW.shape != image.shape[:2]:
        return f"mask is {mask_HW.shape[1]} x {mask_HW.shape[0]}, image {image.shape[1]} x {image.shape[0]}"
    return shrink(image, side_px), shrink(mask_HW, side_px, smooth=False)


def in_threads(work: Callable[[str], T], uris: Iterable[str]) -> list[T]:
    """The results of work in the order of uris."""
    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(work, uris))


def shrink(image: np.ndarray, side_px: int, smooth: bool = True) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] with its longer side at most side_px; smooth is for photographs, not for class ids."""
    height, width = image.shape[:2]
    ratio = side_px / max(height, width)
    if ratio >= 1:
        return image
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST))


def overlay(image_HWC: np.ndarray, mask_HW: np.ndarray, label_set: LabelSet, opacity: float = 0.5) -> np.ndarray:
    """The photograph tinted in its classes' colours; where the mask abstains it stays a darkened grey. uint8 [H, W, 3]."""
    colors = label_set.colorize(mask_HW).astype(np.float32)
    photo = image_HWC.astype(np.float32)
    tinted = photo * (1 - opacity) + colors * opacity
    abstained = (mask_HW == IGNORE)[..., None]
    return np.where(abstained, photo.mean(axis=2, keepdims=True) * 0.6, tinted).clip(0, 255).astype(np.uint8)


def heat(map_HW: np.ndarray, top: float) -> np.ndarray:
    """float [H, W] drawn from 0 (dark) to top (bright): uint8 [H, W, 3]."""
    scaled = np.clip(np.nan_to_num(map_HW) / max(top, 1e-9), 0, 1)
    return (colormaps[UNCERTAINTY_MAP](scaled)[..., :3] * 255).round().astype(np.uint8)


def jpeg_uri(image_HWC: np.ndarray, quality: int = 82) -> str:
    """A photograph as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def mask_uri(mask_HW: np.ndarray, label_set: LabelSet) -> str:
    """Class ids as a palette PNG in the set's colours, as a data URI."""
    picture = Image.fromarray(np.ascontiguousarray(mask_HW))  # mode L; a palette makes it P and leaves the ids as they are
    picture.putpalette(label_set.palette().tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return png_uri(buffer.getvalue())


def png_uri(data: bytes) -> str:
    """PNG bytes as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode()
