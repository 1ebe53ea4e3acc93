"""What this machine's processor computes in, by OpenVINO. Nothing of PyTorch is imported for it."""

from __future__ import annotations

import importlib
import sys
from typing import Any, cast


def openvino() -> Any:
    """The library, slow to import, and without the part of it that tells its maker of every import and conversion."""
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))
    return importlib.import_module("openvino")


def capabilities() -> list[str] | None:
    """What OpenVINO can do on this CPU; None where it can't be used."""
    try:
        return cast("list[str]", openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    except ImportError:
        return None


def has_bfloat16() -> bool:
    """Whether OpenVINO is here and computes in bfloat16, rather than in float32 without a word."""
    return "BF16" in (capabilities() or ())
