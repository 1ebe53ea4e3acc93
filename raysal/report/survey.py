"""What a folder of scores or labels says, added up: its rows are read some at a time, its masks not at all."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysal.archive.tables import label_set_in, read_schema, scan_table
from raysal.archive.uris import is_local, join, list_names
from raysal.errors import InputError
from raysal.labels import LABEL_SETS, LabelSet
from raysal.report.gather import Json, Notes, mapping, read_json, stand_in
from raysal.report.places import Groups, Places
from raysal.report.tally import Extremes, Histogram, Kinds, Shares
from raysal.stream.output import READERS, SUCCESS, TRUST
from raysal.stream.worker import RUN
from raysal.words import number

HEAD = ("id", "uri", "status", "error", "width", "height")
LABELS = (*HEAD, "confidence", "abstained", "class_fractions", "model_digest", "raysal_version", "labeled_at")
"""All that is read of the rows of labels; of those that are shown, the mask too."""

SCORES = (*HEAD, "class_fractions", "model_digest", "scored_at")
"""What is read of the rows of scores beside the scores."""

BATCH_ROWS = 4096
SHOWN = 12
"""Images shown at either end of certainty."""

SORTED_BY = ("entropy", "least_confidence", "margin", "uncertainty", "bald")
"""Scores by which images are ranked from certain to doubtful, the best suited first; without any of them, the first score there is."""

NAMED_AT_MOST = 5
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Shown:
    """An image at one end of certainty.

    Attributes:
        id, uri: Of the image.
        shard, row: Where its row is.
        size: (width, height) in pixels.
        numbers: Its scores, or confidence and abstained share, by name.
        fractions: float [C], None where the row has none.
    """

    id: str
    uri: str
    shard: str
    row: int
    size: tuple[int, int]
    numbers: dict[str, float]
    fractions: np.ndarray | None


@dataclass
class Survey(Notes):
    """A folder of scores or labels in numbers.

    Attributes:
        uri: The folder.
        kind: ``scores`` or ``labels``.
        label_set: The classes; `named` says whether more is known of them than their number.
        numbers: Columns that distributions are drawn of.
        run, success, trust: ``_RUN.json``, ``_SUCCESS`` and ``_trust.json``; empty where there are none.
        ok: Images with a score or mask; `blank` of these have no class on any pixel.
        pixels, kept: Of the ok images, and those of them with a class.
        failed: The others, by status and kind of reason.
        distributions: By name in `numbers`.
        shares: Of the classes.
        groups: Class shares by place.
        certain, doubtful: The images at either end, most extreme first.
        digests, versions: Of the models and raysals that made rows, a few of them.
        first, last: When rows were made.
    """

    uri: str
    kind: str
    label_set: LabelSet
    named: bool
    numbers: tuple[str, ...]
    places: Places
    run: Json = field(default_factory=dict)
    success: Json = field(default_factory=dict)
    finished: bool = False
    trust: Json = field(default_factory=dict)
    ok: int = 0
    blank: int = 0
    pixels: float = 0.0
    kept: float = 0.0
    failed: Kinds = field(default_factory=Kinds)
    digests: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    first: datetime | None = None
    last: datetime | None = None

    def __post_init__(self) -> None:
        self.distributions = {name: Histogram() for name in self.numbers}
        self.shares = Shares(self.label_set.n_classes)
        self.groups = Groups(self.places.kind, self.label_set.n_classes)
        self._certain, self._doubtful = Extremes(SHOWN, highest=False), Extremes(SHOWN, highest=True)

    @property
    def rows(self) -> int:
        return self.ok + sum(self.failed.counts().values())

    @property
    def certain(self) -> list[Shown]:
        return self._certain.rows

    @property
    def doubtful(self) -> list[Shown]:
        return self._doubtful.rows

    @property
    def precision(self) -> float:
        """The share of right pixels that thresholds were set for; NaN where every valid pixel kept its class."""
        return number(mapping(self.trust.get("kept")).get("precision"))

    @property
    def sorted_by(self) -> str:
        """The score that ranks scores from certain to doubtful; empty where there is none."""
        return next((name for name in SORTED_BY if name in self.numbers), (*self.numbers, "")[0])

    def add(self, batch: pa.RecordBatch, shard: str, start: int) -> None:
        """Adds rows of a shard, from row `start` on."""
        ok_N = pc.fill_null(pc.equal(batch["status"], "ok"), False).to_numpy(zero_copy_only=False)
        for i in np.flatnonzero(~ok_N).tolist():
            status, uri, error = (str(batch[name][i].as_py() or "") for name in ("status", "uri", "error"))
            self.failed.add(status, uri, error)
        self._date(batch)
        batch = batch.filter(pa.array(ok_N))
        rows_N = start + np.flatnonzero(ok_N)
        self.ok += len(batch)
        columns = {name: _floats(batch[name]) for name in self.numbers}
        for name, values_N in columns.items():
            self.distributions[name].add(values_N)
        if self.kind == "labels":
            size_N = _floats(batch["width"]) * _floats(batch["height"])
            self.pixels += float(np.nansum(size_N))
            self.kept += float(np.nansum(size_N * (1 - columns["abstained"])))
            self.blank += int(np.isnan(columns["confidence"]).sum())
        fractions_NC = _fractions(batch["class_fractions"], self.label_set.n_classes)
        whole_N = np.isfinite(fractions_NC).all(1)
        self.shares.add(fractions_NC[whole_N])
        numbers_N, names = self.places.of(batch)
        self.groups.add(numbers_N[whole_N], names, fractions_NC[whole_N])
        doubt_N = self._doubt(columns)

        def shown(i: int) -> Shown:
            id_, uri, width, height = (batch[name][i].as_py() for name in ("id", "uri", "width", "height"))
            numbers = {name: float(values_N[i]) for name, values_N in columns.items()}
            return Shown(
                str(id_),
                str(uri),
                shard,
                int(rows_N[i]),
                (width or 0, height or 0),
                numbers,
                fractions_NC[i].copy() if whole_N[i] else None,
            )

        self._certain.add(doubt_N, shown)
        self._doubtful.add(doubt_N, shown)

    def _doubt(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """float64 [N], higher is less certain; NaN says nothing.

        Where pixels abstain for being unsure, confidence is a mean over the sure ones only: there each open pixel counts as not sure at
        all. Without that, open pixels are those that were never valid.
        """
        if self.kind == "scores":
            return columns[self.sorted_by] if self.sorted_by else np.empty(0)
        confidence_N = columns["confidence"]
        if math.isnan(self.precision):
            return 1 - confidence_N
        return 1 - np.nan_to_num(confidence_N) * (1 - columns["abstained"])

    def _date(self, batch: pa.RecordBatch) -> None:
        made = pc.min_max(batch["labeled_at" if self.kind == "labels" else "scored_at"]).as_py()
        self.first = min((t for t in (self.first, made["min"]) if t), default=None)
        self.last = max((t for t in (self.last, made["max"]) if t), default=None)
        for name, seen in (("model_digest", self.digests), ("raysal_version", self.versions)):
            if name in batch.schema.names:
                new = [v for v in pc.unique(batch[name]).to_pylist() if v and v not in seen]
                seen += new[: max(0, NAMED_AT_MOST - len(seen))]


def shards_of(uri: str) -> list[str]:
    """Names of the tables directly in a folder."""
    return [name for name in list_names(uri) if name.endswith(".parquet") and name[0] not in "._"]


def kind_of_table(schema: pa.Schema) -> str:
    """``scores``, ``labels``, or whatever else the metadata says."""
    return (schema.metadata or {}).get(b"raysal_table", b"foreign").decode("utf-8", "replace")


def survey(uri: str, places: Places | None = None, on_progress: Progress | None = None) -> Survey:
    """Reads a folder of scores or labels once, from its first row to its last.

    Args:
        uri: The folder.
        places: Where images were taken; None takes their folders.
        on_progress: Called as on_progress(shards read, of so many).

    Raises:
        InputError: No shard of the folder is a table of scores or labels.
    """
    shards = shards_of(uri)
    found, damaged = _begin(uri, shards, places or Places())
    columns = LABELS if found.kind == "labels" else (*SCORES, *found.numbers)
    for done, (name, read) in enumerate(_read_ahead(uri, shards, columns), 1):
        try:
            start = 0
            for batch in read():
                if kind_of_table(batch.schema) != found.kind:
                    raise InputError(f"{name}: a {kind_of_table(batch.schema)} table among {found.kind}")
                found.add(batch, name, start)
                start += len(batch)
        except (InputError, OSError, pa.ArrowException) as error:
            damaged[name] = str(error)
        if on_progress is not None:
            on_progress(done, len(shards))
    if damaged:
        few = list(damaged.items())[:NAMED_AT_MOST]
        found.notes.append(
            f"{len(damaged)} of {len(shards)} files of the table could not be read to their end: "
            + "; ".join(message for _, message in few)
        )
    _check(found)
    return found


def _begin(uri: str, shards: Sequence[str], places: Places) -> tuple[Survey, dict[str, str]]:
    """An empty survey that knows what the small files and the first whole shard say; and why shards before that are not whole."""
    notes, damaged = Notes(), dict[str, str]()
    run, success, trust = (read_json(notes, join(uri, name), name) for name in (RUN, SUCCESS, TRUST))
    model, other = run.get("model_digest") or success.get("model_digest"), trust.get("model_digest")
    if trust and model and other != model:
        notes.notes.append(f"{TRUST} is of another model ({str(other)[:12]}) than the masks, so it is not shown")
        trust = {}
    schema = next(_schemas(uri, shards, damaged), None)
    if schema is None:
        few = "; ".join(list(damaged.values())[:3])
        raise InputError(
            f"{uri}: holds no rows of scores or labels yet{f' ({few})' if few else ''}; run raysal score or raysal label first"
        )
    kind = kind_of_table(schema)
    known = notes.attempt("class names in the table", partial(label_set_in, schema), None) or _named_by(trust)
    classes = known or stand_in([f"class {i}" for i in range(max(2, _length(uri, shards)))])
    scores = tuple(f.name for f in schema if pa.types.is_floating(f.type)) if kind == "scores" else ("confidence", "abstained")
    found = Survey(
        uri, kind, classes, known is not None, scores, places, run, success, SUCCESS in list_names(uri), trust, notes=notes.notes
    )
    return found, damaged


def _schemas(uri: str, shards: Sequence[str], damaged: dict[str, str]) -> Iterator[pa.Schema]:
    for name in shards:
        try:
            schema = read_schema(join(uri, name))
        except InputError as error:
            damaged[name] = str(error)
            continue
        if kind_of_table(schema) in ("scores", "labels"):
            yield schema


def _named_by(trust: Json) -> LabelSet | None:
    """Class names from the evaluation beside masks whose table does not carry them; in a known set's colours where there is one."""
    names = tuple(mapping(mapping(trust.get("val")).get("iou")))
    known = next((s for s in LABEL_SETS.values() if s.classes == names), None)
    return known or (stand_in(names) if len(names) > 1 else None)


