"""What scoring and labeling an archive share: a manifest goes in, Parquet shards come out, every image exactly once.

The unit of work is a block of manifest rows. One actor takes a block, fetches, decodes and runs its images, writes one shard
and sends back a receipt (`raysal.stream.worker`). So pixels, masks and scores never cross the object store or the driver, and
memory does not grow with the archive, but for some 50 bytes an image in the driver. A block that is done again, because its actor
died, replaces its own shard with the same rows; a run that is started again does what the output (`raysal.stream.output`) does not
hold. No row is lost, none is doubled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import ActorDiedError, RayError

from raysal import errors
from raysal.archive.uris import join, read_record
from raysal.cluster import connected, cores, data_context, elsewhere, of_an_actor, score_actors
from raysal.config import Config
from raysal.errors import RaysalError
from raysal.model.checkpoint import INFO
from raysal.nodes import check_nodes
from raysal.plan import block_rows
from raysal.stream import manifest as manifests
from raysal.stream.job import Job, among, prepare
from raysal.stream.manifest import Manifest, missing_rows
from raysal.stream.output import EMPTY, SUCCESS, keys
from raysal.stream.worker import STATUSES, PoolWorker, Task
from raysal.telemetry.meters import Meters, metered

Progress = Callable[[int, int, dict[str, int]], None]
"""Called as on_progress(images done, images in all, counts by status) after each block, on the caller's thread."""


@dataclass(frozen=True)
class Summary:
    """What came of a run; its `_SUCCESS` file holds the same.

    Attributes:
        rows: Images of the manifest; each has one row in the output.
        done: Of these, how many this run did; the others were there before.
        others: Rows in the output of images that the manifest does not name; left as they are.
        counts: All rows of the output by status; every status is named.
        model_digest: Of the checkpoint.
        config_digest: Of the configuration.
        runtime: What computed the network.
        seconds: From call to return, start-up of actors included.
        images_per_second: done / seconds.
        core_seconds: What this run cost: seconds x cores that it kept busy, at most, where actors come and go.
        coverage: Of masks: mean over all images of the share of their pixels that have a class. None of scores.
    """

    rows: int
    done: int
    others: int
    counts: dict[str, int]
    model_digest: str
    config_digest: str
    runtime: str
    seconds: float
    images_per_second: float
    core_seconds: float
    coverage: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        counts = ", ".join(f"{n:,} {status}" for status, n in self.counts.items() if n)
        new = f"{self.done:,} of {self.rows:,} images done now, {self.images_per_second:.1f} images/s" if self.done else "nothing new"
        covered = "" if self.coverage is None else f"; {100 * self.coverage:.1f}% of their pixels have a class"
        return f"{counts}{covered}; {new}"


class Kept:
    """The worker of this process, kept from one run to the next: however often an archive is looked at, a model is loaded once."""

    def __init__(self) -> None:
        self._worker: PoolWorker | None = None

    def worker(self, kind: type[PoolWorker], task: Task) -> PoolWorker:
        """The worker of a task."""
        if self._worker is None or type(self._worker) is not kind or not self._worker.serves(task):
            self._worker = None  # the old model goes before the new one comes
            self._worker = kind(task)
        self._worker.task = task
        return self._worker


