"""What scoring and labeling an archive share: a manifest goes in, Parquet shards come out, every image exactly once.

The unit of work is a block of manifest rows. One actor takes a block, fetches, decodes and runs its images, writes one shard
and sends back a receipt (`raysal.stream.worker`). So pixels, masks and scores never cross the object store or the driver, and
memory does not grow with the archive. A shard is named by the ids in it: a block that is done again, because its actor died,
replaces its own shard with the same rows. No row is lost, none is doubled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import ActorDiedError, RayError

from raysal import errors
from raysal.archive.uris import absolute, exists, is_local, join, list_names, open_fs, read_bytes, remove_tree, write_bytes
from raysal.cluster import data_context, score_actors
from raysal.config import Config
from raysal.errors import InputError, RaysalError
from raysal.model.checkpoint import digest_at
from raysal.stream.worker import STATUSES, PoolWorker, Task

SUCCESS = "_SUCCESS"
"""Written last: a folder without it is not a whole output."""

OURS = re.compile(r"part-[0-9a-f]{24}\.parquet|_SUCCESS|_attempt-part-[0-9a-f]{24}\.parquet\.json")
"""Names of the files that a run leaves in its folder, and may delete there; temporary names continue them."""

BLOCKS_PER_ACTOR = 16
"""Blocks each actor gets: enough that all finish together and a death costs little, few enough that shards are not dust."""

LARGEST_BLOCK = 256
"""Rows of a block, and of a shard, in a large archive; what one death costs at most."""

IN_MEMORY_ROWS = 1_000_000
"""Manifests up to this are read at once (about 150 MB): no processes for reading have to start. Longer ones are streamed."""

COLUMNS = ("id", "uri", "exclude")
"""All that is read of a manifest."""

Progress = Callable[[int, int, dict[str, int]], None]
"""Called as on_progress(images done, images in all, counts by status) after each block, on the caller's thread."""


