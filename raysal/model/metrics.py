"""What a model is worth: confusion, IoU, accuracy and calibration. All add up over batches and workers before any ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysal.labels import IGNORE

PRECISIONS = (0.8, 0.9, 0.95)
"""Shares of right pixels for which thresholds of abstention are stated."""

SUPPORT = 1000
"""Pixels of a class, of val, that a threshold must keep: a handful that happen to be right promises nothing."""


def confusion(pred_BHW: Any, truth_BHW: Any, n: int) -> Tensor:
    """Counts of pixels by true and predicted class.

    Args:
        pred_BHW: Class ids below n, any shape, integer tensor or array.
        truth_BHW: Class ids of the same shape; pixels of 255 are left out.
        n: Number of classes.

    Returns:
        int64 [n, n] on the truth's device: rows are the truth, columns the prediction. Sum them over batches and workers.

    Raises:
        ValueError: The shapes differ, or an id is n or above.
    """
    pred, truth = torch.as_tensor(pred_BHW), torch.as_tensor(truth_BHW)
    if pred.shape != truth.shape:
        raise ValueError(f"prediction has shape {tuple(pred.shape)}, truth {tuple(truth.shape)}; they must be equal")
    labelled = truth != IGNORE
    pairs = torch.stack([truth[labelled].long(), pred[labelled].long().to(truth.device)])
    if pairs.numel() and not 0 <= int(pairs.min()) <= int(pairs.max()) < n:
        raise ValueError(f"class ids span {int(pairs.min())} to {int(pairs.max())}; expected 0 to {n - 1}, or {IGNORE} in the truth")
    return torch.bincount(n * pairs[0] + pairs[1], minlength=n * n).view(n, n)


def iou(confusion_CC: Any) -> Tensor:
    """Intersection over union of each class: float64 [n]; nan where a class is neither in the truth nor predicted."""
    counts_CC = torch.as_tensor(confusion_CC).double().cpu()
    both_C = counts_CC.diagonal()
    return both_C / (counts_CC.sum(0) + counts_CC.sum(1) - both_C)


def miou(confusion_CC: Any) -> float:
    """Mean IoU over classes that occur in the truth or the prediction; nan where none does."""
    return float(iou(confusion_CC).nanmean())


def accuracy(confusion_CC: Any) -> float:
    """Share of labelled pixels that are right; nan where none is labelled."""
    counts_CC = torch.as_tensor(confusion_CC).double().cpu()
    return float(counts_CC.diagonal().sum() / counts_CC.sum())


class Calibration:
    """Streaming reliability diagram: how often pixels predicted at a confidence are right (Guo et al., ICML 2017).

    Attributes:
        sums: float64 [3, n_bins] on the CPU: pixels, right pixels, summed confidence.
    """

    def __init__(self, n_bins: int = 15) -> None:
        self.sums = torch.zeros(3, n_bins, dtype=torch.float64)

    def add(self, probabilities_BCHW: Any, truth_BHW: Any) -> None:
        """Adds a batch: probabilities [B, C, H, W], truth [B, H, W] with 255 = ignored. Bin i holds [i/n, (i+1)/n), the last 1 too."""
        confidence, predicted = (x.cpu() for x in torch.as_tensor(probabilities_BCHW).float().max(dim=1))
        truth = torch.as_tensor(truth_BHW).cpu()
        labelled = truth != IGNORE
        confidence, right = confidence[labelled].double(), (predicted == truth)[labelled].double()
        n_bins = self.sums.shape[1]
        bins = (confidence * n_bins).long().clamp_(0, n_bins - 1)
        for row, values in zip(self.sums, (torch.ones_like(right), right, confidence), strict=True):
            row += torch.bincount(bins, weights=values, minlength=n_bins)

    def tensors(self) -> tuple[Tensor, ...]:
        """The running sums themselves; all-reduce them in place to merge workers."""
        return (self.sums,)

    def ece(self) -> float:
        """Expected calibration error: mean over pixels of |accuracy - confidence| of their bin; nan where nothing was added."""
        count, right, confidence = self.sums
        return float((right - confidence).abs().sum() / count.sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: bin edges, pixels, accuracy and mean confidence of each bin (None in empty bins), and the ece."""
        count, right, confidence = self.sums
        ece = self.ece()
        return {
            "ece": None if ece != ece else ece,
            "edges": [i / len(count) for i in range(len(count) + 1)],
            "pixels": [int(c) for c in count],
            "accuracy": [float(r / c) if c else None for r, c in zip(right, count, strict=True)],
            "confidence": [float(s / c) if c else None for s, c in zip(confidence, count, strict=True)],
        }


