"""Ray on this machine or the one that is named; and a clear refusal where it can't carry what was asked."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.data import DataContext
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysal.config import ComputeConfig
from raysal.environment import JOB_CPUS, JOB_MEMORY
from raysal.errors import ResourceError
from raysal.plan import ACTOR_BYTES
from raysal.words import amounts

INGEST_CPUS = 0.5
"""Logical CPUs that a training leaves to the tasks that decode unlabelled images."""

COORDINATOR, HEAD = "AutoscalingCoordinator", "node:__internal_head__"
"""Name and namespace of an actor of Ray Data, see `_helpers_on_head`; the resource by which Ray marks a head."""

HELPERS_S = 60.0
"""Within which a head starts a process."""

GROW_POLL_S = 5.0
"""Between two looks at a cluster that grows."""

ASKED_S = 60.0
"""After which a cluster forgets what was asked for by a job that is gone."""


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
            _helpers_on_head()
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


def _helpers_on_head() -> None:
    """Has the actors that Ray Data keeps for all jobs of a cluster live on its head.

    Whoever needs one first starts it, bound for good to the node it is on itself: a worker, for a submitted job. That node can never go
    idle, and once it is lost every stream breaks that has to restart an actor. Without its head a cluster is gone anyway.
    """
    with contextlib.suppress(ValueError):
        ray.get_actor(COORDINATOR, namespace=COORDINATOR)
        return
    head = next((node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]), None)
    if head not in (None, ray.get_runtime_context().get_node_id()):
        there = NodeAffinitySchedulingStrategy(head, soft=False)
        with contextlib.suppress(RayError):  # a head that can't run it: they begin where the first job is
            ray.get(_start_helpers.options(scheduling_strategy=there).remote(), timeout=HELPERS_S)


@ray.remote(num_cpus=0)
def _start_helpers() -> None:
    """Ray Data's own ways to them, which bind them to the node of this task; there are no public ones."""
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor

    for start in (get_or_create_actor_location_tracker, get_or_create_stats_actor, get_or_create_autoscaling_coordinator):
        start()


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


Resources = dict[str, float]
"""As Ray names them: CPU, GPU, and memory in bytes."""


def _held() -> Resources:
    """What a job's own process books on its node."""
    return {"CPU": float(os.environ.get(JOB_CPUS) or 0), "memory": float(os.environ.get(JOB_MEMORY) or 0)}


def _nodes() -> list[Resources]:
    """What work can have on each node that is up: what a job's own process books is taken."""
    held = _held()
    mine = ray.get_runtime_context().get_node_id() if any(held.values()) else None
    up = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return [has | {what: has.get(what, 0.0) - n for what, n in held.items()} if id_ == mine else has for id_, has in up]


def cores() -> dict[str, int]:
    """Cores of each node that is up, by its id: as many as Ray was told of, as a container sees all of its host's, but of this machine no
    more than it has, as a local Ray counts each twice."""
    mine, here = ray.get_runtime_context().get_node_id(), os.cpu_count() or 1
    told = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]}
    return {id_: min(n, here) if id_ == mine else n for id_, n in told.items()}


def _all(nodes: list[Resources], what: str) -> float:
    return sum(node.get(what, 0.0) for node in nodes)


def _lacks_room(nodes: list[Resources], n: int, what: str, bundle: Resources, knobs: str) -> str:
    """What is wrong where the cluster has what is needed, but on too many nodes: a process is never spread over several."""
    fit = sum(max(0, min(math.floor(node.get(k, 0.0) / v + 1e-9) for k, v in bundle.items())) for node in nodes)
    return (
        "" if fit >= n else f"{n} {what}, each of {amounts(bundle)}: the nodes of the cluster have room for only {fit} such; lower {knobs}"
    )


def _besides() -> str:
    return f" besides the {os.environ[JOB_CPUS]} of this job's own process" if os.environ.get(JOB_CPUS) else ""


def _waited(compute: ComputeConfig, bundle: Resources, n: int, lacks: Callable[[], str]) -> str:
    """What the cluster lacks; empty where it lacks nothing, or its autoscaler brought it within `compute.grow_s`."""
    lack, end = lacks(), time.monotonic() + compute.grow_s
    if not lack or not compute.grow_s:
        return lack
    besides = [{what: n for what, n in _held().items() if n}, {"CPU": INGEST_CPUS}]  # Ray's autoscaler counts whole nodes
    with _asked_for([bundle] * n + [share for share in besides if share], "LOW"):
        while lack and time.monotonic() < end:
            time.sleep(GROW_POLL_S)
            lack = lacks()
    return f"{lack} (waited {compute.grow_s:g} s for more nodes)" if lack else ""


@contextlib.contextmanager
def _asked_for(bundles: list[Resources], priority: str) -> Iterator[None]:
    """Asks the cluster for bundles of resources for as long as the context lasts.

    Ray Data and Ray Train ask through one actor for all jobs, which adds up what they ask for, tells the autoscaler every 20 s, and shares
    what is there by priority. What is asked for by `ray.autoscaler.sdk.request_resources` alone is overwritten by it.
    """
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

    me, done = f"raysal-{uuid.uuid4().hex}", threading.Event()
    options = {"requester_id": me, "resources": bundles, "expire_after_s": ASKED_S, "priority": ResourceRequestPriority[priority]}

    def ask() -> None:
        with contextlib.suppress(RayError):  # an actor that is being restarted is asked again, or the one that came in its place
            ray.get(get_or_create_autoscaling_coordinator().request_resources.remote(**options), timeout=ASKED_S / 3)

    def renew() -> None:
        while not done.wait(ASKED_S / 3):
            ask()

    ask()
    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield
    finally:
        done.set()
        renewing.join()
        get_or_create_autoscaling_coordinator().cancel_request.remote(me)


