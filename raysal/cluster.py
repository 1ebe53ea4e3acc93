"""Ray on this machine or the one that is named; and a clear refusal where it can't carry what was asked."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.data import DataContext

from raysal.config import JOB_CPUS, ComputeConfig
from raysal.errors import ResourceError

INGEST_CPUS = 0.5
"""Logical CPUs that a training leaves to the tasks that decode unlabelled images."""

GROW_POLL_S = 5.0
"""Between two looks at a cluster that grows."""


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
    logs = ray.LoggingConfig("JSON", "WARNING") if compute.log_json else None
    try:
        if address:
            ray.init(address=address, logging_level=logging.WARNING, logging_config=logs, log_to_driver=False)
        else:
            start_here(
                num_cpus=compute.local_cpus or 2 * (os.cpu_count() or 1),
                include_dashboard=False,
                logging_level=logging.WARNING,
                logging_config=logs,
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


def _cpus() -> list[float]:
    """Logical CPUs that work can have on each node that is up: those of a job's own process are taken."""
    held = float(os.environ.get(JOB_CPUS) or 0)
    mine = ray.get_runtime_context().get_node_id() if held else None
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [float(node["Resources"].get("CPU", 0)) - (held if mine and node["NodeID"] == mine else 0) for node in nodes]


def _besides() -> str:
    return f" besides the {os.environ[JOB_CPUS]} of this job's own process" if os.environ.get(JOB_CPUS) else ""


def _waited(compute: ComputeConfig, bundle: dict[str, float], n: int, lacks: Callable[[], str]) -> str:
    """What the cluster lacks; empty where it lacks nothing, or its autoscaler brought it within `compute.grow_s`."""
    lack, end = lacks(), time.monotonic() + compute.grow_s
    if not lack or not compute.grow_s:
        return lack
    request_resources(bundles=[bundle] * n)
    try:
        while lack and time.monotonic() < end:
            time.sleep(GROW_POLL_S)
            lack = lacks()
    finally:
        request_resources(bundles=[])  # or the nodes would stay for ever
    return f"{lack} (waited {compute.grow_s:g} s for more nodes)" if lack else ""


def check_training(compute: ComputeConfig) -> None:
    """Refuses a training that the cluster could never schedule, with the numbers, instead of waiting for ever.

    Raises:
        ResourceError: Fewer CPUs or GPUs than the workers and the ingest beside them need.
    """
    if compute.train_workers == 0:
        return
    bundle = {"CPU": compute.cpus_per_worker} | ({"GPU": 1.0} if compute.use_gpu else {})
    if lack := _waited(compute, bundle, compute.min_workers or compute.train_workers, lambda: _lacks_for_training(compute)):
        raise ResourceError(lack)


def _lacks_for_training(compute: ComputeConfig) -> str:
    workers = compute.min_workers or compute.train_workers
    cpus, gpus = _cpus(), ray.cluster_resources().get("GPU", 0)
    have, need = sum(cpus), workers * compute.cpus_per_worker + INGEST_CPUS
    fit = sum(int(room // compute.cpus_per_worker) for room in cpus)
    if have >= need and fit < workers:  # a worker can't be spread over nodes
        return (
            f"{workers} train workers of {compute.cpus_per_worker:g} CPUs each: the cluster has {have:g} CPUs, but its nodes "
            f"have room for only {fit} such workers; lower compute.cpus_per_worker or compute.train_workers"
        )
    if have < need:
        return (
            f"{workers} train workers x {compute.cpus_per_worker:g} CPUs + {INGEST_CPUS:g} for decoding = {need:g} CPUs, "
            f"but the cluster has {have:g}{_besides()}; lower compute.train_workers or compute.cpus_per_worker, "
            "or add nodes (compute.address)"
        )
    if compute.use_gpu and gpus < workers:
        return (
            f"{workers} train workers need {workers} GPUs, but the cluster has {gpus:g}; "
            "lower compute.train_workers or set compute.use_gpu=false"
        )
    return ""


def score_actors(compute: ComputeConfig) -> int:
    """Number of model actors: as asked, or one a GPU or a core.

    Raises:
        ResourceError: The cluster has fewer CPUs or GPUs than the actors and one read task need.
    """
    if compute.use_gpu:
        actors = compute.score_actors or max(1, int(ray.cluster_resources().get("GPU", 0)))
    else:
        cores = sum(_cpus())
        default = os.cpu_count() or 1 if len(ray.nodes()) == 1 else int(cores)
        actors = compute.score_actors or max(1, min(default, int((cores - INGEST_CPUS) / compute.cpus_per_actor)))
    bundle = {"CPU": compute.cpus_per_actor} | ({"GPU": 1.0} if compute.use_gpu else {})
    if lack := _waited(compute, bundle, actors, lambda: _lacks_for_scoring(compute, actors)):
        raise ResourceError(lack)
    return actors


def _lacks_for_scoring(compute: ComputeConfig, actors: int) -> str:
    cores, gpus = sum(_cpus()), ray.cluster_resources().get("GPU", 0)
    if compute.use_gpu and gpus < actors:
        return (
            f"{actors} score actors need {actors} GPUs, but the cluster has {gpus:g}; "
            "lower compute.score_actors or set compute.use_gpu=false"
        )
    need = actors * compute.cpus_per_actor + INGEST_CPUS
    if cores < need:
        return (
            f"{actors} score actors x {compute.cpus_per_actor:g} CPUs + {INGEST_CPUS:g} for reading = {need:g} CPUs, but the cluster has "
            f"{cores:g}{_besides()}; lower compute.score_actors or compute.cpus_per_actor"
        )
    return ""
