"""Ray on this machine or the one that is named; and a clear refusal where it can't carry what was asked."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from typing import Any

import ray
from ray.data import DataContext

from raysal.config import ComputeConfig
from raysal.errors import ResourceError

INGEST_CPUS = 0.5
"""Logical CPUs that a training leaves to the tasks that decode unlabelled images."""


@contextlib.contextmanager
def connected(compute: ComputeConfig) -> Iterator[None]:
    """Joins the cluster at ``compute.address`` or starts Ray on this machine, and leaves it as it was found.

    A local Ray counts each core twice: tasks that fetch and decode mostly wait, and one-core machines must not deadlock.

    Raises:
        ResourceError: No cluster answers at the address, or Ray can't start here.
    """
    if ray.is_initialized():
        yield
        return
    # Ray's C++ side reports harmless things as errors, for example the arguments of every pool of actors.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = compute.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        else:
            start_here(
                num_cpus=compute.local_cpus or 2 * (os.cpu_count() or 1),
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=bool(os.environ.get("RAYSAL_WORKER_LOGS")),
                object_store_memory=_object_store_bytes(),
            )
    except Exception as error:  # Ray raises all sorts, bare Exception included
        where = f"no Ray cluster answers at {address!r}" if address else "Ray can't start on this machine"
        raise ResourceError(f"{where}: {error}; check compute.address, or leave it empty to run on this machine alone") from error
    try:
        yield
    finally:
        ray.shutdown()


def start_here(**options: Any) -> Any:
    """`ray.init` on this machine; once more where it timed out, as Ray waits only half a minute for its own processes."""
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it tells at each start that it asks for a token
    try:
        return ray.init(address="local", **options)
    except Exception as error:
        if "timed out" not in str(error):
            raise
        ray.shutdown()
        return ray.init(address="local", **options)


@contextlib.contextmanager
def data_context(ordered: bool = False) -> Iterator[None]:
    """Ray Data's settings for one pipeline of ours; the caller's are as they were afterwards.

    Args:
        ordered: Blocks leave in the order in which they came, so that a training sees its draws in the same order each time.
    """
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = ordered
    context.enable_progress_bars = False  # the command line draws its own
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # large images, long evaluations: a stream may rest for any time
    console = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [h.level for h in console]
    for handler in console:
        handler.setLevel(logging.ERROR)
    try:
        with DataContext.current(context):
            yield
    finally:
        for handler, level in zip(console, levels, strict=True):
            handler.setLevel(level)


def _object_store_bytes() -> int | None:
    """A store that fits the machine's shared memory; None lets Ray choose. Small shared memory makes Ray fall back to disk."""
    with contextlib.suppress(OSError):
        return max(100 * 2**20, min(2 * 2**30, int(0.6 * shutil.disk_usage("/dev/shm").free)))
    return None


def check_training(compute: ComputeConfig) -> None:
    """Refuses a training that the cluster could never schedule, with the numbers, instead of waiting for ever.

    Raises:
        ResourceError: Fewer CPUs or GPUs than the workers and the ingest beside them need.
    """
    workers = compute.train_workers
    if workers == 0:
        return
    have = ray.cluster_resources()
    need = workers * compute.cpus_per_worker + INGEST_CPUS
    fit = sum(int(float(node["Resources"].get("CPU", 0)) // compute.cpus_per_worker) for node in ray.nodes() if node["Alive"])
    if have.get("CPU", 0) >= need and fit < workers:  # a worker can't be spread over nodes
        raise ResourceError(
            f"{workers} train workers of {compute.cpus_per_worker:g} CPUs each: the cluster has {have.get('CPU', 0):g} CPUs, but its nodes "
            f"have room for only {fit} such workers; lower compute.cpus_per_worker or compute.train_workers"
        )
    if have.get("CPU", 0) < need:
        raise ResourceError(
            f"{workers} train workers x {compute.cpus_per_worker:g} CPUs + {INGEST_CPUS:g} for decoding = {need:g} CPUs, "
            f"but the cluster has {have.get('CPU', 0):g}; lower compute.train_workers or compute.cpus_per_worker, "
            "or add nodes (compute.address)"
        )
    if compute.use_gpu and have.get("GPU", 0) < workers:
        raise ResourceError(
            f"{workers} train workers need {workers} GPUs, but the cluster has {have.get('GPU', 0):g}; "
            "lower compute.train_workers or set compute.use_gpu=false"
        )


def score_actors(compute: ComputeConfig) -> int:
    """Number of model actors: as asked, or one a GPU or a core.

    Raises:
        ResourceError: The cluster has fewer CPUs or GPUs than the actors and one read task need.
    """
    have = ray.cluster_resources()
    cores = sum(float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    if compute.use_gpu:
        actors = compute.score_actors or max(1, int(have.get("GPU", 0)))
        if have.get("GPU", 0) < actors:
            raise ResourceError(
                f"{actors} score actors need {actors} GPUs, but the cluster has {have.get('GPU', 0):g}; "
                "lower compute.score_actors or set compute.use_gpu=false"
            )
    else:
        default = os.cpu_count() or 1 if len(ray.nodes()) == 1 else int(cores)
        actors = compute.score_actors or max(1, default)
    need = actors * compute.cpus_per_actor + INGEST_CPUS
    if cores < need:
        raise ResourceError(
            f"{actors} score actors x {compute.cpus_per_actor:g} CPUs + {INGEST_CPUS:g} for reading = {need:g} CPUs, but the cluster has "
            f"{cores:g}; lower compute.score_actors or compute.cpus_per_actor"
        )
    return actors
