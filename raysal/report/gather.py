"""Reads a run folder as far as it exists. Nothing here raises over a missing or damaged file: it leaves a note instead."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from raysal import config as configs
from raysal.archive.tables import read_table
from raysal.archive.uris import exists, join, list_names, read_bytes
from raysal.config import Config
from raysal.labels import LABEL_SETS, S5MARS, LabelSet
from raysal.model.checkpoint import read_info
from raysal.train.logs import read_log
from raysal.words import number

T = TypeVar("T")
U = TypeVar("U")
Json = dict[str, Any]

STAGES = ("choose", "buy", "train", "score", "final", "label", "audit")
"""The order of a round's stages."""

STAND_IN_COLORS = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (110, 110, 110),
)
"""Okabe and Ito's colours, for classes whose label set is nowhere to be found."""


@dataclass(frozen=True)
class Round:
    """One folder ``rounds/NNN``; every field is empty where its file is missing.

    Attributes:
        number: N of the folder's name.
        uri: The folder.
        metrics: metrics.json.
        steps: Lines of metrics.jsonl of the final training, else of the round's own.
        chosen: Rows of chosen.parquet in rank order.
        bought: Rows of labels.parquet.
        stages: stages/NAME.json by NAME, in the order they finished.
    """

    number: int
    uri: str
    metrics: Json
    steps: tuple[Json, ...]
    chosen: tuple[Json, ...]
    bought: tuple[Json, ...]
    stages: dict[str, Json]

    @property
    def finished(self) -> bool:
        """Whether the round came as far as its metrics on the val split."""
        return math.isfinite(number(self.metrics.get("miou")))

    @property
    def checkpoint(self) -> str | None:
        """URI of the newest checkpoint: that of the longer last training where there was one."""
        folders = [join(self.uri, name) for name in ("checkpoint-final", "checkpoint")]
        return next((folder for folder in folders if exists(join(folder, "model.json"))), None)

    @property
    def scores(self) -> str:
        return join(self.uri, "scores")


@dataclass
class Notes:
    """What could not be read, in sentences; the page prints them.

    Attributes:
        notes: The sentences.
    """

    notes: list[str] = field(default_factory=list, kw_only=True)

    def attempt(self, what: str, work: Callable[[], T], otherwise: U) -> T | U:
        """Result of work, or `otherwise` and a note: one damaged file must not cost the reader the rest of the page."""
        try:
            return work()
        except Exception as error:  # whatever a half-written folder can do to a reader ends up as a sentence on the page
            note = f"{what}: {type(error).__name__}: {str(error)[:300]}"
            self.notes += [note] if note not in self.notes else []
            return otherwise


@dataclass
class Run(Notes):
    """A run folder in memory: small things read, big things left where they are.

    Attributes:
        uri: The run folder.
        config: The parsed configuration; None where it is missing or not valid.
        config_text: config.yaml as it stands.
        record: run.json.
        rounds: In order; finished and unfinished.
        pool: Rows of the manifest; None where there is none yet.
        audit: audit.json.
    """

    uri: str
    config: Config | None = None
    config_text: str = ""
    record: Json = field(default_factory=dict)
    rounds: tuple[Round, ...] = ()
    pool: int | None = None
    audit: Json = field(default_factory=dict)

    @property
    def finished(self) -> tuple[Round, ...]:
        return tuple(r for r in self.rounds if r.finished)


def mapping(value: object) -> Json:
    """The value where it is an object with text keys, else an empty one."""
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def numbers(value: object, keys: Iterable[str]) -> np.ndarray:
    """float64 [n] of an object's values by key, NaN where absent."""
    found = mapping(value)
    return np.array([number(found.get(key)) for key in keys], dtype=np.float64)


def read_run(uri: str) -> Run:
    """Reads all of a run but its images and big tables."""
    run = Run(uri)
    run.config_text = run.attempt("config.yaml", lambda: _text(join(uri, "config.yaml")), "")
    if run.config_text:
        run.config = run.attempt("config.yaml", lambda: configs.build(yaml.safe_load(run.config_text) or {}, "config.yaml"), None)
    run.record = read_json(run, join(uri, "run.json"), "run.json")
    run.audit = read_json(run, join(uri, "audit.json"), "audit.json")
    manifest = join(uri, "manifest.parquet")
    if exists(manifest):
        run.pool = run.attempt("manifest.parquet", lambda: read_table(manifest, ["id"]).num_rows, None)
    names = [name for name in list_names(join(uri, "rounds")) if name.isdigit()]
    run.rounds = tuple(_round(run, int(name), join(uri, "rounds", name)) for name in sorted(names, key=int))
    newest = {r.metrics.get("checkpoint_digest") for r in run.finished[-1:]}
    if run.audit and not newest & {run.audit.get("model_digest")}:
        run.audit = {}
        run.notes.append("audit.json: of another model than the last round's; run the same `raysal loop` again to audit that one")
    return run


