"""Templates of the pages: every value escaped, pictures as data URIs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from raysal.labels import LabelSet
from raysal.report.pictures import heat, jpeg_uri, mask_uri
from raysal.words import duration, percent, significant


def render(template: str, classes: LabelSet, context: Mapping[str, Any]) -> str:
    """A page as HTML text, with the time in it."""
    written = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return environment(classes).get_template(template).render(context, label_set=classes, written=written).lstrip()


def environment(classes: LabelSet) -> Environment:
    """Templates with every value escaped; pictures become data URIs by filters."""
    env = Environment(
        loader=PackageLoader("raysal.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters.update(
        percent=percent,
        duration=duration,
        figures=significant,
        count=lambda n: f"{n:,}",
        photo=lambda image: jpeg_uri(image),
        mask=lambda mask_HW: mask_uri(mask_HW, classes),
        heat=lambda map_HW, top: jpeg_uri(heat(map_HW, top), 88),
        rgb=lambda color: "#" + "".join(f"{int(c):02x}" for c in color),
        is_text=lambda value: isinstance(value, str),
    )
    return env