def _length(uri: str, shards: Sequence[str]) -> int:
    """Number of classes, from the first row that has shares of them."""
    for name in shards:
        try:
            for batch in scan_table(join(uri, name), ["class_fractions"], BATCH_ROWS):
                longest = pc.max(pc.list_value_length(batch["class_fractions"])).as_py()
                if longest:
                    return int(longest)
        except (InputError, pa.ArrowException):
            continue
    return 0


def _read_ahead(uri: str, shards: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[str, Callable[[], Iterable[pa.RecordBatch]]]]:
    """The shards in order, and how to get their rows: batch by batch on a disk, many shards at once from stores that answer slowly."""

    def scan(name: str) -> Iterator[pa.RecordBatch]:
        return scan_table(join(uri, name), columns, BATCH_ROWS)

    if is_local(uri):
        yield from ((name, partial(scan, name)) for name in shards)
        return
    with ThreadPoolExecutor(READERS) as threads:
        ahead: deque[tuple[str, Future[list[pa.RecordBatch]]]] = deque()
        for name in shards:
            ahead.append((name, threads.submit(lambda name: list(scan(name)), name)))
            if len(ahead) > READERS:
                first, future = ahead.popleft()
                yield first, future.result
        yield from ((name, future.result) for name, future in ahead)


def _check(found: Survey) -> None:
    """Notes what does not fit together."""
    said = number(sum(v for v in mapping(found.success.get("counts")).values() if isinstance(v, int)))
    if found.finished and said and said != found.rows:
        found.notes.append(f"{SUCCESS} speaks of {said:,.0f} rows, {found.rows:,} could be read; run the same command again to mend that")
    model = found.run.get("model_digest") or found.success.get("model_digest")
    if others := [d for d in found.digests if model and d != model]:
        found.notes.append(f"rows of another model ({others[0][:12]}) lie among those of {str(model)[:12]}")


def _floats(column: pa.Array) -> np.ndarray:
    """float64 [N], null as NaN."""
    values: np.ndarray = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def _fractions(column: pa.Array, n_classes: int) -> np.ndarray:
    """float64 [N, C] shares of classes; NaN in rows without them, with another number of them, or where they are all 0."""
    fractions_NC = np.full((len(column), n_classes), np.nan)
    whole_N = pc.fill_null(pc.equal(pc.list_value_length(column), n_classes), False)
    flat = column.filter(whole_N).flatten().to_numpy(zero_copy_only=False)
    fractions_NC[whole_N.to_numpy(zero_copy_only=False)] = np.clip(np.nan_to_num(flat.reshape(-1, n_classes).astype(np.float64)), 0, 1)
    fractions_NC[~(fractions_NC.sum(1) > 0)] = np.nan
    return fractions_NC