@dataclass(frozen=True)
class Summary:
    """What came of a run; its `_SUCCESS` file holds the same.

    Attributes:
        rows: Images in, and rows out.
        counts: Rows by status; every status is named.
        model_digest: Of the checkpoint.
        seconds: From call to return, start-up of actors included.
        images_per_second: rows / seconds.
    """

    rows: int
    counts: dict[str, int]
    model_digest: str
    seconds: float
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_pool(
    worker: type[PoolWorker],
    manifest: pa.Table | str,
    checkpoint_uri: str,
    out_uri: str,
    *,
    schema: pa.Schema,
    cfg: Config,
    on_progress: Progress | None = None,
    class_bonus: Sequence[float] | None = None,
    rows_per_shard: int | None = None,
) -> Summary:
    """Runs a worker over every image of a manifest.

    Args:
        worker: What an actor does with images.
        manifest: Columns id and uri, and exclude where there are such masks: a table, or the URI of a Parquet file or folder.
        checkpoint_uri: The model.
        out_uri: A folder of its own; an earlier output in it, whole or partial, is replaced.
        schema: Of the output.
        cfg: Its `compute` decides how many actors there are.
        on_progress, class_bonus: As in `score_pool`.
        rows_per_shard: Rows of a block; None chooses by archive and actors.

    Raises:
        InputError: The manifest is empty, lacks a column or names an image twice; out_uri holds something else; the checkpoint
            can't be used; or the cluster can't carry the actors.
        RaysalError: The run broke down.
    """
    started = time.perf_counter()
    manifest, total = _check_manifest(manifest)
    checkpoint_uri, out_uri = absolute(checkpoint_uri), absolute(out_uri)
    digest, actors = digest_at(checkpoint_uri), score_actors(cfg.compute)
    rows = rows_per_shard or min(LARGEST_BLOCK, max(cfg.score.batch_size, math.ceil(total / (actors * BLOCKS_PER_ACTOR))))
    actors = min(actors, math.ceil(total / rows))
    task = Task(
        cfg=cfg,
        checkpoint_uri=checkpoint_uri,
        model_digest=digest,
        out_uri=out_uri,
        schema=schema,
        device="cuda" if cfg.compute.use_gpu else "cpu",
        threads=max(1, _cores() // actors),
        class_bonus=None if class_bonus is None else tuple(class_bonus),
    )
    _clear(out_uri)
    counts = _stream(worker, manifest, task, rows, actors, total, on_progress)
    seconds = time.perf_counter() - started
    summary = Summary(total, counts, digest, seconds, total / seconds)
    write_bytes(join(out_uri, SUCCESS), (json.dumps(summary.to_dict(), indent=2) + "\n").encode())
    return summary


def finished_by(out_uri: str) -> str | None:
    """Digest of the model of a finished output, None where it is not finished."""
    uri = join(out_uri, SUCCESS)
    digest: str | None = json.loads(read_bytes(uri))["model_digest"] if exists(uri) else None
    return digest


def _stream(
    worker: type[PoolWorker], manifest: pa.Table | str, task: Task, rows: int, actors: int, total: int, on_progress: Progress | None
) -> dict[str, int]:
    """Sends blocks through the actors and counts receipts. Raises RaysalError where images and rows don't come out even."""
    counts, shards = Counter({status: 0 for status in STATUSES}), set[str]()
    compute = task.cfg.compute
    with _as_raysal_errors(), data_context():
        DataContext.get_current().raise_original_map_exception = True  # not a wrapper that loses its cause on the way
        receipts = _blocks(manifest, rows).map_batches(
            worker,
            fn_constructor_kwargs={"task": task},
            batch_size=rows,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            num_cpus=compute.cpus_per_actor,
            num_gpus=1 if compute.use_gpu else None,
        )
        # Closed by name: after an error in on_progress the traceback would keep the run going.
        batches: Any = iter(receipts.iter_batches(batch_size=None, batch_format="pyarrow"))
        with contextlib.closing(batches):
            for receipt in (row for batch in batches for row in batch.to_pylist()):
                if "error" in receipt:
                    raise getattr(errors, receipt["error"], RaysalError)(receipt["message"])
                if receipt["shard"] in shards:
                    raise InputError("the manifest names the same images twice; index the archive again so that each image is one row")
                shards.add(receipt["shard"])
                counts.update({status: receipt[status] for status in STATUSES})
                if on_progress is not None:
                    on_progress(counts.total(), total, dict(counts))
    names = list_names(task.out_uri)
    written = {name for name in names if name.endswith(".parquet")}
    if counts.total() != total or written != shards:
        raise RaysalError(
            f"{task.out_uri}: {total} images went in, {counts.total()} rows came out in {len(shards)} shards, and the folder holds "
            f"{len(written)}; was it or the manifest changed meanwhile? Run again"
        )
    for name in (n for n in names if n not in shards and OURS.match(n)):
        remove_tree(join(task.out_uri, name))  # half-written files of actors that died
    return dict(counts)


def _blocks(manifest: pa.Table | str, rows: int) -> Dataset:
    """The manifest as blocks of `rows` rows, the last perhaps shorter."""
    if isinstance(manifest, pa.Table):
        return ray.data.from_arrow([manifest.slice(start, rows) for start in range(0, manifest.num_rows, rows)])
    files = _parquet(manifest)
    source = ray.data.read_parquet(files.files, filesystem=None if is_local(manifest) else open_fs(manifest)[0])
    columns = source.select_columns([c for c in COLUMNS if c in files.schema.names])
    return columns.repartition(target_num_rows_per_block=rows, strict=True)


def _check_manifest(manifest: pa.Table | str) -> tuple[pa.Table | str, int]:
    """The columns of a manifest that are needed, in memory where it is not too long, and its number of rows.

    Raises:
        InputError: It can't be used. In a stream, images named twice come to light later, by their receipts.
    """
    source = _parquet(manifest) if isinstance(manifest, str) else pyarrow.dataset.dataset(manifest)
    name, columns, total = manifest if isinstance(manifest, str) else "manifest", source.schema.names, source.count_rows()
    if missing := [c for c in COLUMNS[:2] if c not in columns]:
        raise InputError(f"{name}: no column {', '.join(missing)}, it has {', '.join(columns)}; give a manifest, or a table with both")
    if not total:
        raise InputError(f"{name}: holds no images; index an archive first")
    if isinstance(manifest, str) and total > IN_MEMORY_ROWS:
        return manifest, total
    table = source.to_table(columns=[c for c in COLUMNS if c in columns]).combine_chunks()
    if twice := total - len(table["id"].unique()):
        raise InputError(f"{name}: {twice} of {total} ids repeat; index the archive again so that each image is one row")
    return table, total


def _parquet(uri: str) -> pyarrow.dataset.Dataset:
    fs, path = open_fs(uri)
    try:
        return pyarrow.dataset.dataset(path, format="parquet", filesystem=fs)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{uri}: no manifest there ({error}); give a .parquet file or a folder of them") from error


def _clear(out_uri: str) -> None:
    """Deletes an earlier output, and nothing else. Raises InputError where the folder holds anything that no run wrote."""
    names = list_names(out_uri)
    if others := [n for n in names if not OURS.match(n)]:
        raise InputError(
            f"{out_uri}: holds {', '.join(others[:3])}, which is no output of scoring or labeling; name an empty or new folder"
        )
    # The marker first: a run that dies here must not leave it beside half an output.
    for name in sorted(names, key=lambda n: n != SUCCESS):
        remove_tree(join(out_uri, name))


@contextlib.contextmanager
def _as_raysal_errors() -> Iterator[None]:
    """What nobody foresaw arrives wrapped in Ray's errors and tracebacks; the user gets the reason in one line, the rest as cause."""
    try:
        yield
    except RayError as error:
        reason = getattr(error, "cause", None) or error
        lines = [line for line in str(reason).splitlines() if line.strip()] or [""]
        # Ray adds advice below an error's text, but puts a traceback above the reason why an actor could not start.
        line = lines[-1] if isinstance(reason, ActorDiedError) else f"{type(reason).__name__}: {lines[0]}"
        raise RaysalError(f"the run broke down: {line}; mend that and run the same command again") from error


def _cores() -> int:
    """Cores that the actors share: this machine's, or those that a cluster of several nodes declares."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return os.cpu_count() or 1
    return int(sum(float(node["Resources"].get("CPU", 0)) for node in nodes))
