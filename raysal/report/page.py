"""One HTML file that tells what a run did: styles and pictures inside it, no scripts, nothing fetched from anywhere."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow.compute as pc

import raysal
from raysal.archive.uris import join, write_bytes
from raysal.labels import LabelSet
from raysal.report import html
from raysal.report.asked import Labeled, pool_masks, requests
from raysal.report.charts import thresholds
from raysal.report.examples import Examples, examples
from raysal.report.gallery import write_sheets
from raysal.report.gather import Run, label_set, mapping, read_run, rows
from raysal.report.pictures import Limits, overlay
from raysal.report.sections import SECTIONS, Desk, full_miou, labels_of, rates, times
from raysal.words import number

REASONS_SHOWN = 5
HERO_LEAST_PX = 380
"""Images with a shorter longer side are not blown up to half the page; several stand beside each other instead."""

HERO_COLUMNS = 6


@dataclass(frozen=True)
class Trouble:
    """Images of one table that became no mask or score: their status, how many, and a few of the reasons."""

    where: str
    status: str
    count: int
    reasons: tuple[tuple[str, str], ...]


def build_run(uri: str, folder: str) -> str:
    """Writes the page of a run and its figures as PNG, whatever stage the run has come to.

    Args:
        uri: Run folder.
        folder: Where to write.

    Returns:
        URI of index.html.
    """
    page = join(folder, "index.html")
    write_bytes(page, render(read_run(uri), folder).encode())
    return page


def render(run: Run, folder: str) -> str:
    """The page of a run as HTML text; figures are written into the folder on the way."""
    seen = _examples(run)
    classes = seen.label_set if seen else label_set(run)
    desk = Desk(run, classes, folder)
    limits = Limits(run.config.data.max_bytes, run.config.data.max_pixels) if run.config else Limits()
    asked = requests(run, limits, classes.n_classes)
    masks: list[Labeled] = run.attempt("masks of the pool", lambda: pool_masks(run, classes, limits), [])
    context: dict[str, Any] = {
        "run": run,
        "source": run.uri,
        "head": headline(run, classes),
        "hero": _hero(seen, masks, classes),
        "charts": {name: run.attempt(f"section {name}", partial(section, desk), []) for name, section in SECTIONS.items()},
        "seen": seen,
        "asked": asked,
        "masks": masks,
        "trouble": trouble(run),
        "warnings": warnings_of(run),
        "table": _table(run),
        "thresholds": thresholds(run.finished[-1].metrics.get("abstention") if run.finished else None, run.audit, classes.classes),
        "facts": facts(run),
    }
    write_sheets(desk, seen, asked, masks)
    return html.render("page.html.j2", classes, context)


def headline(run: Run, classes: LabelSet) -> dict[str, Any]:
    """Title and the four numbers that stand on the first screen."""
    done, full = run.finished, full_miou(run)
    last = done[-1] if done else None
    best = max(done, key=lambda r: number(r.metrics["miou"])) if done else None
    miou = number(last.metrics["miou"]) if last else math.nan
    spent = times(run)
    labels = labels_of(last) if last else sum(len(r.bought) for r in run.rounds)
    return {
        "title": run.config.name if run.config else run.uri.rstrip("/").rpartition("/")[2],
        "miou": miou,
        "of_full": miou / full if full else math.nan,
        "full": full,
        "best": best if best is not last else None,
        "first": number(done[0].metrics["miou"]) if len(done) > 1 else math.nan,
        "labels": labels,
        "share": labels / run.pool if run.pool else math.nan,
        "seconds": sum(s for stages in spent.values() for s in stages.values()) if spent else math.nan,
        "speed": rates(run),
        "planned": run.config.loop.rounds + 1 if run.config else None,
        "masked": _masked(run),
    }


def _masked(run: Run) -> int | None:
    table = rows(run, join(run.uri, "labels"), "labels", ["status"])
    return None if table is None else int(pc.sum(pc.equal(table["status"], "ok")).as_py() or 0)


def _examples(run: Run) -> Examples | None:
    cfg, checkpoint = run.config, next((c for c in (r.checkpoint for r in reversed(run.rounds)) if c), None)
    if cfg is None or checkpoint is None:
        return None
    return run.attempt("val images", lambda: examples(run, cfg, checkpoint), None)


def _hero(seen: Examples | None, masks: list[Labeled], classes: LabelSet) -> dict[str, Any]:
    """The big picture: one typical val image, or a row of them where they are small; without val images, masks of the pool."""
    tiles = [m for m in masks if not isinstance(m.picture, str)][:HERO_COLUMNS]
    if seen is None:
        return {"tiles": tiles, "many": (), "one": None, "tinted": None}
    one = seen.typical
    small = max(one.image.shape[:2]) < HERO_LEAST_PX
    return {"tiles": [], "many": seen.spread if small else (), "one": one, "tinted": overlay(one.image, one.mask, classes, 0.62)}


def trouble(run: Run) -> list[Trouble]:
    """Rows that are not ok, of the pool's masks and of the newest scores."""
    sources = [("masks of the pool", join(run.uri, "labels"))]
    sources += [(f"scores of round {r.number}", r.scores) for r in reversed(run.rounds)]
    found: list[Trouble] = []
    for where, uri in sources:
        table = rows(run, uri, where, ["uri", "status", "error"])
        if table is None:
            continue
        bad = table.filter(pc.not_equal(table["status"], "ok")).to_pylist()
        for status, count in Counter(str(row["status"]) for row in bad).most_common():
            reasons = [(str(row["uri"]), str(row["error"] or "")) for row in bad if str(row["status"]) == status]
            found.append(Trouble(where, status, count, tuple(reasons[:REASONS_SHOWN])))
        if where.startswith("scores"):
            break
    return found


