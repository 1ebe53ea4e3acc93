"""What adds up over an archive of any size, in memory that does not grow with it, and to the same result in any order."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BINS = 4096
FINEST = -20
"""A histogram begins with bins of 2**-20: a millionth of scores that lie in 0..1."""

MOST_KINDS = 200
"""Kinds of failure that are told apart."""

EXAMPLES = 5
LONGEST = 500
"""Characters of a message that are looked at."""

SHARE_EDGES = (0.001, 0.01, 0.05, 0.2, 0.5)
"""Between the bins of a class's share of an image; below the first the class counts as absent."""

ELIDED = "…"
VARYING = re.compile(
    r"b'[^']*'|b\"[^\"]*\"|'[^']*[\d/][^']*'|\"[^\"]*[\d/][^\"]*\""  # quoted bytes, names and addresses
    r"|\b\w+://\S+|(?<!\w)/\S+"
    r"|\b(?:0x)?[0-9a-f]*\d[0-9a-f]{7,}\b|\b[0-9a-f]{8}-[0-9a-f-]{8,}\b",
    re.IGNORECASE,
)
NUMBER = re.compile(r"(?<![\w.])\d[\d.,]*\b")
HTTP = re.compile(r"(?:[:(=]|\b(?:http|status|code|error))\s*[45]\d\d", re.IGNORECASE)
"""The number of an HTTP answer, with what stands before it."""


