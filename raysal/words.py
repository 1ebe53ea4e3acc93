"""Numbers as people say them; a dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping

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


def amounts(resources: Mapping[str, float]) -> str:
    """Resources as Ray names them, memory in bytes: "2 CPU, 1 GPU, 4.0 GB of memory"."""
    return ", ".join(f"{n / 1e9:.1f} GB of memory" if what == "memory" else f"{n:g} {what}" for what, n in resources.items())
