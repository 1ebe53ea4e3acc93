"""The tables that pass between rooms: their columns, and reading and writing them as Parquet at any fsspec URI.

Column names are interface. Each schema carries ``raysal_table`` (which table) and ``version`` in its metadata; a table of a newer
version than this library knows is refused instead of misread.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterable, Sequence
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from raysal.archive.uris import open_fs, write_bytes
from raysal.errors import InputError

VERSION = 1
TIME = pa.timestamp("us", tz="UTC")


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


def scores_schema(score_names: Sequence[str], embedding_dim: int = 0) -> pa.Schema:
    """One row an image of a scored pool; null scores where the status is not ``ok``.

    Args:
        score_names: One float64 column each, in this order.
        embedding_dim: Length of the float16 ``embedding``; 0 leaves the column out.

    Raises:
        InputError: A score name twice, or the name of another column.
    """
    head = [*_row_head(), ("width", pa.int32()), ("height", pa.int32())]
    tail = [("class_fractions", _list(pa.float32()))]
    if embedding_dim:
        tail.append(("embedding", _list(pa.float16(), embedding_dim)))
    tail += [("model_digest", pa.string()), ("scored_at", TIME)]
    schema = _schema("scores", [*head, *((name, pa.float64()) for name in score_names), *tail])
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


def labels_schema() -> pa.Schema:
    """One row an image labeled; ``mask_png`` holds class ids at the image's own size, 255 = abstained."""
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
    )


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
    fs, path = open_fs(uri)
    files = [path] if fs.isfile(path) else _parquet_files(fs.find(path), path)
    if not files:
        seen = "holds no Parquet file" if fs.exists(path) else "does not exist"
        raise InputError(f"{uri}: {seen}; give a .parquet file or a folder of them")
    tables = []
    for file in files:
        name = uri if file == path else f"{uri.rstrip('/')}/{file[len(path.rstrip('/')) + 1 :]}"
        with fs.open(file, "rb") as stream:
            tables.append(_read_one(stream, columns, name))
    try:
        return pa.concat_tables(tables, promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"{uri}: its {len(files)} files have different columns ({error}); keep one table to a folder") from error


def write_table(uri: str, table: pa.Table) -> None:
    """Writes one Parquet file (zstd), whole or not at all. Raises InputError where the disk is full."""
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    write_bytes(uri, file.getvalue())


def _schema(table: str, fields: list) -> pa.Schema:
    return pa.schema(fields, metadata={"raysal_table": table, "version": str(VERSION)})


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


def _parquet_files(found: Iterable[str], folder: str) -> list[str]:
    def hidden(path: str) -> bool:
        return any(part[0] in "._" for part in posixpath.relpath(path, folder).split("/"))

    return sorted(p for p in found if p.endswith(".parquet") and not hidden(p))


def _read_one(stream: io.IOBase, columns: Sequence[str] | None, name: str) -> pa.Table:
    try:
        file = pq.ParquetFile(stream)
        schema = file.schema_arrow
        _check_version(schema, name)
        missing = [c for c in columns or () if c not in schema.names]
        if missing:
            kind = (schema.metadata or {}).get(b"raysal_table", b"foreign").decode()
            raise InputError(f"{name}: a {kind} table without column {', '.join(missing)}; it has {', '.join(schema.names)}")
        return file.read(columns=list(columns) if columns is not None else None)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{name}: not a whole Parquet file ({error}); delete it and run what made it again") from error


def _check_version(schema: pa.Schema, name: str) -> None:
    version = (schema.metadata or {}).get(b"version", str(VERSION).encode())
    if b"raysal_table" in (schema.metadata or {}) and (not version.isdigit() or int(version) > VERSION):
        raise InputError(f"{name}: table version {version.decode()}, this raysal reads up to {VERSION}; upgrade raysal")
