"""What experts were asked for, round by round, and masks of the pool: many small pictures, within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from raysal.archive.uris import join, list_names
from raysal.labels import LabelSet
from raysal.report.gather import Json, Round, Run, rows
from raysal.report.pictures import Limits, fetch_small, in_threads, overlay, under_mask
from raysal.words import number

THUMBS = 24
"""Most thumbnails a round."""

THUMBS_IN_ALL = 240
"""Most thumbnails in the report; with more rounds each shows fewer, so that the page stays light enough to mail."""

THUMB_PX = 168
POOL_TILES = 24
POOL_PX = 256
SHARDS_READ = 12

WORDS = {
    "random start": "drawn by lot",
    "typical start": "one typical image from each group of look-alikes",
    "random": "drawn by lot",
    "bald": "where the model changes its mind when parts of it are switched off (MC dropout)",
    "uncertainty": "where the two branches disagree most",
    "entropy": "where the joint answer of both branches is most undecided",
    "least_confidence": "where the model's first choice is weakest",
    "margin": "where first and second choice are closest",
    "disagreement": "where the branches name different classes on most pixels",
    "ueq": "where the branches disagree and their joint answer is undecided, both by rank over the pool",
    "ueq_pixel": "where the branches disagree and their joint answer is undecided, pixel by pixel",
    "ueq_gated": "where the answer is undecided on pixels that the branches name differently",
    "ueq_product": "where the branches disagree and their joint answer is undecided, multiplied",
    "ueq_cascade": "first the most undecided, of those the ones on which the branches disagree most",
}
"""What each strategy asks for, under the names that `raysal.rounds.choose` writes into a queue."""


@dataclass(frozen=True)
class Asked:
    """One thumbnail. `picture` is uint8 [h, w, 3], or the reason why there is none; `fractions` is float [C], or None."""

    rank: str
    name: str
    uri: str
    score: float
    reasons: tuple[tuple[str, float], ...]
    picture: np.ndarray | str
    fractions: np.ndarray | None


@dataclass(frozen=True)
class Request:
    """What one round asked for: its images in rank order (at most `THUMBS`), of `total`."""

    round: int
    strategy: str
    words: str
    total: int
    images: tuple[Asked, ...]


def requests(run: Run, limits: Limits, n_classes: int) -> list[Request]:
    """One for every round that has chosen images."""
    asking = [r for r in run.rounds if r.chosen]
    most = max(1, min(THUMBS, THUMBS_IN_ALL // max(1, len(asking))))
    found = (
        run.attempt(f"images asked for in round {this.number}", partial(_request, run, this, most, limits, n_classes), None)
        for this in asking
    )
    return [request for request in found if request]


def _request(run: Run, this: Round, most: int, limits: Limits, n_classes: int) -> Request | None:
    shown = this.chosen[:most]
    pictures = fetch_small([str(row.get("uri", "")) for row in shown], THUMB_PX, limits)
    fractions = _fractions(run, this, {str(row.get("id")) for row in shown}, n_classes)
    strategy = str(this.chosen[0].get("strategy") or "")
    images = tuple(_asked(row, picture, fractions) for row, picture in zip(shown, pictures, strict=True))
    return Request(this.number, strategy, WORDS.get(strategy, ""), len(this.chosen), images)


def _asked(row: Json, picture: np.ndarray | str, fractions: Mapping[str, np.ndarray]) -> Asked:
    uri = str(row.get("uri", ""))
    rank = number(row.get("rank"))
    return Asked(
        rank="?" if math.isnan(rank) else f"{rank:.0f}",
        name=uri.rstrip("/").rpartition("/")[2] or uri,
        uri=uri,
        score=number(row.get("score")),
        reasons=tuple(reasons(row)),
        picture=picture,
        fractions=fractions.get(str(row.get("id"))),
    )


def reasons(row: Json) -> list[tuple[str, float]]:
    """The finite numbers behind a choice, by name; pyarrow gives a map as a list of pairs."""
    pairs = row.get("reasons")
    pairs = list(pairs.items()) if isinstance(pairs, Mapping) else pairs or []
    return [(str(name), number(value)) for name, value in pairs if math.isfinite(number(value))]


def _fractions(run: Run, this: Round, ids: set[str], n_classes: int) -> dict[str, np.ndarray]:
    """Predicted class fractions by id, from the scores that this round's choice was made on: those of the round before."""
    before = [r for r in run.rounds if r.number < this.number][-1:]
    for source in [*before, this]:
        table = rows(run, source.scores, f"rounds/{source.number:03d}/scores", ["id", "class_fractions"]) if this.number else None
        if table is None:
            continue
        all_ids = table["id"].to_pylist()
        where = [i for i, id_ in enumerate(all_ids) if id_ in ids]
        found = {all_ids[i]: _shares(table["class_fractions"][i].as_py(), n_classes) for i in where}
        return {id_: shares for id_, shares in found.items() if shares is not None}
    return {}