@contextlib.contextmanager
def room_beside_elastic_workers(compute: ComputeConfig) -> Iterator[None]:
    """Keeps what this job's process and the decoding beside it need out of what Ray Train thinks it can start elastic workers on.

    It counts the whole of each node, starts as many workers as these hold, and tries the same number again for ever where some CPUs are
    taken. So they are booked first: the job's on this node, where they are, and those of decoding as well if it has room for both.
    """
    if not compute.min_workers:
        yield
        return
    id_ = ray.get_runtime_context().get_node_id()
    [mine] = [node["Resources"] for node in ray.nodes() if node["NodeID"] == id_]
    # Three kinds of resources: Ray's autoscaler places such bundles first, and a worker in their place would leave nodes unasked for.
    here = {name: 0.001 for name in mine if name.startswith("node:") and name != HEAD} | {"memory": 1.0}
    held = _held()["CPU"]
    if mine.get("CPU", 0) >= held + INGEST_CPUS:
        booked = [{"CPU": held + INGEST_CPUS} | here]
    else:
        booked = [{"CPU": held} | here] * (held > 0) + [{"CPU": INGEST_CPUS}]
    with _asked_for(booked, "HIGH"):
        yield


def _of_a_worker(compute: ComputeConfig) -> Resources:
    """What Ray books for a train worker."""
    return {"CPU": compute.cpus_per_worker} | ({"GPU": 1.0} if compute.use_gpu else {})


def of_an_actor(compute: ComputeConfig) -> Resources:
    """What Ray books for an actor that scores or labels; on a cluster the memory of a loaded model too, so that no node gets too many."""
    booked = {"CPU": compute.cpus_per_actor} | ({"GPU": compute.gpus_per_actor} if compute.use_gpu else {})
    return booked | ({"memory": ACTOR_BYTES} if elsewhere(compute) else {})


def elsewhere(compute: ComputeConfig) -> bool:
    """Whether the work is for a cluster: one that is named, or Ray is up on more machines than this one."""
    return bool(compute.address or os.environ.get("RAY_ADDRESS")) or (ray.is_initialized() and len(ray.nodes()) > 1)


def check_training(compute: ComputeConfig) -> None:
    """Refuses a training that the cluster could never schedule, with the numbers, instead of waiting for ever.

    Raises:
        ResourceError: Fewer CPUs or GPUs than the workers and the ingest beside them need.
    """
    if compute.train_workers == 0:
        return
    if lack := _waited(compute, _of_a_worker(compute), compute.min_workers or compute.train_workers, lambda: lacks_for_training(compute)):
        raise ResourceError(lack)


def lacks_for_training(compute: ComputeConfig) -> str:
    """What a training's workers, the least number of them, lack on the nodes that are up; empty where there is room for them."""
    workers = compute.min_workers or compute.train_workers
    nodes = _nodes()
    have, gpus, need = _all(nodes, "CPU"), _all(nodes, "GPU"), workers * compute.cpus_per_worker + INGEST_CPUS
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
    return _lacks_room(nodes, workers, "train workers", _of_a_worker(compute), "compute.cpus_per_worker or compute.train_workers")


def score_actors(compute: ComputeConfig) -> tuple[int, int]:
    """Least and largest number of model actors: as asked, or one a GPU or a core that is there. Between the two nodes come and go.

    Raises:
        ResourceError: The cluster has no room for the least number of actors and one read task.
    """
    nodes = _nodes()
    if compute.use_gpu:
        actors = compute.score_actors or max(1, sum(int(node.get("GPU", 0) / compute.gpus_per_actor) for node in nodes))
    else:
        room = int((_all(nodes, "CPU") - INGEST_CPUS) / compute.cpus_per_actor)
        actors = compute.score_actors or max(1, min(sum(cores().values()), room))
    least = min(compute.min_actors, actors) or actors
    if lack := _waited(compute, of_an_actor(compute), least, lambda: _lacks_for_scoring(compute, least)):
        raise ResourceError(lack)
    return least, actors


def _lacks_for_scoring(compute: ComputeConfig, actors: int) -> str:
    nodes = _nodes()
    have, gpus = _all(nodes, "CPU"), _all(nodes, "GPU")
    if compute.use_gpu and gpus < actors * compute.gpus_per_actor:
        return (
            f"{actors} score actors need {actors * compute.gpus_per_actor:g} GPUs, but the cluster has {gpus:g}; "
            "lower compute.score_actors or set compute.use_gpu=false"
        )
    need = actors * compute.cpus_per_actor + INGEST_CPUS
    if have < need:
        return (
            f"{actors} score actors x {compute.cpus_per_actor:g} CPUs + {INGEST_CPUS:g} for reading = {need:g} CPUs, but the cluster has "
            f"{have:g}{_besides()}; lower compute.score_actors or compute.cpus_per_actor"
        )
    return _lacks_room(nodes, actors, "score actors", of_an_actor(compute), "compute.cpus_per_actor or compute.score_actors")