def rows(run: Run, uri: str, what: str, columns: list[str] | None = None) -> pa.Table | None:
    """A Parquet file or folder of such files; None where there is none, or where it is damaged (which leaves a note)."""
    if not (exists(uri) if uri.endswith(".parquet") else any(n.endswith(".parquet") for n in list_names(uri))):
        return None
    return run.attempt(what, lambda: read_table(uri, columns), None)


def label_set(run: Run) -> LabelSet:
    """The classes: of the newest checkpoint, else as far as the configuration, the data or the metrics tell."""
    newest = next((c for c in (r.checkpoint for r in reversed(run.rounds)) if c), None)
    if newest:
        info = run.attempt("classes of the checkpoint", partial(read_info, newest), None)
        if info:
            return info.label_set
    if run.config:
        data = run.config.data
        name = data.label_set or {"synthetic": "s5mars", "folder": ""}.get(data.reader, data.reader)
        if name in LABEL_SETS:
            return LABEL_SETS[name]
    for root in [join(run.uri, "data"), *([run.config.data.root] if run.config and run.config.data.root else [])]:
        if exists(join(root, "classes.json")):
            found = run.attempt("classes.json", partial(_classes, join(root, "classes.json")), None)
            if found:
                return found
    names = list(dict.fromkeys(str(c) for r in run.rounds for c in mapping(r.metrics.get("iou"))))
    return S5MARS if len(names) < 2 else stand_in(names)


def stand_in(names: Iterable[str]) -> LabelSet:
    """Classes of which no more than the names are known; two at least."""
    classes = tuple(names)
    return LabelSet("unknown", classes, tuple(STAND_IN_COLORS[i % len(STAND_IN_COLORS)] for i in range(len(classes))))


def mean_fractions(table: pa.Table | None, n_classes: int) -> np.ndarray | None:
    """Mean predicted share of each class over the rows that have one.

    Returns:
        float64 [n_classes], or None where no row has fractions.
    """
    if table is None or "class_fractions" not in table.column_names:
        return None
    column = table["class_fractions"]
    kept = column.filter(pc.fill_null(pc.equal(pc.list_value_length(column), n_classes), False))
    if len(kept) == 0:
        return None
    flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in kept.chunks])
    mean: np.ndarray = np.nanmean(flat.reshape(-1, n_classes).astype(np.float64), axis=0)
    return mean


def _round(run: Run, n: int, uri: str) -> Round:
    what = f"rounds/{n:03d}"
    chosen = rows(run, join(uri, "chosen.parquet"), f"{what}/chosen.parquet")
    bought = rows(run, join(uri, "labels.parquet"), f"{what}/labels.parquet")
    asked = chosen.to_pylist() if chosen is not None else []
    return Round(
        number=n,
        uri=uri,
        metrics=read_json(run, join(uri, "metrics.json"), f"{what}/metrics.json"),
        steps=_log(run, join(uri, "final"), f"{what}/final") or _log(run, join(uri, "train"), f"{what}/train"),
        chosen=tuple(sorted(asked, key=lambda row: _or_last(row.get("rank")))),
        bought=tuple(bought.to_pylist()) if bought is not None else (),
        stages=_stages(run, join(uri, "stages"), f"{what}/stages"),
    )


def _log(run: Run, uri: str, what: str) -> tuple[Json, ...]:
    """Lines of a training's log that are objects."""
    lines = run.attempt(f"{what}/metrics.jsonl", lambda: read_log(uri), [])
    return tuple(line for line in map(mapping, lines) if line)


def _classes(uri: str) -> LabelSet | None:
    return LabelSet.from_json(read_bytes(uri))


def _or_last(value: object) -> float:
    rank = number(value)
    return math.inf if math.isnan(rank) else rank


def _stages(run: Run, uri: str, what: str) -> dict[str, Json]:
    names = [name for name in list_names(uri) if name.endswith(".json")]
    found = {name.removesuffix(".json"): read_json(run, join(uri, name), f"{what}/{name}") for name in names}
    rank = {name: i for i, name in enumerate(STAGES)}  # markers count whole seconds, and quick stages share one
    return dict(sorted(found.items(), key=lambda pair: (str(pair[1].get("finished_at", "")), rank.get(pair[0], len(rank)))))


def _text(uri: str) -> str:
    return read_bytes(uri).decode("utf-8", "replace") if exists(uri) else ""


def read_json(notes: Notes, uri: str, what: str) -> Json:
    """A JSON object; an empty one where there is no file, or where it is damaged (which leaves a note)."""
    text = notes.attempt(what, lambda: _text(uri), "")
    return mapping(notes.attempt(what, lambda: json.loads(text), {})) if text else {}
