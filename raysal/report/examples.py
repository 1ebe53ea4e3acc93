"""Val images beside their truth, the last model's mask and its uncertainty: the best, the worst and a typical one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

import numpy as np
import torch
from PIL import Image

from raysal.archive.uris import join
from raysal.config import Config
from raysal.datasets.base import Dataset, Item
from raysal.datasets.build import READERS
from raysal.errors import InputError
from raysal.labels import LabelSet
from raysal.model.metrics import confusion, miou
from raysal.model.runtime import Predictor
from raysal.query.scores import maps
from raysal.report.gather import Run
from raysal.report.pictures import shrink

VAL_IMAGES = 48
"""Most val images that are looked at; evenly spread over the split."""

VAL_PIXELS = 24_000_000
"""Most pixels that go through the network for the same purpose, so that a report stays a matter of minutes on a CPU."""

AT_LEAST = 4
BATCH_PIXELS = 4_000_000
"""Pixels per forward pass: a pass holds the probabilities of every class for each of them."""

SHOWN = 4
SPREAD = 6
TILE_PX = 256
HERO_PX = 760


@dataclass(frozen=True)
class Example:
    """One val image, shrunk for the page.

    Attributes:
        item: Where it comes from.
        miou: Its own mIoU, over the classes in its truth or its mask.
        image: uint8 [h, w, 3].
        truth: uint8 [h, w] class ids.
        mask: uint8 [h, w] class ids, as predicted.
        uncertainty: float32 [h, w], Jensen-Shannon divergence of the branches over ln 2, in [0, 1]; None until it is asked for.
    """

    item: Item
    miou: float
    image: np.ndarray
    truth: np.ndarray
    mask: np.ndarray
    uncertainty: np.ndarray | None = None


@dataclass(frozen=True)
class Examples:
    """What `examples` found.

    Attributes:
        best, worst: Most extreme first.
        typical: Of the middle third by mIoU, the one whose truth shows most classes.
        spread: Evenly spread from the best to the worst.
        looked: Images that were masked, of `total` in the split.
        top: The uncertainty that is drawn brightest.
        label_set: The checkpoint's.
    """

    best: tuple[Example, ...]
    worst: tuple[Example, ...]
    typical: Example
    spread: tuple[Example, ...]
    looked: int
    total: int
    top: float
    label_set: LabelSet


def examples(run: Run, cfg: Config, checkpoint_uri: str) -> Examples:
    """Predicts a sample of the val split with a checkpoint.

    Raises:
        InputError: The data set or the checkpoint is gone or can't be used, or no val image can.
    """
    dataset = _open(run, cfg)
    items = dataset.split(cfg.data.val_split)
    predictor = Predictor.load(checkpoint_uri)
    seen = sorted(_look(run, dataset, _sample(items, cfg, dataset), predictor), key=lambda e: e.miou)
    if not seen:
        raise InputError(f"none of the {len(items)} images of split {cfg.data.val_split!r} could be shown")
    n = min(SHOWN, max(1, len(seen) // 2))
    worst = [_with_uncertainty(e, dataset, predictor) for e in seen[:n]] if len(seen) > 1 else []
    best = [_with_uncertainty(e, dataset, predictor) for e in reversed(seen[-n:])]
    drawn = np.concatenate([e.uncertainty.ravel() for e in (*best, *worst) if e.uncertainty is not None])
    top = max(float(np.quantile(drawn, 0.995)), 1e-3)
    middle = seen[len(seen) // 3 : -(len(seen) // 3) or None]
    typical = max(middle, key=lambda e: len(np.unique(e.truth)))
    spread = tuple(seen[i] for i in np.linspace(len(seen) - 1, 0, min(SPREAD, len(seen))).round().astype(int))
    return Examples(tuple(best), tuple(worst), typical, spread, len(seen), len(items), top, predictor.info.label_set)


def _open(run: Run, cfg: Config) -> Dataset:
    """The run's data set; a synthetic one is only read here, never generated anew."""
    if cfg.data.reader == "synthetic":
        return READERS["folder"](cfg.data.model_copy(update={"root": join(run.uri, "data")}))
    return READERS[cfg.data.reader](cfg.data)


def _sample(items: Sequence[Item], cfg: Config, dataset: Dataset) -> list[Item]:
    """Evenly spread over the split; fewer where images are large."""
    height, width = dataset.image(items[0]).shape[:2]
    affordable = int(VAL_PIXELS / max(1.0, height * width * cfg.data.input_scale**2))
    n = min(len(items), VAL_IMAGES, max(AT_LEAST, affordable))
    return [items[i] for i in np.linspace(0, len(items) - 1, n).round().astype(int)]


def _look(run: Run, dataset: Dataset, items: Sequence[Item], predictor: Predictor) -> Iterator[Example]:
    """Every item that can be read and masked; reasons why others can't become notes. Few images are in memory at a time."""
    pixels = ((item, run.attempt(f"val image {item.name}", partial(_read, dataset, item), None)) for item in items)
    found = ((item, *pair) for item, pair in pixels if pair)
    for (height, width, _), group in groupby(found, key=lambda row: row[1].shape):
        n = max(1, BATCH_PIXELS // (height * width))
        while batch := list(islice(group, n)):
            masks: list[np.ndarray] = run.attempt("masks of val images", partial(_masks, predictor, [image for _, image, _ in batch]), [])
            for (item, image_HWC, truth_HW), mask_HW in zip(batch, masks, strict=False):
                value = miou(confusion(mask_HW, truth_HW, dataset.label_set.n_classes))
                if math.isfinite(value):
                    yield _example(item, value, image_HWC, truth_HW, mask_HW)


def _read(dataset: Dataset, item: Item) -> tuple[np.ndarray, np.ndarray] | None:
    image_HWC = dataset.image(item)
    return image_HWC, dataset.mask(item, (image_HWC.shape[0], image_HWC.shape[1]))


def _masks(predictor: Predictor, images: list[np.ndarray]) -> list[np.ndarray]:
    return predictor.masks(images)


def _example(item: Item, value: float, image_HWC: np.ndarray, truth_HW: np.ndarray, mask_HW: np.ndarray) -> Example:
    truth, mask = (shrink(ids_HW, HERO_PX, smooth=False) for ids_HW in (truth_HW, mask_HW))
    return Example(item, value, shrink(image_HWC, HERO_PX), truth, mask)


def _with_uncertainty(example: Example, dataset: Dataset, predictor: Predictor) -> Example:
    """The example at the size of a tile, with the map that ranks images for "uncertainty" (raysal.query.scores)."""
    with torch.no_grad():
        z1, z2 = predictor.logits([dataset.image(example.item)], "decoder")
        map_hw = maps(z1, z2, ("uncertainty",), 0.5)["uncertainty"][0].float().cpu().numpy()
    image = shrink(example.image, TILE_PX)
    size = (image.shape[1], image.shape[0])
    uncertainty = np.asarray(Image.fromarray(map_hw.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    truth, mask = (shrink(ids, TILE_PX, smooth=False) for ids in (example.truth, example.mask))
    return Example(example.item, example.miou, image, truth, mask, uncertainty)