def warnings_of(run: Run) -> list[str]:
    """Warnings that the run kept, in run.json or in a stage's marker; each once."""
    kept = [run.record.get("warnings")]
    for this in run.rounds:
        kept += [source.get("warnings") for stage in this.stages.values() for source in (stage, mapping(stage.get("outputs")))]
    return list(dict.fromkeys(str(w) for warnings in kept if isinstance(warnings, list) for w in warnings))


def _table(run: Run) -> list[dict[str, Any]]:
    """A row a round, for readers who want the numbers."""
    full, spent = full_miou(run), times(run)
    return [
        {
            "round": r.number,
            "labels": labels_of(r),
            "share": labels_of(r) / run.pool if run.pool else math.nan,
            "miou": number(r.metrics["miou"]),
            "of_full": number(r.metrics["miou"]) / full if full else math.nan,
            "accuracy": number(r.metrics.get("accuracy")),
            "ece": number(mapping(r.metrics.get("calibration")).get("ece")),
            "doubt": number(r.metrics.get("pool_uncertainty")),
            "seconds": sum(spent[f"round {r.number}"].values()) if f"round {r.number}" in spent else math.nan,
        }
        for r in run.finished
    ]


def facts(run: Run) -> list[tuple[str, str]]:
    """Where everything came from: digests, versions, times, as (name, value)."""
    found = [("run folder", run.uri)]
    if run.config:
        found += [("config digest", run.config.digest()), ("data set", run.config.data.root or run.config.data.reader)]
    found += _flat(run.record)
    for r in run.rounds:
        digest = r.metrics.get("checkpoint_digest")
        found += [(f"checkpoint of round {r.number}", str(digest))] if digest else []
    return [*dict.fromkeys(found), ("report written by", f"raysal {raysal.__version__}")]


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _flat(mapping(value), f"{prefix}{key} ")
        elif isinstance(value, (str, int, float)) and key != "config_digest":
            found.append((f"{prefix}{key}".replace("_", " "), str(value)))
    return found[:40]
