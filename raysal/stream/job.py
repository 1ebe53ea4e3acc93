"""What a run is about, before anything is changed: the images of a manifest, the output that they go to, and what is missing there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from raysal.archive.uris import absolute, open_fs
from raysal.config import Config, digest_of
from raysal.errors import InputError
from raysal.model.checkpoint import digest_at, read_info
from raysal.model.engines import settle
from raysal.stream.output import Held, Output, keys
from raysal.stream.worker import PoolWorker, Task

IN_MEMORY_ROWS = 1_000_000
"""Manifests up to this are read at once (about 150 MB): no processes for reading have to start. Longer ones are streamed."""

COLUMNS = ("id", "uri", "exclude")
"""All that is read of a manifest."""


@dataclass(frozen=True)
class Job:
    """What a run is about, before anything is changed.

    Attributes:
        manifest: A table of the columns that are needed, or the URI of a long one.
        wanted: uint64 [n], the key of each of its rows.
        output: Where rows go.
        task: What an actor does, without the run's token and on one thread.
    """

    manifest: pa.Table | str
    wanted: np.ndarray
    output: Output
    task: Task

    def missing(self, held: Held, retry_failed: bool) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of the manifest are to be done (bool [n]), and the sorted keys of those in the output that stay."""
        there = np.sort(held.key[held.good] if retry_failed else held.key)
        return ~among(self.wanted, there), there


def prepare(
    worker: type[PoolWorker],
    manifest: pa.Table | str,
    checkpoint_uri: str,
    out_uri: str,
    schema: pa.Schema,
    cfg: Config,
    class_bonus: Sequence[float] | None,
) -> Job:
    """Finds out what a run is about. Arguments and errors as in `raysal.stream.pool.run_pool`."""
    manifest, wanted = _check_manifest(manifest)
    checkpoint_uri, out_uri = absolute(checkpoint_uri), absolute(out_uri)
    digest, bonus = digest_at(checkpoint_uri), None if class_bonus is None else tuple(class_bonus)
    decides = digest_of([cfg.digest(), schema.names, bonus])
    device = "cuda" if cfg.compute.use_gpu else "cpu"
    runtime = settle(cfg.runtime, read_info(checkpoint_uri).model, device)
    # The runtime too: another one rounds otherwise, and one folder holds one model's masks to the byte.
    identity = {"kind": worker.__name__, "model_digest": digest, "config_digest": decides, "runtime": str(runtime)}
    task = Task(cfg, checkpoint_uri, digest, out_uri, schema, device, 1, "", bonus, runtime)
    return Job(manifest, wanted, Output(out_uri, schema, identity), task)


def among(keys: np.ndarray, of: np.ndarray) -> np.ndarray:
    """bool [n]: which of n keys are in a sorted array."""
    if not len(of):
        return np.zeros(len(keys), bool)
    found: np.ndarray = of[np.minimum(np.searchsorted(of, keys), len(of) - 1)] == keys
    return found


def missing_rows(manifest: pa.Table | str, missing: np.ndarray) -> pa.Table:
    """Some rows of a manifest, in memory. `missing` is bool [n]."""
    if isinstance(manifest, pa.Table):
        return manifest.filter(pa.array(missing))
    parts, at, files = [], 0, open_parquet(manifest)
    for batch in files.to_batches(columns=columns_of(files)):
        parts.append(batch.filter(pa.array(missing[at : at + batch.num_rows])))
        at += batch.num_rows
    return pa.Table.from_batches(parts).combine_chunks()


def columns_of(manifest: pyarrow.dataset.Dataset) -> list[str]:
    """Of a manifest's columns those that are read."""
    return [c for c in COLUMNS if c in manifest.schema.names]


def _check_manifest(manifest: pa.Table | str) -> tuple[pa.Table | str, np.ndarray]:
    """The columns of a manifest that are needed, in memory where it is not too long, and the key of each of its rows.

    Raises:
        InputError: It can't be used.
    """
    source = open_parquet(manifest) if isinstance(manifest, str) else pyarrow.dataset.dataset(manifest)
    name, columns, total = manifest if isinstance(manifest, str) else "manifest", source.schema.names, source.count_rows()
    if missing := [c for c in COLUMNS[:2] if c not in columns]:
        raise InputError(f"{name}: no column {', '.join(missing)}, it has {', '.join(columns)}; give a manifest, or a table with both")
    if not total:
        raise InputError(f"{name}: holds no images; index an archive first")
    if isinstance(manifest, str) and total > IN_MEMORY_ROWS:
        wanted = np.concatenate([keys(batch["id"]) for batch in source.to_batches(columns=["id"])])
    else:
        manifest = source.to_table(columns=columns_of(source)).combine_chunks()
        wanted = keys(manifest["id"])
    if twice := total - len(np.unique(wanted)):
        raise InputError(f"{name}: {twice} of {total} ids repeat; index the archive again so that each image is one row")
    return manifest, wanted


def open_parquet(uri: str) -> pyarrow.dataset.Dataset:
    """Raises InputError where there is no Parquet."""
    fs, path = open_fs(uri)
    try:
        return pyarrow.dataset.dataset(path, format="parquet", filesystem=fs)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{uri}: no manifest there ({error}); give a .parquet file or a folder of them") from error
