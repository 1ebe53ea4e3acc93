"""What every reader gives: named splits of items, and one way to read their pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from raysal.archive.fetch import fetch_image, fetch_label
from raysal.errors import DataError, ImageError
from raysal.images.decode import decode_image
from raysal.images.masks import decode_mask
from raysal.labels import IGNORE, INVALID, LabelSet


@dataclass(frozen=True)
class Item:
    """One image of a data set.

    Attributes:
        name: Its name inside the data set; stable over machines.
        image: URI of the image.
        mask: URI of its label mask, None where there is none. No query sees it: the opening check, the oracle and the metrics read it.
        exclude: URIs of masks known without labels (rover body, range): non-zero pixels are not valid.
        group: Site and drive or panorama; query caps and group splits use it. Empty where unknown.
    """

    name: str
    image: str
    mask: str | None = None
    exclude: tuple[str, ...] = ()
    group: str = ""

    @property
    def id(self) -> str:
        """32 hex digits of a sha256 over the name: the same on every machine, unlike a path or a time stamp."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Dataset:
    """Splits of items that share a label set."""

    name: str
    label_set: LabelSet
    splits: Mapping[str, tuple[Item, ...]]
    max_bytes: int = 256 * 2**20
    max_pixels: int = 64 * 2**20

    def split(self, name: str) -> tuple[Item, ...]:
        """Items of a split. Raises DataError where it is unknown or empty."""
        if name not in self.splits:
            raise DataError(f"data set {self.name!r} has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        if not self.splits[name]:
            raise DataError(f"split {name!r} of data set {self.name!r} is empty; name another split or fix the split file")
        return self.splits[name]

    def image(self, item: Item) -> np.ndarray:
        """uint8 [H, W, 3] RGB. Raises ImageError (fetch, decode, limit)."""
        return decode_image(fetch_image(item.image, self.max_bytes), self.max_pixels, item.image, partial(fetch_label, item.image))

    def valid(self, item: Item, shape_HW: tuple[int, int]) -> np.ndarray:
        """bool [H, W]: pixels inside the image that no exclude mask covers; known without labels."""
        return read_valid(item.exclude, shape_HW, self.max_bytes, self.max_pixels)

    def mask(self, item: Item, shape_HW: tuple[int, int]) -> np.ndarray:
        """uint8 [H, W] class ids, 255 where not labelled or excluded.

        Raises:
            DataError: No mask, another size than the image, or values outside the label set; each names the file.
        """
        if item.mask is None:
            raise DataError(f"{item.image}: has no mask; add one or take the image out of the split")
        try:
            values_HW = decode_mask(fetch_image(item.mask, self.max_bytes), self.max_pixels, item.mask)
        except ImageError as error:
            raise DataError(f"mask {error}; restore the file or take {item.name!r} out of the split") from error
        if values_HW.shape != shape_HW:
            raise DataError(
                f"{item.mask}: mask is {values_HW.shape[1]} x {values_HW.shape[0]}, its image {shape_HW[1]} x {shape_HW[0]}; "
                "masks must have their image's size"
            )
        mask_HW = self.label_set.lut()[values_HW]
        if (mask_HW == INVALID).any():
            unknown = sorted(set(np.unique(values_HW[mask_HW == INVALID]).tolist()))
            raise DataError(
                f"{item.mask}: mask values {unknown} are not in label set {self.label_set.name!r} "
                f"(classes {list(self.label_set.values)}, no label {sorted({*self.label_set.null_values, IGNORE})}); "
                "fix the mask or name the right data.label_set"
            )
        mask_HW[~self.valid(item, shape_HW)] = IGNORE
        return mask_HW


def read_valid(exclude: tuple[str, ...], shape_HW: tuple[int, int], max_bytes: int, max_pixels: int) -> np.ndarray:
    """bool [H, W] from exclude masks (non-zero = not valid). Raises ImageError where one can't be used."""
    valid_HW = np.ones(shape_HW, dtype=bool)
    for uri in exclude:
        covered_HW = decode_mask(fetch_image(uri, max_bytes), max_pixels, uri)
        if covered_HW.shape != shape_HW:
            raise ImageError("decode", f"{uri}: exclude mask is {covered_HW.shape}, its image {shape_HW}")
        valid_HW &= covered_HW == 0
    return valid_HW
