"""Numbers as people say them; a dash where there is none."""

from __future__ import annotations

import math

import numpy as np


def number(value: object) -> float:
    """A finite float, or NaN for anything else (null, text, infinity)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # JSON's integers have no end
        return math.nan


def percent(value: object, digits: int = 1) -> str:
    """0.61234 -> "61.2 %"; a dash where there is no number."""
    n = number(value)
    return "–" if math.isnan(n) else f"{100 * n:.{digits}f}\N{NO-BREAK SPACE}%"


def significant(value: object) -> str:
    """Three significant figures; a dash where there is no number."""
    n = number(value)
    return "–" if math.isnan(n) else f"{n:.3g}"


def duration(seconds: object) -> str:
    """A time as people say it: "under 1 s", "42 s", "12 min 4 s", "3 h 20 min"."""
    n = number(seconds)
    if math.isnan(n):
        return "–"
    if n < 1:
        return "under 1 s"
    if n < 60:
        return f"{n:.0f} s" if n >= 9.95 else f"{n:.1f} s"
    minutes, rest = divmod(round(n), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
