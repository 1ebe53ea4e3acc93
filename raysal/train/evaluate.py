"""mIoU, per-class IoU and calibration of a model on labelled images, from one confusion matrix over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist

from raysal.datasets.base import Dataset, Item
from raysal.errors import DataError, ImageError
from raysal.model.metrics import Calibration, ClassReliability, accuracy, confusion, iou, miou
from raysal.model.runtime import Predictor


@dataclass(frozen=True)
class Evaluation:
    """Metrics over a split.

    Attributes:
        confusion: int64 [C, C], rows truth, columns prediction; ignored pixels are left out.
        calibration: Confidence against correctness over the same pixels.
        reliability: The same by predicted class.
    """

    confusion: torch.Tensor
    calibration: Calibration
    reliability: ClassReliability

    @property
    def miou(self) -> float:
        """Mean IoU over classes that occur in truth or prediction."""
        return float(miou(self.confusion))

    def to_dict(self, classes: Sequence[str]) -> dict:
        """JSON form; the IoU of a class that occurs nowhere is null."""
        per_class = [None if v != v else round(v, 6) for v in iou(self.confusion).tolist()]
        return {
            "miou": round(self.miou, 6),
            "accuracy": round(float(accuracy(self.confusion)), 6),
            "iou": dict(zip(classes, per_class, strict=True)),
            "confusion": self.confusion.tolist(),
            "calibration": self.calibration.to_dict(),
            "abstention": self.reliability.to_dict(classes),
            "reliability": self.reliability.counts.tolist(),
        }


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    items: Sequence[Item],
    batch: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates this rank's share of the items and sums over ranks.

    Raises:
        DataError: An image or mask of the split can't be read; metrics over the rest would not be comparable.
    """
    n = dataset.label_set.n_classes
    total, calibration, reliability = torch.zeros(n, n, dtype=torch.int64), Calibration(), ClassReliability(n)
    mine = items[rank::world]
    done = 0
    for images, masks in _batches(dataset, mine, batch):
        for pieces, truth_HW in zip(predictor.pieces(images), masks, strict=True):
            for piece in pieces:
                truth_BHW = torch.from_numpy(truth_HW[piece.rows, piece.cols])[None]
                total += confusion(torch.from_numpy(piece.mask)[None], truth_BHW, n)
                calibration.add(torch.from_numpy(piece.probabilities)[None], truth_BHW)
                reliability.add(piece.mask[None], piece.confidence[None], truth_BHW)
        done += len(images)
        if on_progress:
            on_progress(done, len(mine))
    if dist.is_initialized() and world > 1:
        for tensor in (total, calibration.sums, reliability.counts):
            moved = tensor.to(device or "cpu")
            dist.all_reduce(moved)
            tensor.copy_(moved)
    return Evaluation(total, calibration, reliability)


def _batches(dataset: Dataset, items: Sequence[Item], batch: int) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Batches of neighbours of one size: lists of images uint8 [H, W, 3] and masks uint8 [H, W]."""
    pixels = (_read(dataset, item) for item in items)
    for _, run in groupby(pixels, key=lambda pair: pair[1].shape):
        images: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        for image, mask in run:
            images.append(image)
            masks.append(mask)
            if len(images) == batch:
                yield images, masks
                images, masks = [], []
        if images:
            yield images, masks


def _read(dataset: Dataset, item: Item) -> tuple[np.ndarray, np.ndarray]:
    try:
        image_HWC = dataset.image(item)
    except ImageError as error:
        raise DataError(f"image {error}; restore the file or take {item.name!r} out of the split") from error
    return image_HWC, dataset.mask(item, image_HWC.shape[:2])
