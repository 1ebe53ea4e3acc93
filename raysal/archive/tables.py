"""The tables that pass between rooms: their columns, and reading and writing them as Parquet at any fsspec URI.

Column names are interface. Each schema carries ``raysal_table`` (which table) and ``version`` in its metadata; a table of a newer
version than this library knows is refused instead of misread.
"""

from __future__ import annotations

import contextlib
import io
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from raysal.archive.uris import open_fs, store_errors, write_bytes
from raysal.errors import InputError
from raysal.labels import LabelSet

VERSION = 1
TIME = pa.timestamp("us", tz="UTC")
LABEL_SET = "label_set"
"""Key of the schema's metadata under which a table keeps its label set, as JSON (`raysal.labels.LabelSet.to_dict`)."""


class ManifestItem(Protocol):
    """What `manifest_of` needs of an item."""

    @property
    def id(self) -> str: ...
    @property
    def image(self) -> str: ...
    @property
    def exclude(self) -> Sequence[str]: ...
    @property
    def group(self) -> str: ...


def manifest_schema() -> pa.Schema:
    """One row an image of an archive. ``site`` and ``drive`` are numbers as flown; null where the name does not say."""
    return _schema(
        "manifest",
        [
            ("id", pa.string()),
            ("uri", pa.string()),
            ("size", pa.int64()),
            ("etag", pa.string()),
            ("modified", TIME),
            ("product", pa.string()),
            ("mission", pa.string()),
            ("camera", pa.string()),
            ("sol", pa.int32()),
            ("site", pa.int32()),
            ("drive", pa.int32()),
            ("sequence", pa.string()),
            ("exclude", _list(pa.string())),
            ("group", pa.string()),
        ],
    )


def scores_schema(score_names: Sequence[str], embedding_dim: int = 0, label_set: LabelSet | None = None) -> pa.Schema:
    """One row an image of a scored pool; null scores where the status is not ``ok``.

    Args:
        score_names: One float64 column each, in this order.
        embedding_dim: Length of the float16 ``embedding``; 0 leaves the column out.
        label_set: What the places of ``class_fractions`` mean; goes into the schema's metadata, as in `labels_schema`.

    Raises:
        InputError: A score name twice, or the name of another column.
    """
    head = [*_row_head(), ("width", pa.int32()), ("height", pa.int32())]
    tail = [("class_fractions", _list(pa.float32()))]
    if embedding_dim:
        tail.append(("embedding", _list(pa.float16(), embedding_dim)))
    tail += [("model_digest", pa.string()), ("scored_at", TIME)]
    schema = _schema("scores", [*head, *((name, pa.float64()) for name in score_names), *tail], _carried(label_set))
    if twice := sorted({n for n in schema.names if schema.names.count(n) > 1}):
        raise InputError(f"score.scores: {', '.join(twice)} names a column twice; name each score once")
    return schema


def queue_schema() -> pa.Schema:
    """One row an image chosen for labeling; ``reasons`` are the numbers behind the choice by name."""
    return _schema(
        "queue",
        [
            ("rank", pa.int32()),
            ("id", pa.string()),
            ("uri", pa.string()),
            ("strategy", pa.string()),
            ("score", pa.float64()),
            ("reasons", pa.map_(pa.string(), pa.float64())),
            ("round", pa.int32()),
            ("prelabel", pa.string()),
        ],
    )


def labels_schema(label_set: LabelSet | None = None) -> pa.Schema:
    """One row an image labeled; ``mask_png`` holds class ids at the image's own size, 255 = abstained.

    Args:
        label_set: What the class ids mean; goes into the schema's metadata, so that every shard explains itself.
    """
    return _schema(
        "labels",
        [
            *_row_head(),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("mask_png", pa.binary()),
            ("confidence", pa.float32()),
            ("abstained", pa.float32()),
            ("class_fractions", _list(pa.float32())),
            ("source_sha256", pa.string()),
            ("model_digest", pa.string()),
            ("config_digest", pa.string()),
            ("raysal_version", pa.string()),
            ("labeled_at", TIME),
        ],
        _carried(label_set),
    )


def label_set_in(schema: pa.Schema) -> LabelSet | None:
    """The label set that a table of scores or labels carries, None where it carries none. Raises DataError where it can't be read."""
    text = (schema.metadata or {}).get(LABEL_SET.encode())
    return None if text is None else LabelSet.from_json(text, "table")


def manifest_of(items: Iterable[ManifestItem]) -> pa.Table:
    """The manifest of a data set's items; columns that only a listing or a file name can tell are null."""
    rows = [{"id": i.id, "uri": i.image, "exclude": list(i.exclude), "group": i.group} for i in items]
    return pa.Table.from_pylist(rows, schema=manifest_schema())