class ClassReliability:
    """How often the pixels given to each class are right, by confidence: from which confidence on a class can be kept.

    Attributes:
        counts: int64 [2, C, n_bins] on the CPU, by predicted class: pixels, and right ones. Bin i holds confidences [i/n, (i+1)/n).
    """

    def __init__(self, n_classes: int, n_bins: int = 100) -> None:
        self.counts = torch.zeros(2, n_classes, n_bins, dtype=torch.int64)

    @classmethod
    def of(cls, counts: Sequence[Sequence[Sequence[int]]]) -> ClassReliability:
        """From its counts, as an evaluation keeps them."""
        made = cls(0)
        made.counts = torch.tensor(counts, dtype=torch.int64)
        return made

    def add(self, predicted_BHW: Any, confidence_BHW: Any, truth_BHW: Any) -> None:
        """Adds a batch: class ids and their probability [B, H, W], truth [B, H, W] with 255 = ignored."""
        truth = torch.as_tensor(truth_BHW)
        labelled = truth != IGNORE
        predicted, confidence = torch.as_tensor(predicted_BHW)[labelled].long(), torch.as_tensor(confidence_BHW)[labelled].double()
        _, n_classes, n_bins = self.counts.shape
        cells = predicted * n_bins + (confidence * n_bins).long().clamp_(0, n_bins - 1)
        right = predicted == truth[labelled]
        for row, which in zip(self.counts, (cells, cells[right]), strict=True):
            row += torch.bincount(which, minlength=n_classes * n_bins).view(n_classes, n_bins)

    def kept(self) -> Tensor:
        """int64 [2, C, n_bins]: pixels, and right ones, whose confidence reaches the lower edge of each bin."""
        return self.counts.flip(2).cumsum(2).flip(2)

    def thresholds(self, precision: float) -> list[float | None]:
        """Lowest confidence of each class from which its pixels are right as often as wanted, by `SUPPORT` pixels or more; None
        where no confidence reaches that."""
        pixels_CN, right_CN = self.kept()
        enough_CN = (pixels_CN >= SUPPORT) & (right_CN >= precision * pixels_CN)
        n_bins = enough_CN.shape[1]
        return [int(row.int().argmax()) / n_bins if row.any() else None for row in enough_CN]

    def at(self, thresholds: Sequence[float | None]) -> list[tuple[int, int]]:
        """(pixels, right ones) of each class whose confidence reaches its threshold; (0, 0) without a threshold."""
        kept, n_bins = self.kept(), self.counts.shape[2]
        bins = [None if t is None else round(t * n_bins) for t in thresholds]
        return [(0, 0) if b is None else (int(kept[0, c, b]), int(kept[1, c, b])) for c, b in enumerate(bins)]

    def reaches(self, predicted: np.ndarray, confidence: np.ndarray, thresholds: Sequence[float | None]) -> np.ndarray:
        """Which pixels keep their class: bool of the same shape. A class without a threshold keeps none.

        Args:
            predicted: uint8, class ids.
            confidence: float32, their probability.
            thresholds: By class, as `thresholds` gives them.
        """
        n_bins = self.counts.shape[2]
        least_C = np.array([n_bins + 1 if t is None else round(t * n_bins) for t in thresholds])
        bins = np.minimum((confidence.astype(np.float64) * n_bins).astype(np.int64), n_bins - 1)
        kept: np.ndarray = bins >= least_C[predicted]
        return kept

    def to_dict(self, classes: Sequence[str], precisions: Sequence[float] = PRECISIONS) -> list[dict[str, Any]]:
        """JSON-able, one entry a precision: each class's threshold, the precision and the share of its pixels that are kept there."""
        all_C = self.counts[0].sum(1).tolist()
        found = []
        for wanted in precisions:
            thresholds = self.thresholds(wanted)
            at = self.at(thresholds)
            found.append(
                {
                    "precision": wanted,
                    "threshold": dict(zip(classes, thresholds, strict=True)),
                    "reached": {c: right / kept if kept else None for c, (kept, right) in zip(classes, at, strict=True)},
                    "kept": {c: kept / n if n else None for c, (kept, _), n in zip(classes, at, all_C, strict=True)},
                    "kept_of_all": sum(kept for kept, _ in at) / max(1, sum(all_C)),
                }
            )
        return found