def run_pool(
    worker: type[PoolWorker],
    manifest: Manifest,
    checkpoint_uri: str,
    out_uri: str,
    *,
    schema: pa.Schema,
    cfg: Config,
    on_progress: Progress | None = None,
    class_bonus: Sequence[float] | None = None,
    rows_per_shard: int | None = None,
    retry_failed: bool | str = False,
    replace: bool = False,
    kept: Kept | None = None,
) -> Summary:
    """Runs a worker over every image of a manifest that the output does not hold yet.

    Args:
        worker: What an actor does with images.
        manifest: The images.
        checkpoint_uri: The model.
        out_uri: A folder of its own.
        schema: Of the output.
        cfg: Its `compute` decides how many actors there are.
        on_progress, class_bonus: As in `score_pool`.
        rows_per_shard: Rows of a block; None chooses by archive and actors.
        retry_failed: Do images again whose row says that they failed; or those of one status.
        replace: Drop the rows that another model or configuration left in the folder.
        kept: Holds this process's worker from one call to the next.

    Raises:
        InputError: The manifest is empty, lacks a column or names an image twice; out_uri holds something else, or rows of another model
            or configuration; the checkpoint can't be used; or the cluster can't carry the actors.
        RaysalError: The run broke down.
    """
    started = time.perf_counter()
    job = prepare(worker, manifest, checkpoint_uri, out_uri, schema, cfg, class_bonus)
    # Looked at before it is claimed: who finds a finished output and nothing to do changes nothing. Without the marker nobody can tell
    # a run that died before its end from one that is at work, so such an output is claimed, and the older run gives up.
    whole, token = job.output.mine(replace) and finished_by(out_uri) is not None, None
    held = job.output.read() if whole else EMPTY
    missing, there = job.missing(held, retry_failed)
    with _joined(job, missing):
        if not whole or missing.any() or len(held.twice):
            token = job.output.claim(replace)
            held = job.output.held()
            missing, there = job.missing(held, retry_failed)
        todo, busy = int(missing.sum()), 0
        if token is not None and todo:
            job.output.open()
            task = dataclasses.replace(job.task, token=token)
            busy = _work(worker, job.manifest, missing, there, task, rows_per_shard, on_progress, kept or Kept())
            held = job.output.held()
    if absent := int(job.missing(held)[0].sum()):
        raise RaysalError(
            f"{out_uri}: {absent} of {len(job.wanted)} images have no row at the end; was the folder changed? Run the command again"
        )
    seconds = time.perf_counter() - started
    summary = Summary(
        rows=len(job.wanted),
        done=todo,
        others=len(held.key) - len(job.wanted),
        counts=held.counts(),
        model_digest=job.task.model_digest,
        config_digest=cfg.digest(),
        runtime=str(job.task.runtime),
        seconds=seconds,
        images_per_second=todo / seconds,
        core_seconds=seconds * busy,
        coverage=held.coverage(),
    )
    if token is not None:
        job.output.commit(summary.to_dict(), held, token)
    return summary


@contextlib.contextmanager
def _joined(job: Job, missing: np.ndarray) -> Iterator[None]:
    """Joins the cluster that there is work for, and has each of its nodes show that it can do its share. A refused run changes nothing."""
    compute = job.task.cfg.compute
    if not (missing.any() and elsewhere(compute)):
        yield
        return
    with connected(compute):
        score_actors(compute)  # nodes that have to come first are asked too
        reads = [join(job.task.checkpoint_uri, INFO), *manifests.examples(job.manifest, missing)]
        check_nodes(reads, [job.output.uri], job.task.runtime.needs_bfloat16)
        yield


def finished_by(out_uri: str) -> str | None:
    """Digest of the model of a finished output, None where it is not finished."""
    digest: str | None = read_record(join(out_uri, SUCCESS)).get("model_digest")
    return digest


def _work(
    worker: type[PoolWorker],
    manifest: Manifest,
    missing: np.ndarray,
    there: np.ndarray,
    task: Task,
    rows_per_shard: int | None,
    on_progress: Progress | None,
    kept: Kept,
) -> int:
    """Does the missing images of a manifest, here or on Ray. Returns the cores that were kept busy."""
    compute, todo = task.cfg.compute, int(missing.sum())
    here = todo <= compute.in_process and not elsewhere(compute)
    with contextlib.nullcontext() if here else connected(compute), metered(task.out_uri) as meters:
        meters.model(task.model_digest, str(task.runtime))
        tally = _Tally(todo, on_progress, meters)
        least, actors = (1, 1) if here else score_actors(compute)
        rows = rows_per_shard or block_rows(todo, actors, task.cfg.score.batch_size)
        actors = min(actors, math.ceil(todo / rows))
        least = min(least, actors)
        nodes = [os.cpu_count() or 1] if here else [*cores().values()]
        task = dataclasses.replace(task, threads=_threads(nodes, actors, math.ceil(compute.cpus_per_actor) if least < actors else None))
        if here:
            _work_here(kept, worker, missing_rows(manifest, missing), task, rows, tally)
        else:
            pool = ActorPoolStrategy(size=actors) if least == actors else ActorPoolStrategy(min_size=least, max_size=actors)
            _stream(worker, lambda: _blocks(manifest, missing, there, rows), task, rows, pool, tally)
    return actors * task.threads