def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a Parquet file, or every Parquet file under a folder in the order of their paths.

    Args:
        uri: A file or a folder, local or any fsspec URI. Names that start with ``.`` or ``_`` are markers and are passed over.
        columns: Read only these; None reads all.

    Raises:
        InputError: Nothing there, not Parquet, a column missing, files that disagree, or a newer version; each names the file.
    """
    fs, files = parquet_files(uri)
    tables = []
    for name, path in files:
        with _reading(name), fs.open(path, "rb") as stream:
            tables.append(_read_one(stream, columns, name))
    try:
        return pa.concat_tables(tables, promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"{uri}: its {len(files)} files have different columns ({error}); keep one table to a folder") from error


def read_schema(uri: str) -> pa.Schema:
    """The columns of a table's first file, with what its metadata says. Raises InputError as `read_table` does."""
    fs, files = parquet_files(uri)
    name, path = files[0]
    with _reading(name), fs.open(path, "rb") as stream:
        return _checked(pq.ParquetFile(stream), (), name)


def scan_table(uri: str, columns: Sequence[str], rows: int, needed: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """The rows that `read_table` gives, in the same order, some at a time: memory does not grow with the table.

    Args:
        uri, columns: As in `read_table`.
        rows: Most rows of a batch. A batch's schema carries the metadata of its file.
        needed: More columns that each file must have, though they are not read.

    Raises:
        InputError: As `read_table`; a file is looked at when its turn comes.
    """
    fs, files = parquet_files(uri)
    for name, path in files:
        with _reading(name), fs.open(path, "rb") as stream:
            # Without a buffer size a whole row group is held, however few rows of it are asked for; with it, the pages they are in.
            file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=2**20)
            schema = _checked(file, [*columns, *needed], name)
            for batch in file.iter_batches(rows, columns=list(columns)):
                yield batch.replace_schema_metadata(schema.metadata)


def parquet_files(uri: str) -> tuple[fsspec.AbstractFileSystem, list[tuple[str, str]]]:
    """A table's files: what messages call each, and its path. Raises InputError where there are none."""
    fs, path = open_fs(uri)
    with store_errors(uri):
        if fs.isfile(path):
            return fs, [(uri, path)]
        files = _shown(fs.find(path), path)
        seen = "holds no Parquet file" if files or fs.exists(path) else "does not exist"
    if not files:
        raise InputError(f"{uri}: {seen}; give a .parquet file or a folder of them")
    return fs, [(f"{uri.rstrip('/')}/{file[len(path.rstrip('/')) + 1 :]}", file) for file in files]


def write_table(uri: str, table: pa.Table) -> None:
    """Writes one Parquet file (zstd), whole or not at all. Raises InputError where the disk is full."""
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    write_bytes(uri, file.getvalue())


def _schema(table: str, fields: list, more: dict[str, str] | None = None) -> pa.Schema:
    return pa.schema(fields, metadata={"raysal_table": table, "version": str(VERSION), **(more or {})})


def _carried(label_set: LabelSet | None) -> dict[str, str]:
    return {} if label_set is None else {LABEL_SET: json.dumps(label_set.to_dict())}


def _list(kind: pa.DataType, length: int = -1) -> pa.DataType:
    return pa.list_(pa.field("element", kind), length)  # Parquet's own name of it, so that a table comes back with its schema


def _row_head() -> list[tuple[str, pa.DataType]]:
    """Columns of every table with one row an image, whatever became of the image."""
    return [
        ("id", pa.string()),
        ("uri", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
    ]


def _shown(found: Iterable[str], folder: str) -> list[str]:
    def hidden(path: str) -> bool:
        return any(part[0] in "._" for part in posixpath.relpath(path, folder).split("/"))

    return sorted(p for p in found if p.endswith(".parquet") and not hidden(p))


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        with store_errors(name):
            yield
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{name}: not a whole Parquet file ({error}); delete it and run what made it again") from error


def _read_one(stream: io.IOBase, columns: Sequence[str] | None, name: str) -> pa.Table:
    file = pq.ParquetFile(stream)
    _checked(file, columns or (), name)
    return file.read(columns=list(columns) if columns is not None else None)


def _checked(file: pq.ParquetFile, columns: Sequence[str], name: str) -> pa.Schema:
    """The schema of a file that this library knows and that has the columns. Raises InputError otherwise."""
    schema = file.schema_arrow
    _check_version(schema, name)
    if missing := [c for c in columns if c not in schema.names]:
        kind = (schema.metadata or {}).get(b"raysal_table", b"foreign").decode()
        raise InputError(f"{name}: a {kind} table without column {', '.join(missing)}; it has {', '.join(schema.names)}")
    return schema


def _check_version(schema: pa.Schema, name: str) -> None:
    version = (schema.metadata or {}).get(b"version", str(VERSION).encode())
    if b"raysal_table" in (schema.metadata or {}) and (not version.isdigit() or int(version) > VERSION):
        raise InputError(f"{name}: table version {version.decode()}, this raysal reads up to {VERSION}; upgrade raysal")
