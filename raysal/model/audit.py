"""How good masks are on images that nobody labelled, estimated from a few random ones that somebody did.

What the model predicts is known for every image of the pool; what is true, only for the audited ones. So the audit says how each
predicted class divides into true classes, the pool's own predictions say how much of each there is, and the product is the pool's
confusion (post-stratification; Cochran, Sampling Techniques, 3rd ed., 5A.8):

    N[t, p] = P[p] * A[t, p] / sum_t A[t, p]         IoU_c = N[c, c] / (N[c, :] + N[:, c] - N[c, c])

with A the audit's confusion, rows truth, and P[p] the pool's pixels predicted as p. Intervals come from drawing whole images again
(bias-corrected and accelerated bootstrap; Efron, 1987), as pixels of one image are no independent witnesses.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 2000
"""Of the bootstrap; the interval's ends then move by about a hundredth of its width between two seeds."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval; the ends are nan where the audit can't say."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """JSON form; what is not known is null."""
        return {k: None if np.isnan(v) else round(float(v), 6) for k, v in vars(self).items()}


def pool_confusion(audit_CC: np.ndarray, predicted_C: np.ndarray) -> np.ndarray:
    """N of the module's head: float64 [..., C, C]. Classes that the audit saw no prediction of are left out (their column is 0).

    Args:
        audit_CC: [..., C, C] pixels, rows truth, columns prediction.
        predicted_C: [C] pixels of the pool by predicted class.
    """
    audit_CC = np.asarray(audit_CC, dtype=np.float64)
    seen_C = audit_CC.sum(axis=-2, keepdims=True)
    return predicted_C * np.divide(audit_CC, seen_C, out=np.zeros_like(audit_CC), where=seen_C > 0)


def class_iou(confusion_CC: np.ndarray) -> np.ndarray:
    """IoU of each class [..., C]; nan where a class is neither true nor predicted."""
    both_C = np.diagonal(confusion_CC, axis1=-2, axis2=-1)
    either_C = confusion_CC.sum(-1) + confusion_CC.sum(-2) - both_C
    return np.divide(both_C, either_C, out=np.full_like(both_C, np.nan), where=either_C > 0)


def estimate(audit_NCC: np.ndarray, predicted_C: np.ndarray, seed: int = 0) -> tuple[Estimate, list[Estimate]]:
    """mIoU of the pool, and the IoU of each class.

    Args:
        audit_NCC: [n, C, C] pixels of each audited image, rows truth, columns prediction; images drawn at random from the pool.
        predicted_C: [C] pixels of the whole pool by predicted class.
        seed: Of the bootstrap.

    Returns:
        The mean over classes that are true or predicted somewhere in the audit, and each class (nan where it is not).

    Raises:
        ValueError: No image.
    """
    audit_NCC, predicted_C = np.asarray(audit_NCC, np.float64), np.asarray(predicted_C, np.float64)
    n, classes = audit_NCC.shape[:2]
    if n == 0:
        raise ValueError("an audit needs at least one labelled image")

    def of(draws: np.ndarray, axis: int = -1) -> np.ndarray:
        """Values [C + 1, ...] of resamples, whose image numbers lie along the last axis."""
        draws = np.asarray(draws).astype(np.int64)
        counts = np.zeros((*draws.shape[:-1], n))
        np.add.at(counts, (*np.indices(draws.shape)[:-1], draws), 1)
        iou = class_iou(pool_confusion(np.einsum("...n,nij->...ij", counts, audit_NCC), predicted_C))
        iou = np.moveaxis(iou, -1, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # no class at all in a resample
            return np.concatenate([np.nanmean(iou, axis=0)[None], iou])

    values = of(np.arange(n))
    ends = _intervals(of, n, values, seed)
    found = [Estimate(float(v), *e) for v, e in zip(values, ends, strict=True)]
    return found[0], found[1 : classes + 1]


def _intervals(of: Any, n: int, values: np.ndarray, seed: int) -> list[tuple[float, float]]:
    """95% ends of each value, in [0, 1]; nan for one image, or where the value itself is."""
    if n == 1:
        return [(float("nan"), float("nan"))] * len(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a value that never moves has no acceleration: the interval is its point
        drawn = stats.bootstrap(
            (np.arange(n),), of, vectorized=True, n_resamples=RESAMPLES, batch=500, rng=np.random.default_rng(seed), method="BCa"
        )
    low, high = drawn.confidence_interval
    spread = drawn.bootstrap_distribution
    ends = []
    for value, a, b, row in zip(values, low, high, spread, strict=True):
        if np.isnan(value):
            ends.append((float("nan"), float("nan")))
        elif np.isnan(a) or np.isnan(b):  # resamples without the class, or none that differ
            a, b = np.nanquantile(row, [0.025, 0.975])
            ends.append((float(a), float(b)))
        else:
            ends.append((float(a), float(b)))
    return ends
