"""The images that a run is about: what is read of a manifest, in memory or as a stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import ray.data

from raysal.archive.tables import manifest_schema, parquet_files, read_schema
from raysal.archive.uris import is_local
from raysal.errors import InputError
from raysal.stream.output import keys

IN_MEMORY_ROWS = 200_000
"""Manifests up to this are read at once (under 100 MB): no processes for reading have to start. Longer ones are streamed."""

COLUMNS = pa.schema([manifest_schema().field(name) for name in ("id", "uri", "exclude")])
"""All that is read of a manifest."""

Manifest: TypeAlias = pa.Table | str
"""A table with the columns id and uri, and exclude where there are such masks; or the URI of a Parquet file or folder with them."""


def read(manifest: Manifest) -> tuple[Manifest, np.ndarray]:
    """The columns of a manifest that are needed, in memory where it is not too long, and the key of each of its rows, uint64 [n].

    Raises:
        InputError: It can't be used.
    """
    name = manifest if isinstance(manifest, str) else "manifest"
    with _reading(name):
        source = _open(manifest)
        total = source.count_rows()
        if not total:
            raise InputError(f"{name}: holds no images; index an archive first")
        if isinstance(manifest, str) and total > IN_MEMORY_ROWS:
            lacking, parts = 0, []
            for batch in _batches(source, ["id", "uri"]):
                lacking += batch["id"].null_count + batch["uri"].null_count
                parts.append(keys(batch["id"]))
            wanted = np.concatenate(parts)
        else:
            manifest = source.to_table().combine_chunks()
            lacking, wanted = manifest["id"].null_count + manifest["uri"].null_count, keys(manifest["id"])
    if lacking:
        raise InputError(f"{name}: {lacking} of its {total} rows lack id or uri; fill them in or take them out")
    if twice := total - len(np.unique(wanted)):
        raise InputError(f"{name}: {twice} of {total} ids repeat; index the archive again so that each image is one row")
    return manifest, wanted


def missing_rows(manifest: Manifest, missing: np.ndarray) -> pa.Table:
    """Some rows of a manifest, in memory. `missing` is bool [n]."""
    if isinstance(manifest, pa.Table):
        return manifest.filter(pa.array(missing))
    parts, at = [], 0
    with _reading(manifest):
        for batch in _batches(_open(manifest), None):
            parts.append(batch.filter(pa.array(missing[at : at + batch.num_rows])))
            at += batch.num_rows
    return pa.Table.from_batches(parts, schema=COLUMNS).combine_chunks()


def examples(manifest: Manifest, missing: np.ndarray) -> list[str]:
    """Places that whoever works on a manifest must see: some of its missing images, and itself where it is not in memory."""
    if isinstance(manifest, pa.Table):
        ends = np.flatnonzero(missing)[[0, -1]]
        return list(manifest["uri"].take(pa.array(ends)).to_pylist())
    with _reading(manifest):
        return [manifest, *_open(manifest).head(1)["uri"].to_pylist()]


def stream(manifest: str) -> ray.data.Dataset:
    """All rows of a long manifest."""
    fs, files = parquet_files(manifest)
    schema = read_schema(manifest)
    there = [name for name in COLUMNS.names if name in schema.names]
    rows = ray.data.read_parquet([path for _, path in files], filesystem=None if is_local(manifest) else fs).select_columns(there)
    wanted = pa.schema([COLUMNS.field(name) for name in there])
    if all(schema.field(name).type == wanted.field(name).type for name in there):
        return rows
    return rows.map_batches(lambda some: some.cast(wanted), batch_format="pyarrow", batch_size=None)


def _open(manifest: Manifest) -> pyarrow.dataset.Dataset:
    """The needed columns: those that a file lacks are null, and others are not even read (masks, embeddings)."""
    if isinstance(manifest, pa.Table):
        _require(manifest.schema, "manifest")
        return pyarrow.dataset.dataset(manifest.select([c for c in COLUMNS.names if c in manifest.schema.names]))
    _require(read_schema(manifest), manifest)
    fs, files = parquet_files(manifest)
    return pyarrow.dataset.dataset([path for _, path in files], schema=COLUMNS, format="parquet", filesystem=fs)


def _batches(source: pyarrow.dataset.Dataset, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """One after the other: by its defaults, Arrow reads hundreds of megabytes ahead."""
    return iter(source.to_batches(columns=columns, batch_readahead=1, fragment_readahead=1))


def _require(schema: pa.Schema, name: str) -> None:
    if missing := [c for c in ("id", "uri") if c not in schema.names]:
        raise InputError(
            f"{name}: no column {', '.join(missing)}, it has {', '.join(schema.names)}; a table of images needs the columns id and uri"
        )


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: can't be read as a manifest ({error}); index the archive again, or mend that file") from error
