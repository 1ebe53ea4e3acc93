"""How good masks are on images that nobody labelled, estimated from a few random ones that somebody did.

What the model predicts is known for every image of the pool; what is true, only for the audited ones. So the audit says how each
predicted class divides into true classes, the pool's own predictions say how much of each there is, and the product is the pool's
confusion (post-stratification; Cochran, Sampling Techniques, 3rd ed., 5A.8):

    N[t, p] = P[p] * A[t, p] / (sum_t A[t, p] + blank[p])        IoU_c = N[c, c] / (N[c, :] + N[:, c] - N[c, c])

with A the audit's confusion, rows truth, blank[p] its pixels predicted as p that the expert left blank, and P[p] the pool's pixels
predicted as p. Intervals come from drawing whole images again, as pixels of one image are no independent witnesses. They are percentiles
of the bootstrap, expanded for the few images that there are, as the plain ones are too short by the same factor as a normal interval with
the variance divided by n beside a t interval (Hesterberg, What Teachers Should Know about the Bootstrap, The American Statistician 69,
2015). They shrink by sqrt(1 - n / pool) where the audit is a good part of the pool.

A class that few audited images show is not known: its IoU hangs on single images, and no resampling tells what the others would say. It
gets no number and is no part of the mean, which says how many classes it is of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 2000
"""Of the bootstrap; the interval's ends then move by about a hundredth of its width between two seeds."""

LEAST_IMAGES = 5
"""Audited images that must show a class before its IoU is stated."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval; nan where the audit can't say."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """JSON form; what is not known is null."""
        return {k: None if np.isnan(v) else round(float(v), 6) for k, v in vars(self).items()}


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def pool_confusion(audit_CC: np.ndarray, blank_C: np.ndarray, predicted_C: np.ndarray) -> np.ndarray:
    """N of the module's head: float64 [..., C, C]; columns of classes that the audit saw no prediction of are 0.

    Args:
        audit_CC: [..., C, C] pixels, rows truth, columns prediction.
        blank_C: [..., C] pixels without a truth, by prediction.
        predicted_C: [C] pixels of the pool by prediction.
    """
    audit_CC = np.asarray(audit_CC, dtype=np.float64)
    seen_C = (audit_CC.sum(axis=-2) + blank_C)[..., None, :]
    return predicted_C * np.divide(audit_CC, seen_C, out=np.zeros_like(audit_CC), where=seen_C > 0)


def class_iou(confusion_CC: np.ndarray) -> np.ndarray:
    """IoU of each class [..., C]; nan where a class is neither true nor predicted."""
    both_C = np.diagonal(confusion_CC, axis1=-2, axis2=-1)
    either_C = confusion_CC.sum(-1) + confusion_CC.sum(-2) - both_C
    return np.divide(both_C, either_C, out=np.full_like(both_C, np.nan), where=either_C > 0)


def estimate(
    audit_NCC: np.ndarray, blank_NC: np.ndarray, predicted_C: np.ndarray, population: int, seed: int = 0
) -> tuple[Estimate, list[Estimate]]:
    """mIoU of the pool, and the IoU of each class.

    Args:
        audit_NCC: [n, C, C] pixels of each audited image, rows truth, columns prediction; images drawn at random from the pool.
        blank_NC: [n, C] their valid pixels without a truth, by prediction.
        predicted_C: [C] valid pixels of the whole pool, by prediction.
        population: Images of the pool, the audited ones among them.
        seed: Of the bootstrap.

    Returns:
        The mean over the classes that are known, and each class: those that at least LEAST_IMAGES audited images show.

    Raises:
        ValueError: No image.
    """
    audit_NCC, blank_NC = np.asarray(audit_NCC, np.float64), np.asarray(blank_NC, np.float64)
    n, classes = audit_NCC.shape[:2]
    if n == 0:
        raise ValueError("an audit needs at least one labelled image")
    known = np.flatnonzero((audit_NCC.sum(2) > 0).sum(0) >= min(LEAST_IMAGES, population))
    if len(known) == 0:
        return UNKNOWN, [UNKNOWN] * classes

    def of(draws: np.ndarray, axis: int = -1) -> np.ndarray:
        """Mean and known classes [k + 1, ...] of resamples, whose image numbers lie along the last axis."""
        draws = np.asarray(draws).astype(np.int64)
        times = np.zeros((*draws.shape[:-1], n))
        np.add.at(times, (*np.indices(draws.shape)[:-1], draws), 1)
        audit, blank = np.einsum("...n,nij->...ij", times, audit_NCC), np.einsum("...n,ni->...i", times, blank_NC)
        iou = np.nan_to_num(class_iou(pool_confusion(audit, blank, predicted_C)))[..., known]
        return np.moveaxis(np.concatenate([iou.mean(-1, keepdims=True), iou], axis=-1), -1, 0)

    values = of(np.arange(n))
    shrink = math.sqrt(max(0.0, 1 - n / population))
    found = [
        Estimate(float(v), float(v - shrink * (v - low)), float(v + shrink * (high - v)))
        for v, (low, high) in zip(values, _intervals(of, n, values, seed), strict=True)
    ]
    by_class = dict(zip(known.tolist(), found[1:], strict=True))
    return found[0], [by_class.get(c, UNKNOWN) for c in range(classes)]


def _intervals(of: Any, n: int, values: np.ndarray, seed: int) -> list[tuple[float, float]]:
    """95% ends of each value; the value itself where resamples never differ from it."""
    if n == 1:  # only a pool of one image is known by one
        return [(float(v), float(v)) for v in values]
    outside = float(stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1)))  # each end; 0.025 where n is large
    drawn = stats.bootstrap(
        (np.arange(n),),
        of,
        vectorized=True,
        confidence_level=1 - 2 * outside,
        n_resamples=RESAMPLES,
        batch=500,
        rng=np.random.default_rng(seed),
        method="percentile",
    )
    ends = np.minimum(drawn.confidence_interval.low, values), np.maximum(drawn.confidence_interval.high, values)
    return list(zip(*(e.tolist() for e in ends), strict=True))