def _threads(nodes: Sequence[int], actors: int, booked: int | None) -> int:
    """Threads of an actor: its share of the cores of all nodes, but no more than one node has; where nodes come and go, what it books."""
    return max(1, booked or min(sum(nodes) // actors, max(nodes)))


def _work_here(kept: Kept, worker: type[PoolWorker], images: pa.Table, task: Task, rows: int, tally: _Tally) -> None:
    """A few images in this process, by the worker that actors would be."""
    threads = torch.get_num_threads()
    torch.set_num_threads(task.threads)
    try:
        work = kept.worker(worker, task)
        for start in range(0, images.num_rows, rows):
            tally.add(work(images.slice(start, rows)))
    finally:
        torch.set_num_threads(threads)


def _stream(worker: type[PoolWorker], blocks: Callable[[], Dataset], task: Task, rows: int, pool: ActorPoolStrategy, tally: _Tally) -> None:
    """Sends blocks through the actors and counts receipts. Raises RaysalError where images and rows don't come out even."""
    booked = of_an_actor(task.cfg.compute)
    with _as_raysal_errors(), data_context():
        DataContext.get_current().raise_original_map_exception = True  # not a wrapper that loses its cause on the way
        receipts = blocks().map_batches(  # made here: a data set keeps the context it was made in
            worker,
            fn_constructor_kwargs={"task": task},
            batch_size=rows,
            batch_format="pyarrow",
            compute=pool,
            num_cpus=booked["CPU"],
            num_gpus=booked.get("GPU"),
            memory=booked.get("memory"),
        )
        # Closed by name: after an error in on_progress the traceback would keep the run going.
        batches: Any = iter(receipts.iter_batches(batch_size=None, batch_format="pyarrow"))
        with contextlib.closing(batches):
            for batch in batches:
                tally.add(batch)
    if tally.counts.total() != tally.todo:
        raise RaysalError(
            f"{task.out_uri}: {tally.todo} images went in and {tally.counts.total()} rows came out; run the same command again"
        )


class _Tally:
    """Adds up receipts and tells of them."""

    def __init__(self, todo: int, on_progress: Progress | None, meters: Meters) -> None:
        self.todo, self.on_progress, self.meters = todo, on_progress, meters
        self.counts = Counter({status: 0 for status in STATUSES})
        meters.rows({}, todo)

    def add(self, receipts: pa.Table) -> None:
        """Raises the error that a receipt carries."""
        for receipt in receipts.to_pylist():
            if "error" in receipt:
                raise getattr(errors, receipt["error"], RaysalError)(receipt["message"])
            new = {status: receipt[status] for status in STATUSES}
            self.counts.update(new)
            self.meters.rows(new, self.todo - self.counts.total())
            if self.on_progress is not None:
                self.on_progress(self.counts.total(), self.todo, dict(self.counts))


def _blocks(manifest: Manifest, missing: np.ndarray, there: np.ndarray, rows: int) -> Dataset:
    """The missing images of a manifest as blocks of `rows` rows, the last perhaps shorter."""
    if isinstance(manifest, pa.Table) or missing.sum() <= manifests.IN_MEMORY_ROWS:
        table = missing_rows(manifest, missing)
        return ray.data.from_arrow([table.slice(start, rows) for start in range(0, table.num_rows, rows)])
    images = manifests.stream(manifest)
    if len(there):
        done = ray.put(there)
        images = images.map_batches(lambda some: _without(some, ray.get(done)), batch_format="pyarrow", batch_size=None)
    return images.repartition(target_num_rows_per_block=rows, strict=True)


def _without(images: pa.Table, done: np.ndarray) -> pa.Table:
    return images.filter(pa.array(~among(keys(images["id"]), done)))


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