def _shares(value: object, n_classes: int) -> np.ndarray | None:
    if not isinstance(value, (list, tuple)) or len(value) != n_classes:
        return None
    shares = np.nan_to_num(np.array([number(v) for v in value]))
    return shares if shares.sum() > 0 else None


@dataclass(frozen=True)
class Labeled:
    """One image of the pool under its mask: uint8 [h, w, 3], or the reason why there is no picture."""

    name: str
    uri: str
    confidence: float
    abstained: float
    picture: np.ndarray | str


def pool_masks(run: Run, label_set: LabelSet, limits: Limits, tiles: int = POOL_TILES) -> list[Labeled]:
    """A spread of the masks in ``labels/``; reads few shards and keeps few rows, as the pool may be large."""
    folder = join(run.uri, "labels")
    shards = [name for name in list_names(folder) if name.endswith(".parquet")]
    if not shards:
        return []
    picked = _spread(shards, min(SHARDS_READ, tiles))
    columns = ["uri", "status", "mask_png", "confidence", "abstained"]
    found: list[Json] = []
    for i, name in enumerate(picked):
        table = rows(run, join(folder, name), f"labels/{name}", columns)
        share = (tiles - len(found)) // (len(picked) - i)
        usable = [] if table is None else [k for k, status in enumerate(table["status"].to_pylist()) if status == "ok"]
        found += table.take(_spread(usable, share)).to_pylist() if table is not None and usable and share else []
    by_uri = {str(row["uri"]): row for row in found}
    pictures = in_threads(lambda uri: _overlaid(by_uri[uri], label_set, limits), by_uri)
    return [
        Labeled(uri.rpartition("/")[2] or uri, uri, number(row.get("confidence")), number(row.get("abstained")), picture)
        for (uri, row), picture in zip(by_uri.items(), pictures, strict=True)
    ]


def _overlaid(row: Json, label_set: LabelSet, limits: Limits) -> np.ndarray | str:
    found = under_mask(str(row["uri"]), row.get("mask_png") or b"", limits, POOL_PX)
    return found if isinstance(found, str) else overlay(*found, label_set)


def _spread(values: Sequence[Any], n: int) -> list[Any]:
    """At most n of the values, evenly spread, in order."""
    n = min(n, len(values))
    return [values[i] for i in np.linspace(0, len(values) - 1, n).round().astype(int)] if n else []


def bought_pixels(run: Run, n_classes: int) -> np.ndarray:
    """int64 [C]: labelled pixels of each class over all rounds' labels; zeros where none are known."""
    total = np.zeros(n_classes, dtype=np.int64)
    for row in (row for r in run.rounds for row in r.bought):
        pixels = row.get("class_pixels")
        if isinstance(pixels, list) and len(pixels) == n_classes:
            total += np.array([int(p or 0) for p in pixels], dtype=np.int64)
    return total


def bought_images(run: Run, n_classes: int) -> np.ndarray:
    """float64 [C]: bought images that hold each class; NaN where unknown."""
    rows_ = [row["class_pixels"] for r in run.rounds for row in r.bought if isinstance(row.get("class_pixels"), list)]
    usable = [row for row in rows_ if len(row) == n_classes]
    return np.sum([[float((p or 0) > 0) for p in row] for row in usable], axis=0) if usable else np.full(n_classes, math.nan)
