"""The page of a folder of scores or labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

import raysal
from raysal.archive.tables import scan_table
from raysal.archive.uris import join, write_bytes
from raysal.errors import InputError
from raysal.report import html
from raysal.report.charts import thresholds
from raysal.report.gallery import write_tiles
from raysal.report.gather import Json, mapping
from raysal.report.pictures import Limits, fetch_small, in_threads, overlay, under_mask
from raysal.report.places import from_manifest
from raysal.report.survey import Progress, Shown, Survey, survey
from raysal.report.survey_sections import Table, distributions, map_of, trust
from raysal.stream.output import SUCCESS
from raysal.words import number

SIDE_PX = 300
MASK_ROWS = 16
"""Masks in memory at once while one of a shard is looked for."""

KINDS_SHOWN = 40


@dataclass(frozen=True)
class Look:
    """One image of the galleries: uint8 [h, w, 3] without and with its mask, or the reason why there is no picture."""

    of: Shown
    name: str
    photo: np.ndarray | str
    tinted: np.ndarray | None


def build_survey(uri: str, manifest: str | None, folder: str, on_progress: Progress | None = None) -> str:
    """Writes the page of a folder of scores or labels and its figures as PNG.

    Args:
        uri: The folder.
        manifest: URI of the manifest that its images came from, for the class map; None groups images by folder.
        folder: Where to write.
        on_progress: Called as on_progress(shards read, of so many).

    Returns:
        URI of index.html.

    Raises:
        InputError: The folder holds no rows of scores or labels, or the manifest can't be used.
    """
    places = from_manifest(manifest) if manifest else None
    found = survey(uri, places, on_progress)
    if manifest and places is None:
        found.notes.append(f"{manifest} tells no sol, site, drive or group of any image; the class map goes by folder")
    page = join(folder, "index.html")
    write_bytes(page, render(found, folder).encode())
    return page


def render(found: Survey, folder: str) -> str:
    """The page as HTML text; figures are written beside it on the way."""
    table = Table(found, found.label_set, folder)
    doubtful, certain = (
        found.attempt(f"pictures of the {name} images", partial(looks, found, shown), [])
        for name, shown in (("least certain", found.doubtful), ("most certain", found.certain))
    )
    for name, seen in (("least_certain", doubtful), ("most_certain", certain)):
        tiles = [(picture, look.name) for look in seen for picture in (look.photo, look.tinted) if isinstance(picture, np.ndarray)]
        write_tiles(table, name, tiles, 6)
    charts, where = found.attempt("class map", partial(map_of, table), ([], None))
    val, audit = mapping(found.trust.get("val")), mapping(found.trust.get("audit"))
    context: dict[str, Any] = {
        "source": found.uri,
        "title": found.uri.rstrip("/").rpartition("/")[2] or found.uri,
        "found": found,
        "labels": found.kind == "labels",
        "failed": found.failed.counts(),
        "kinds": found.failed.all[:KINDS_SHOWN],
        "more_kinds": max(0, len(found.failed.all) - KINDS_SHOWN),
        "success": _success(found.success),
        "distributions": found.attempt("distributions", partial(distributions, table), []),
        "map_charts": charts,
        "where": where,
        "doubtful": doubtful,
        "certain": certain,
        "trust_charts": found.attempt("trust", partial(trust, table), []),
        "thresholds": thresholds(val.get("abstention"), audit, found.label_set.classes),
        "audit": audit,
        "facts": facts(found),
        "notes": found.notes,
    }
    return html.render("survey.html.j2", found.label_set, context)


def looks(found: Survey, shown: Sequence[Shown]) -> list[Look]:
    """Pictures of images; only their files and masks are read."""
    limits = Limits()
    if found.kind == "scores":
        pictures = fetch_small([one.uri for one in shown], SIDE_PX, limits)
        return [Look(one, _last(one.uri), picture, None) for one, picture in zip(shown, pictures, strict=True)]
    masks, by_row = dict(_masks(found, shown)), {f"{one.shard} {one.row}": one for one in shown}

    def look(row: str) -> Look:
        one = by_row[row]
        mask_png = masks.get(row, "its row is gone: the table changed while it was read")
        seen = mask_png if isinstance(mask_png, str) else under_mask(one.uri, mask_png, limits, SIDE_PX)
        if isinstance(seen, str):
            return Look(one, _last(one.uri), seen, None)
        return Look(one, _last(one.uri), seen[0], overlay(*seen, found.label_set))

    return in_threads(look, by_row)


def _masks(found: Survey, shown: Sequence[Shown]) -> Iterator[tuple[str, bytes | str]]:
    """("SHARD ROW", PNG bytes) of rows, or the reason why there are none; shards are read as far as needed, one after the other."""
    for one in shown:
        row = f"{one.shard} {one.row}"
        try:
            start = 0
            for batch in scan_table(join(found.uri, one.shard), ["id", "mask_png"], MASK_ROWS):
                if one.row < start + len(batch):
                    if batch["id"][one.row - start].as_py() == one.id:
                        yield row, batch["mask_png"][one.row - start].as_py() or b""
                    break
                start += len(batch)
        except (InputError, OSError, pa.ArrowException) as error:
            yield row, str(error)


def _last(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2] or uri


def _success(success: Json) -> dict[str, float]:
    """Numbers of the last run; NaN where ``_SUCCESS`` does not say."""
    return {name: number(success.get(name)) for name in ("done", "seconds", "images_per_second", "core_seconds")}


def facts(found: Survey) -> list[tuple[str, str]]:
    """Where the rows come from, as (name, value)."""
    known = {**found.run, **found.success}
    told = [("folder", found.uri), ("table", found.kind)]
    models = list(dict.fromkeys(str(d) for d in (known.get("model_digest"), *found.digests) if d))
    told += [("model", digest) for digest in models]
    told += [("configuration of the last run", str(known["config_digest"]))] if known.get("config_digest") else []
    told += [("labelled by raysal", ", ".join(found.versions))] if found.versions else []
    if found.first and found.last:
        told += [("rows made", f"{found.first:%Y-%m-%d %H:%M} to {found.last:%Y-%m-%d %H:%M} UTC")]
    for name, value in _success(found.success).items():
        told += [(f"last run: {name.replace('_', ' ')}", f"{value:,.4g}")] if value == value else []
    told += [(SUCCESS, "there" if found.finished else "missing")]
    told += [("classes", found.label_set.name if found.named else "not named in this table: they carry their numbers")]
    return [*told, ("report written by", f"raysal {raysal.__version__}")]
