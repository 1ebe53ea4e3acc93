"""Who answers a query. Here: ground-truth masks that lie beside the images and count as bought the moment they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from raysal.archive.fetch import fetch_image
from raysal.datasets.base import Dataset, Item
from raysal.datasets.build import class_pixels

LABELS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("name", pa.string()),
        ("uri", pa.string()),
        ("mask_uri", pa.string()),
        ("mask_sha256", pa.string()),
        ("round", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("class_pixels", pa.list_(pa.int64())),
    ]
)
"""One row a bought label."""


def buy(dataset: Dataset, items: Sequence[Item], round_: int) -> pa.Table:
    """Reads the ground truth of the chosen items.

    Returns:
        One row an item, in order: where its mask is, its sha256, and pixels per class.

    Raises:
        DataError: A mask is missing or unusable.
    """

    def row(item: Item) -> dict:
        image_HWC = dataset.image(item)
        height, width = image_HWC.shape[:2]
        mask_HW = dataset.mask(item, (height, width))
        assert item.mask is not None
        return {
            "id": item.id,
            "name": item.name,
            "uri": item.image,
            "mask_uri": item.mask,
            "mask_sha256": hashlib.sha256(fetch_image(item.mask, dataset.max_bytes)).hexdigest(),
            "round": round_,
            "width": width,
            "height": height,
            "class_pixels": class_pixels(mask_HW, dataset.label_set.n_classes).tolist(),
        }

    with ThreadPoolExecutor(8) as pool:
        return pa.Table.from_pylist(list(pool.map(row, items)), schema=LABELS_SCHEMA)
