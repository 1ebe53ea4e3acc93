"""Which images of an archive a manifest takes: by mission, camera, sol, place, sequence, size and kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from raysal.archive.names import KINDS, Product
from raysal.errors import InputError

TAKEN = frozenset({"image", "tile"})
"""Kinds that are taken unless asked otherwise."""

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Range:
    """Whole numbers from `low` to `high`, both included; None is open."""

    low: int | None = None
    high: int | None = None

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and (self.low is None or number >= self.low) and (self.high is None or number <= self.high)


@dataclass(frozen=True)
class Filters:
    """What to take. An image of which the name does not tell what a filter asks is left out, and counted, like any other.

    Attributes:
        missions, sequences: Names or patterns with * and ?; any case. Empty takes all.
        cameras: The same; a name stands for all below it, so navcam takes navcam_left and navcam_right.
        sols, sites, drives: Ranges; an image in one of them is taken. Empty takes all.
        size_bytes: Of the file.
        kinds: Of `raysal.archive.names.KINDS`.
    """

    missions: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    sols: tuple[Range, ...] = ()
    sites: tuple[Range, ...] = ()
    drives: tuple[Range, ...] = ()
    sequences: tuple[str, ...] = ()
    size_bytes: Range = field(default_factory=Range)
    kinds: frozenset[str] = TAKEN

    def against(self, product: Product) -> str | None:
        """Why an image of this name is left out: its kind, or the filter's name; None where it is wanted."""
        if product.kind not in self.kinds:
            return product.kind
        texts = (("mission", self.missions), ("camera", self.cameras), ("sequence", self.sequences))
        for name, patterns in texts:
            if patterns and not _fits(getattr(product, name), patterns, below=name == "camera"):
                return name
        for name, ranges in (("sol", self.sols), ("site", self.sites), ("drive", self.drives)):
            if ranges and not any(getattr(product, name) in wanted for wanted in ranges):
                return name
        return None

    def against_size(self, size: int | None) -> str | None:
        """``size`` where a file of so many bytes, or of a size that nobody knows, is left out."""
        return None if self.size_bytes == Range() or size in self.size_bytes else "size"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kinds": sorted(self.kinds)}


def ranges(texts: Iterable[str], option: str) -> tuple[Range, ...]:
    """Ranges as people write them: ``100``, ``100-200``, ``100-``, ``-200``, several with commas. Raises InputError."""
    found = []
    for text in (part.strip() for given in texts for part in given.split(",")):
        m = re.fullmatch(r"(\d*)(-?)(\d*)", text, re.ASCII)
        if not m or not (m[1] or m[3]):
            raise InputError(f"{option} {text!r} is no range; write 100, 100-200, 100- or -200")
        low = int(m[1]) if m[1] else None
        high = low if not m[2] else int(m[3]) if m[3] else None
        if low is not None and high is not None and low > high:
            raise InputError(f"{option} {text!r}: the range ends before it begins; write {high}-{low}")
        found.append(Range(low, high))
    return tuple(found)


def size(text: str | None, option: str) -> int | None:
    """Bytes as people write them: ``2000``, ``10k``, ``2M``, ``1G`` (powers of ten). Raises InputError."""
    if text is None:
        return None
    m = re.fullmatch(r"(\d+)([kMG]?)B?", text.strip(), re.ASCII)
    if not m:
        raise InputError(f"{option} {text!r} is no size; write bytes, or 10k, 2M, 1G")
    return int(m[1]) * UNITS[m[2]]


def kinds(more: Sequence[str], fewer: Sequence[str]) -> frozenset[str]:
    """The kinds to take: those of `TAKEN`, and `more`, without `fewer`; singular or plural. Raises InputError."""
    return (TAKEN | _kinds(more, "--with")) - _kinds(fewer, "--without")


def _kinds(texts: Sequence[str], option: str) -> frozenset[str]:
    names = [name.strip().lower() for text in texts for name in text.split(",")]
    found = {name if name in KINDS else name.removesuffix("s") for name in names}
    if wrong := sorted(found - set(KINDS)):
        raise InputError(f"{option} {wrong[0]!r} is no kind of product; there are {', '.join(KINDS)}")
    return frozenset(found)


def _fits(value: str | None, patterns: Iterable[str], below: bool) -> bool:
    if value is None:
        return False
    value = value.lower()
    return any(fnmatchcase(value, p.lower()) or (below and fnmatchcase(value, f"{p.lower()}_*")) for p in patterns)
