"""Lists an archive into a manifest: Parquet shards of one row an image, and a record of what was done."""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import raysal
from raysal.archive.entries import Entry, Tally
from raysal.archive.filters import TAKEN, Filters
from raysal.archive.known import CHANGED, NEW, SAME, UNSEEN, Known
from raysal.archive.listing import Place, open_place
from raysal.archive.names import KINDS, Product, parse
from raysal.archive.publish import HIDDEN, VERSION, batches, claim, publish, refuse_others, sweep
from raysal.archive.tables import manifest_schema, write_table
from raysal.archive.uris import absolute, exists, join, locked
from raysal.errors import InputError

SHARD_ROWS = 50_000
"""Rows of a shard."""
AT_ONCE = 1024
"""Entries that are parsed and filtered together; a store that must be asked for sizes is asked for so many at a time."""

Progress = Callable[[int], None]
"""Called as on_progress(files met so far), on the caller's thread."""


@dataclass(frozen=True)
class Summary:
    """What came of a run.

    Attributes:
        manifest: Its folder.
        rows: In the manifest now.
        new, changed, same: Images that were not in it, that were there with other content, that were there just so.
        gone: Images in the manifest that lie in the places listed and are not there any more; they stay, or `pruned` took them out.
        duplicates: Times that a file was met again.
        left_out: Images that were not wanted, by kind or by filter.
        labels, others, missing, unreadable, examples: As in `Tally`.
        seconds: From call to return.
    """

    manifest: str
    rows: int
    new: int
    changed: int
    same: int
    gone: int
    pruned: int
    duplicates: int
    left_out: dict[str, int]
    labels: int
    others: int
    missing: int
    unreadable: int
    examples: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For people: what is in the manifest, and everything that is not."""
        counts = f"{self.new:,} new, {self.changed:,} changed, {self.same:,} as before"
        lines = [f"manifest {self.manifest}: {self.rows:,} images; {counts}"]
        if self.left_out:
            reasons = [f"{n:,} {why if why in KINDS else f'by {why}'}" for why, n in sorted(self.left_out.items())]
            lines.append(f"left out: {', '.join(reasons)}")
            if more := sorted(set(self.left_out) & set(KINDS) - TAKEN):
                lines[-1] += f" (--with {','.join(more)} takes them in)"
        besides = ((self.labels, "labels"), (self.others, "other files"), (self.duplicates, "duplicates"))
        if any(n for n, _ in besides):
            lines.append("passed over: " + ", ".join(f"{n:,} {what}" for n, what in besides if n))
        if self.gone:
            lines.append(f"gone: {self.gone:,} images of the manifest; {'taken out' if self.pruned else 'kept, --prune takes them out'}")
        if self.missing:
            lines.append(f"not on disk: {self.missing:,} entries of lists, indexed all the same")
        if self.unreadable:
            lines.append(f"not read: {self.unreadable:,} folders, files or lines")
        return "\n".join(lines)


def index(
    places: Sequence[str], out: str, filters: Filters | None = None, *, prune: bool = False, on_progress: Progress | None = None
) -> Summary:
    """Lists places into a manifest, or into one that is there already: adds what is new, replaces what changed.

    Args:
        places: As `open_place` takes them.
        out: Folder of the manifest, a local path or any fsspec URI.
        filters: What to take; None takes pictures, whole or in tiles, of every mission. Rows that are in the manifest stay in it.
        prune: Take rows out whose files are gone.
        on_progress: Told now and then.

    Raises:
        InputError: A place or `out` can't be used, or no image was found for a new manifest.
        RaysalError: A store broke off; the manifest is as it was.
    """
    started, out = time.perf_counter(), absolute(out)
    opened, fresh = [open_place(place) for place in places], not exists(out)
    refuse_others(out)  # before a lock is laid into somebody's folder
    with locked(out, "another process is at work on this manifest; wait for it, or name another folder"):
        try:
            run = _Run(out, claim(out), filters or Filters(), opened, on_progress or (lambda files: None))
            with Known() as known:
                run.list_all(known)
                run.publish(known, prune)
        except BaseException:
            with contextlib.suppress(Exception):  # what went wrong is to be told, not that tidying up did too
                sweep(out, all_of_it=fresh)
            raise
    return run.summary(time.perf_counter() - started)


def rows_of(uri: str, on_unreadable: Callable[[str], None] | None = None) -> pa.Table:
    """The manifest of a place in memory, of whatever kinds its images are, as `index` would write it; about 300 bytes an image.

    Args:
        uri: As `open_place` takes it.
        on_unreadable: Told where a part of the place can't be listed; None refuses such a place.

    Raises:
        InputError: The place can't be listed, or part of it can't.
    """
    place, tally = open_place(uri), Tally()
    run = _Run("", {"run": 0, "shards": {}}, Filters(kinds=frozenset(KINDS)), [place], lambda files: None)
    rows = pa.concat_tables([manifest_schema().empty_table(), *_shards(run.wanted(place, tally))])
    if tally.unreadable:
        said = f"{uri}: {tally.unreadable} of its files and folders can't be read, the first is {tally.examples[0]}"
        if on_unreadable is None:
            raise InputError(f"{said}; index it first")
        on_unreadable(said)
    if pc.count_distinct(rows["uri"]).as_py() == rows.num_rows:
        return rows
    places = pa.table({"uri": rows["uri"], "at": np.arange(rows.num_rows)}).group_by("uri").aggregate([("at", "max")])["at_max"]
    return rows.take(pc.take(places, pc.sort_indices(places)))


def row(entry: Entry, product: Product, root: str) -> dict[str, Any]:
    """A manifest row of what a store and a name tell of an image.

    Args:
        entry, product: What they tell.
        root: Folder of the whole archive, which says nothing of what belongs together.
    """
    stamp = entry.etag or (entry.modified.isoformat() if entry.modified else None)
    names = {key: getattr(product, key) for key in ("product", "mission", "camera", "sol", "site", "drive", "sequence")}
    return {
        "id": hashlib.sha256(f"{entry.uri}|{entry.size}|{stamp}".encode()).hexdigest()[:32],
        "uri": entry.uri,
        "size": entry.size,
        "etag": entry.etag,
        "modified": entry.modified,
        **names,
        "exclude": [],
        "group": _group(entry.uri, product, root),
    }


class _Run:
    """One run over all places: counts, and shards under hidden names."""

    def __init__(self, out: str, before: dict[str, Any], filters: Filters, places: list[Place], on_progress: Progress) -> None:
        self.out, self.before, self.filters, self.places, self.on_progress = out, before, filters, places, on_progress
        self.number = before["run"] + 1
        self.left_out, self.met = Counter[str](), Counter[int | None]()
        self.tallies = [Tally() for _ in places]
        self.shards: dict[str, int] = {}
        self.gone = self.pruned = self.rows = 0

    def list_all(self, known: Known) -> None:
        """Lists every place and writes rows of what is new or changed."""
        for name in self.before["shards"]:
            for batch in batches(self.out, name, ["uri", "id"]):
                known.add(zip(batch["uri"].to_pylist(), batch["id"].to_pylist(), strict=True))
        for table in _shards(self._fresh(known)):
            name = f"part-{self.number:04d}-{len(self.shards):05d}.parquet"
            write_table(join(self.out, HIDDEN + name), table)
            self.shards[name] = table.num_rows

    def publish(self, known: Known, prune: bool) -> None:
        """Finds what the new rows replace, and makes all of it visible.

        Raises:
            InputError: There is no image at all.
        """
        if not self.shards and not self.before["shards"]:
            raise InputError(f"{', '.join(p.uri for p in self.places)}: no image to index ({self._instead()})")
        shards, staged, remove = dict(self.before["shards"]), list(self.shards), []
        if self.met[CHANGED] or self.met[SAME] < sum(shards.values()):
            for name in list(shards):
                kept = self._keep(name, known, prune)
                if kept is not None and not kept.num_rows:
                    remove.append(name)
                    del shards[name]
                elif kept is not None:
                    write_table(join(self.out, HIDDEN + name), kept)
                    staged.append(name)
                    shards[name] = kept.num_rows
        shards |= self.shards
        self.rows = sum(shards.values())
        publish(self.out, staged, remove, self._record(shards))

    def wanted(self, place: Place, tally: Tally, known: Known | None = None) -> Iterator[dict[str, Any]]:
        """Rows of the images of a place that the filters let through."""
        entries = place.entries(tally)
        while batch := list(islice(entries, AT_ONCE)):
            named = []
            for entry in batch:
                product = parse(entry.uri, place.root)
                if not self._left_out(entry, self.filters.against(product), known):
                    named.append((entry, product))
            for whole, (entry, product) in zip(place.complete([e for e, _ in named], tally), named, strict=True):
                if whole is None:
                    self._stays(entry, known)
                elif not self._left_out(whole, self.filters.against_size(whole.size), known):
                    yield row(whole, product, place.root)
            self.on_progress(sum(t.files for t in self.tallies))

    def summary(self, seconds: float) -> Summary:
        tally = self._tally()
        return Summary(
            self.out, self.rows, self.met[NEW], self.met[CHANGED], self.met[SAME], self.gone, self.pruned, self.met[None],
            dict(self.left_out), tally.labels, tally.others, tally.missing, tally.unreadable, tuple(tally.examples), seconds,
        )  # fmt: skip

    def _fresh(self, known: Known) -> Iterator[dict[str, Any]]:
        """Rows of images that are new or changed."""
        for place, tally in zip(self.places, self.tallies, strict=True):
            for found in self.wanted(place, tally, known):
                state = known.meet(found["uri"], found["id"])
                self.met[state] += 1
                if state in (NEW, CHANGED):
                    yield found

    def _left_out(self, entry: Entry, reason: str | None, known: Known | None) -> bool:
        if reason is None:
            return False
        self.left_out[reason] += 1
        self._stays(entry, known)
        return True

    def _stays(self, entry: Entry, known: Known | None) -> None:
        """What the manifest has of a file stays as it is."""
        if known is not None and self.before["shards"]:
            known.keep(entry.uri)

    def _keep(self, name: str, known: Known, prune: bool) -> pa.Table | None:
        """A shard's rows without those that are outdated; None where all of them stay."""
        whole = [p for p, tally in zip(self.places, self.tallies, strict=True) if not tally.unreadable]
        keep: list[bool] = []
        for batch in batches(self.out, name, ["uri"]):
            for uri in batch["uri"].to_pylist():
                state = known.state(uri)
                gone = state == UNSEEN and any(place.holds(uri) for place in whole)
                self.gone += gone
                self.pruned += gone and prune
                keep.append(state != CHANGED and not (gone and prune))
        if all(keep):
            return None
        return pa.Table.from_batches(batches(self.out, name, None)).filter(pa.array(keep))

    def _tally(self) -> Tally:
        """Of all places together."""
        total = Tally()
        for tally in self.tallies:
            for key in ("files", "labels", "others", "missing", "unreadable"):
                setattr(total, key, getattr(total, key) + getattr(tally, key))
            total.examples += tally.examples
        return total

    def _record(self, shards: dict[str, int]) -> dict[str, Any]:
        counts = {k: v for k, v in self.summary(0.0).to_dict().items() if isinstance(v, (int, dict))}
        return {
            "version": VERSION,
            "raysal": raysal.__version__,
            "run": self.number,
            "indexed_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "places": [place.uri for place in self.places],
            "filters": self.filters.to_dict(),
            "counts": counts,
            "shards": shards,
        }

    def _instead(self) -> str:
        """What was there instead of images."""
        tally = self._tally()
        seen = [f"{n} left out: {reason}" for reason, n in self.left_out.items()]
        seen += [
            f"{n} {what}" for n, what in ((tally.labels, "labels"), (tally.others, "other files"), (tally.unreadable, "unreadable")) if n
        ]
        return "; ".join([", ".join(seen) or "no files at all", *tally.examples[:1]])


def _shards(rows: Iterator[dict[str, Any]]) -> Iterator[pa.Table]:
    """Tables of SHARD_ROWS rows, the last perhaps shorter; rows wait as columns, which take a tenth of the memory."""
    parts: list[pa.Table] = []
    while part := list(islice(rows, SHARD_ROWS // 10)):
        parts.append(pa.Table.from_pylist(part, schema=manifest_schema()))
        if sum(p.num_rows for p in parts) >= SHARD_ROWS:
            yield pa.concat_tables(parts)
            parts = []
    if parts:
        yield pa.concat_tables(parts)


def _group(uri: str, product: Product, root: str) -> str:
    """What shows the same ground: a stop of the rover, else a sol, else a folder below the root; empty where nothing tells."""
    if product.site is not None and product.drive is not None:
        return f"{product.mission}/{product.site}/{product.drive}"
    if product.sol is not None:
        return f"{product.mission}/sol{product.sol}" if product.mission else f"sol{product.sol}"
    inner, *outer = uri.split("::", 1)
    folder = posixpath.dirname(inner)
    return "" if folder.rstrip("/") == root.rstrip("/") else "::".join([folder, *outer])
