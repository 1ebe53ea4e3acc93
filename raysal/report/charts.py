"""A chart of the page in both themes, and the charts of trust, which runs and folders of masks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from raysal.archive.uris import join, write_bytes
from raysal.labels import LabelSet
from raysal.report import figures
from raysal.report.gather import Json, Notes, mapping
from raysal.report.pictures import png_uri
from raysal.report.theme import DARK, LIGHT, Theme, png
from raysal.words import number


@dataclass(frozen=True)
class Chart:
    """One figure as data URIs for light and dark ground; the light one also lies beside the page as ``name.png``."""

    name: str
    title: str
    caption: str
    light: str
    dark: str
    wide: bool


@dataclass(frozen=True)
class Easel:
    """What charts are drawn with: where notes go, the classes, and the folder that figures are put in."""

    notes: Notes
    label_set: LabelSet
    folder: str

    def draw(self, name: str, title: str, caption: str, work: Callable[[Theme], Figure], wide: bool = False) -> list[Chart]:
        """The chart in both themes; no chart, and a note, where its numbers can't be drawn."""

        def both() -> list[Chart]:
            light, dark = png(work(LIGHT)), png(work(DARK))
            write_bytes(join(self.folder, f"{name}.png"), light)
            return [Chart(name, title, caption, png_uri(light), png_uri(dark), wide)]

        return self.notes.attempt(f"figure {name}", both, [])

    @property
    def classes(self) -> tuple[str, ...]:
        return self.label_set.classes


def measured(easel: Easel, metrics: Json) -> list[Chart]:
    """Confusion and calibration, as an evaluation on the val split found them."""
    charts: list[Chart] = []
    if metrics.get("confusion"):
        charts += easel.draw(
            "confusion", "What is taken for what (% of the expert's pixels)",
            "Each row shares out the pixels that experts gave to one class: a strong diagonal is right, a strong cell off it is a mix-up "
            "of the row's class with the column's.",
            lambda t: figures.confusion(easel.classes, easel.label_set.colors, np.array(metrics["confusion"], dtype=np.float64), t),
        )  # fmt: skip
    calibration = mapping(metrics.get("calibration"))
    if calibration.get("pixels"):
        pixels_B, accuracy_B, confidence_B = (
            np.array([number(v) for v in calibration.get(key) or []]) for key in ("pixels", "accuracy", "confidence")
        )
        charts += easel.draw(
            "reliability", "Can its confidence be believed?",
            "Where the model says 80 % sure, the dots show how often it is right; on the dashed line the two agree. The bars below show "
            "how many pixels each confidence stands for.",
            lambda t: figures.reliability(np.nan_to_num(pixels_B), accuracy_B, confidence_B, number(calibration.get("ece")), t),
        )  # fmt: skip
    return charts


def audited(easel: Easel, found: Json) -> list[Chart]:
    """What an audit estimates of masks: mIoU and each class, with intervals."""
    if not found:
        return []
    estimates = [mapping(found.get("miou")), *(mapping(mapping(found.get("iou")).get(c)) for c in easel.classes)]
    value_N, low_N, high_N = (np.array([number(e.get(key)) for e in estimates]) for key in ("value", "low", "high"))
    images, population = found.get("images"), number(found.get("population"))
    return easel.draw(
        "audit", "How good are the masks that nobody drew?",
        f"Experts labelled {len(images) if isinstance(images, list) else 0} random images of {population:,.0f} that the model never learnt "
        "from. The dot is what those say about all of them, the bar where the truth lies with 95 % confidence (more images make it "
        "shorter); n/a: too few of them show the class.",
        lambda t: figures.intervals(("mean", *easel.classes), ((128, 128, 128), *easel.label_set.colors), value_N, low_N, high_N, t),
    )  # fmt: skip


def thresholds(settled: object, audit: Json, classes: tuple[str, ...]) -> list[dict]:
    """Rows of the table of abstention: what is kept for a wanted share of right pixels, settled on val and, audited, what it came to.

    Args:
        settled: The ``abstention`` of an evaluation, in any shape.
        audit: An audit, empty where there was none.
        classes: Of the label set.
    """
    entries = audit.get("abstention")
    by_wanted = {number(mapping(e).get("precision")): mapping(e) for e in (entries if isinstance(entries, list) else [])}
    found = []
    for entry in map(mapping, settled if isinstance(settled, list) else []):
        wanted, at = number(entry.get("precision")), mapping(entry.get("threshold"))
        checked = by_wanted.get(wanted, {})
        found.append(
            {
                "wanted": wanted,
                "threshold": [number(at.get(c)) for c in classes],
                "kept": number(entry.get("kept_of_all")),
                "audited": number(checked.get("reached_of_all")),
                "audited_kept": number(checked.get("kept_of_all")),
            }
        )
    return found
