"""The charts of a folder of scores or labels, each with the sentence that says how to read it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from raysal.model.metrics import ClassReliability
from raysal.report import survey_figures as figures
from raysal.report.asked import WORDS
from raysal.report.charts import Chart, Easel, audited, measured
from raysal.report.gather import Json, mapping
from raysal.report.places import Map, class_map
from raysal.report.survey import Survey
from raysal.report.tally import Histogram
from raysal.words import number

BARS = 48
PRECISIONS = tuple(p / 100 for p in range(50, 100))
SHARE_NAMES = ("none", "under 1 %", "1–5 %", "5–20 %", "20–50 %", "over 50 %")
"""Of the bins between `raysal.report.tally.SHARE_EDGES`."""

KINDS = {"sol": "sol", "site and drive": "site / drive", "group": "group", "folder": "folder"}


@dataclass(frozen=True)
class Table(Easel):
    """What the sections of a folder of scores or labels are made from."""

    notes: Survey

    @property
    def survey(self) -> Survey:
        return self.notes


def distributions(table: Table) -> list[Chart]:
    """A histogram of each score, or of confidence and abstention; how much of the images each class covers."""
    found, charts = table.survey, list[Chart]()
    for name, histogram in found.distributions.items():
        if histogram.n and not (name == "abstained" and histogram.high == 0):
            charts += _distribution(table, name, histogram)
    if found.shares.n:
        charts += table.draw(
            "class_shares", "How much of an image each class covers (% of the images)",
            "Each row shares out the images by how much of them the class covers: read from left (absent, or under 0.1 %) to right (most "
            "of the image). On the right the class's mean share over all images.",
            lambda t: figures.share_bins(table.classes, table.label_set.colors, found.shares.bins, found.shares.mean, SHARE_NAMES, t),
            wide=True,
        )  # fmt: skip
    return charts


def _distribution(table: Table, name: str, histogram: Histogram) -> list[Chart]:
    said = name.replace("_", " ")
    marks = {"median": histogram.quantile(0.5), "10 %": histogram.quantile(0.1), "90 %": histogram.quantile(0.9)}
    labels = table.survey.kind == "labels"
    if name == "confidence":
        say = "How sure the model is of an image: the mean over the pixels that have a class. Images far left are worth a look."
    elif name == "abstained":
        say = "The share of an image's pixels without a class: not valid, or less sure than asked for."
    else:
        say = f"High means worth asking about: {WORDS[name]}." if name in WORDS else "High means worth asking about."
    say += f" Half of the {histogram.n:,} images lie left of the line; between the dashed ones lie eight of ten. Mean {histogram.mean:.3g}."
    edges, counts_B = histogram.bars(min(BARS, max(8, round(2 * histogram.n**0.5))))
    limits = (0.0, 1.0) if labels else None
    title = f"{said[:1].upper()}{said[1:]}{' of the masks' if name == 'confidence' else ''}"
    return table.draw(f"distribution_{_file(name)}", title, say, lambda t: figures.histogram(edges, counts_B, marks, said, limits, t))


def _file(name: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "_" for c in name)[:40]


def map_of(table: Table) -> tuple[list[Chart], Map | None]:
    """The class map, where there is more than one place to compare."""
    found = class_map(table.survey.groups)
    if found is None or len(found.labels) < 2:
        return [], found
    kind = KINDS[found.kind]
    say = (
        "A column is a place, a row a class: the darker a cell (the lighter, on dark ground), the more of the images taken there the class "
        "covers, by the model's own masks. The bars above count the images; few of them say little."
    )
    if found.unknown:
        say += f" {found.unknown:,} images are left out, as the manifest does not tell their {found.kind}."
    charts = table.draw(
        "class_map", f"Mean share of each class, by {found.kind}", say,
        lambda t: figures.class_map(kind, found.labels, table.classes, table.label_set.colors, found.counts, found.shares, t), wide=True,
    )  # fmt: skip
    return charts, found


@dataclass(frozen=True)
class Curve:
    """Coverage against precision on the val split: float64 [P] each, in 0..1; `right` is NaN where nothing is kept."""

    wanted: np.ndarray
    kept: np.ndarray
    right: np.ndarray


def curve(trust: Json) -> Curve | None:
    """From the counts of the evaluation beside the masks; None where it has none.

    Raises:
        ValueError: The counts are no counts by class and confidence.
    """
    raw = mapping(trust.get("val")).get("reliability")
    if raw is None:
        return None
    counts = np.array(raw, dtype=np.int64)
    if counts.ndim != 3 or counts.shape[0] != 2 or not counts.size or counts.min() < 0 or (counts[1] > counts[0]).any():
        raise ValueError(f"counts of shape {counts.shape} are not pixels and right pixels by class and confidence")
    reliability = ClassReliability.of(counts.tolist())
    kept_right = np.array([np.sum(reliability.at(reliability.thresholds(p)), axis=0) for p in PRECISIONS], np.float64)
    kept_P, right_P = kept_right.T
    all_right = np.divide(right_P, kept_P, out=np.full(len(kept_P), np.nan), where=kept_P > 0)
    return Curve(np.array(PRECISIONS), kept_P / max(1, int(counts[0].sum())), all_right)


def trust(table: Table) -> list[Chart]:
    """Coverage against precision, then what else the evaluation and the audit say."""
    found, charts = table.survey, list[Chart]()
    on_val = found.attempt("coverage against precision", partial(curve, found.trust), None)
    audit = mapping(found.trust.get("audit"))
    if on_val is not None:
        charts += _coverage(table, on_val, audit)
    val = mapping(found.trust.get("val"))
    return charts + measured(table, val) + audited(table, audit)


def _coverage(table: Table, on_val: Curve, audit: Json) -> list[Chart]:
    found = table.survey
    entries = audit.get("abstention")
    points = (
        [(number(mapping(e).get("reached_of_all")), number(mapping(e).get("kept_of_all"))) for e in entries]
        if isinstance(entries, list)
        else []
    )
    points = [point for point in points if np.isfinite(point).all()]
    in_use = None
    if np.isfinite(found.precision):
        in_use = (found.precision, number(mapping(found.trust.get("kept")).get("kept_of_all")), found.kept / max(1.0, found.pixels))
    say = (
        "The more pixels are to be right (further right), the fewer can keep a class: those less sure than their class's threshold stay "
        "open, and so does all of a class that is nowhere right often enough. The line is the val split's: thresholds were set and "
        "measured on its images, which are not this archive's, so it says what to expect and proves nothing here."
    )
    say += " The diamonds are what the same thresholds came to on random images of this archive." if points else " Only an audit can tell."
    say += (
        f" In use here: {100 * in_use[0]:g} %, which left {100 * in_use[2]:.1f} % of this archive's pixels with a class."
        if in_use
        else " No threshold is in use here: every valid pixel has a class."
    )
    return table.draw(
        "coverage", "Coverage against precision", say, lambda t: figures.coverage(on_val.wanted, on_val.kept, in_use, points, t), wide=True
    )