class Histogram:
    """Counts of numbers in bins of one width, a power of two that doubles as the numbers spread.

    Attributes:
        n: Finite numbers added; others are passed over.
        low, high: The least and the greatest.
    """

    def __init__(self) -> None:
        self.n, self.low, self.high = 0, math.inf, -math.inf
        self._sum, self._exponent = 0.0, FINEST
        self._counts: dict[int, int] = {}

    def add(self, values: np.ndarray) -> None:
        """Adds floats of any shape."""
        values = values[np.isfinite(values)].astype(np.float64)
        if not len(values):
            return
        self.n += len(values)
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        with np.errstate(over="ignore"):
            self._sum += float(values.sum())
            while self._too_fine():
                self._double()
        bins, counts = np.unique(np.floor(np.ldexp(values, -self._exponent)).astype(np.int64), return_counts=True)
        for i, count in zip(bins.tolist(), counts.tolist(), strict=True):
            self._counts[i] = self._counts.get(i, 0) + count

    @property
    def mean(self) -> float:
        """NaN where nothing was added."""
        return self._sum / self.n if self.n else math.nan

    def bars(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """At most `most` + 1 bars from the lowest number to the highest.

        Returns:
            Edges float64 [n + 1] and counts int64 [n]; both empty where nothing was added.
        """
        if not self.n:
            return np.empty(0), np.empty(0, np.int64)
        shift = 0
        while (max(self._counts) >> shift) - (min(self._counts) >> shift) >= most:
            shift += 1
        first, last = min(self._counts) >> shift, max(self._counts) >> shift
        counts = np.zeros(last - first + 1, np.int64)
        for i, count in self._counts.items():
            counts[(i >> shift) - first] += count
        return np.ldexp(np.arange(first, last + 2, dtype=np.float64), self._exponent + shift), counts

    def quantile(self, q: float) -> float:
        """The number that a share q of all are at or below, to the width of a bin; NaN where nothing was added."""
        if not self.n:
            return math.nan
        bins = np.array(sorted(self._counts))
        cumulated = np.cumsum([self._counts[i] for i in bins.tolist()])
        found = bins[min(int(np.searchsorted(cumulated, q * self.n)), len(bins) - 1)]
        return float(np.clip(np.ldexp(found + 0.5, self._exponent), self.low, self.high))

    def _too_fine(self) -> bool:
        low, high = np.ldexp([self.low, self.high], -self._exponent)
        return bool(high - low >= BINS or max(abs(low), abs(high)) >= 2.0**52)  # beyond, the number of a bin is not exact

    def _double(self) -> None:
        self._exponent += 1
        merged: dict[int, int] = {}
        for i, count in self._counts.items():
            merged[i >> 1] = merged.get(i >> 1, 0) + count
        self._counts = merged


class Extremes:
    """The rows with the lowest or the highest value; of equal ones those that came first.

    Args:
        most: Rows kept.
        highest: Whether they are those with the highest value.
    """

    def __init__(self, most: int, highest: bool) -> None:
        self._most, self._sign = most, -1.0 if highest else 1.0
        self._kept: list[tuple[float, Any]] = []

    def add(self, values: np.ndarray, row_of: Callable[[int], Any]) -> None:
        """Adds rows by value, float [n]; NaN passes over. row_of(i) is asked for those only that are kept for now."""
        values = self._sign * values
        bar = self._kept[-1][0] if len(self._kept) == self._most else math.inf
        better = np.flatnonzero(values < bar)
        better = better[np.argsort(values[better], kind="stable")[: self._most]]
        self._kept += [(float(values[i]), row_of(int(i))) for i in better]
        self._kept = sorted(self._kept, key=lambda pair: pair[0])[: self._most]

    @property
    def rows(self) -> list[Any]:
        """Most extreme first."""
        return [row for _, row in self._kept]


class Shares:
    """How much of the images each class covers.

    Attributes:
        n: Images.
        bins: int64 [C, len(SHARE_EDGES) + 1] images by the class's share of them.
    """

    def __init__(self, n_classes: int) -> None:
        self.n, self._sums = 0, np.zeros(n_classes)
        self.bins = np.zeros((n_classes, len(SHARE_EDGES) + 1), np.int64)

    def add(self, fractions_NC: np.ndarray) -> None:
        """Adds images by their shares, float [N, C]."""
        self.n += len(fractions_NC)
        self._sums += fractions_NC.sum(0)
        for i, row in enumerate(np.digitize(fractions_NC, SHARE_EDGES).T):
            self.bins[i] += np.bincount(row, minlength=self.bins.shape[1])

    @property
    def mean(self) -> np.ndarray:
        """float64 [C], NaN where nothing was added."""
        mean: np.ndarray = self._sums / self.n if self.n else np.full(len(self._sums), np.nan)
        return mean


@dataclass
class Kind:
    """Failures that differ in names and numbers only: how many, and the first few as (uri, message)."""

    status: str
    words: str
    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


class Kinds:
    """Failures by status and by kind of reason."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], Kind] = {}

    def add(self, status: str, uri: str, error: str) -> None:
        status, error = status[:24], " ".join(error[:LONGEST].split())
        key = (status, kind_of(status, uri, error))
        if key not in self._kinds and len(self._kinds) >= MOST_KINDS:
            key = ("other", "reasons of many further kinds")
        kind = self._kinds.setdefault(key, Kind(*key))
        kind.count += 1
        if len(kind.examples) < EXAMPLES:
            kind.examples.append((uri[:LONGEST], error))

    @property
    def all(self) -> list[Kind]:
        """Most frequent first."""
        return sorted(self._kinds.values(), key=lambda kind: (-kind.count, kind.status, kind.words))

    def counts(self) -> dict[str, int]:
        """Failures by status, most frequent first."""
        found: dict[str, int] = {}
        for kind in self.all:
            found[kind.status] = found.get(kind.status, 0) + kind.count
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def kind_of(status: str, uri: str, error: str) -> str:
    """A message without what differs from image to image: names, addresses, numbers (but for the status of an HTTP answer)."""
    text = VARYING.sub(ELIDED, error.replace(uri, ELIDED) if uri else error)
    answers = {m.end() for m in HTTP.finditer(text)} if status == "fetch" else set()
    text = NUMBER.sub(lambda m: m[0] if m.end() in answers else ELIDED, text)
    return text.lstrip(f" :{ELIDED}").rstrip() or "no reason given"
