"""Small data sets on any file system, for the tests of readers."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable

import numpy as np

from raysal.archive.uris import open_fs
from raysal.config import DataConfig
from raysal.datasets.base import Dataset
from raysal.images.masks import encode_mask

PIXEL = encode_mask(np.zeros((2, 2), np.uint8))  # readers never open images; check does, and a grey PNG is one
NAVCAM = "NLB_5278{:05d}EDR_F{:03d}{:04d}NCAM00253M1"
TWO_CLASSES = {"classes": [{"id": 0, "name": "soil", "rgb": [1, 2, 3]}, {"id": 1, "name": "rock", "rgb": [4, 5, 6]}]}


def put(root: str, *paths: str, data: bytes = PIXEL) -> None:
    """Writes the same bytes to some paths."""
    fs, base = open_fs(root)
    for path in paths:
        fs.makedirs(posixpath.dirname(f"{base}/{path}"), exist_ok=True)
        fs.pipe_file(f"{base}/{path}", data)


def put_json(root: str, path: str, value: object) -> None:
    put(root, path, data=json.dumps(value).encode())


def put_folder(root: str, train: Iterable[str] = ("a", "b"), val: Iterable[str] = ("c",)) -> None:
    """A small data set in the plain layout."""
    train, val = list(train), list(val)
    put(root, *(f"images/{n}.png" for n in train + val), *(f"masks/{n}.png" for n in train + val))
    put_json(root, "classes.json", TWO_CLASSES)
    put_json(root, "splits.json", {"train": train, "val": val})


def config(reader: str, root: str | None, **values: object) -> DataConfig:
    return DataConfig.model_validate({"reader": reader, "root": root, **values})


def names(dataset: Dataset) -> dict[str, list[str]]:
    return {split: [i.name for i in items] for split, items in dataset.splits.items()}


def put_ai4mars(camera: str, n: int = 40, drives: int = 8) -> list[str]:
    """A Navcam tree: n labelled images over some drives, one image without a mask, three gold images."""
    stems = [NAVCAM.format(i, 58, i % drives) for i in range(n + 4)]
    put(camera, *(f"images/edr/{s}.JPG" for s in stems))
    put(camera, *(f"images/mxy/{s.replace('EDR', 'MXY')}.png" for s in stems[1:]))
    put(camera, *(f"images/rng-30m/{s.replace('EDR', 'RNG')}.png" for s in stems))
    put(camera, *(f"labels/train/{s}.png" for s in stems[:n]))
    for k, level in enumerate(("min1", "min2", "min3")):
        put(camera, *(f"labels/test/masked-gold-{level}-100agree/{s}_merged.png" for s in stems[n + k : n + 3]))
    return stems
