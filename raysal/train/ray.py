"""The thin adapter that runs the loop under Ray Train, with unlabelled images from a Ray Data shard."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import nn

from raysal import cluster, errors
from raysal.archive.uris import absolute, exists, join, open_fs, read_bytes, remove_tree, write_bytes
from raysal.config import Config
from raysal.errors import RaysalError
from raysal.model.encoder_weights import is_file
from raysal.telemetry.meters import Meters, metered
from raysal.train import saved
from raysal.train.decode import FEED, Stream, decode
from raysal.train.feeds import Draws, UnlabeledBatch, check_share, most
from raysal.train.gloo import Torch
from raysal.train.logs import Log, read_log
from raysal.train.plan import CHECKPOINT_FILES, Plan

LOG = logging.getLogger(__name__)

OnProgress = Callable[[int, int, dict], None]

SEGMENT_BLOCKS = 4096
"""Blocks that one execution of the unlabelled stream holds; a longer schedule opens the stream again."""

IMAGES_PER_BLOCK = 64
"""Unlabelled images that one decode task makes at most: enough to hide a task's overhead, few enough to start at once."""

BLOCK_BYTES = 64 * 2**20
"""Large crops make blocks of fewer images, so that what is decoded ahead stays small."""


STILL_S = 120.0
"""After so long without a step it is looked whether a training lacks nodes. Evaluations may take longer, and then nothing is said."""


@dataclass(frozen=True)
class Trained:
    """What a training left.

    Attributes:
        checkpoint: URI of the chosen checkpoint folder, as loop.checkpoint says.
        metrics: Its evaluation (`Evaluation.to_dict`), or None where there was no val split.
        last, best: URIs of the last checkpoint and of the one with the best val mIoU.
    """

    checkpoint: str
    metrics: dict | None
    last: str
    best: str


def fit(plan: Plan, folder: str, on_progress: OnProgress | None = None) -> Trained:
    """Trains a plan to its end; the same call with the same folder goes on where it was stopped.

    Args:
        plan: What to train.
        folder: URI that holds checkpoints, metrics.jsonl and TensorBoard files; shared by all nodes.
        on_progress: Called now and then with (steps done, steps, last record of metrics).

    Raises:
        ResourceError: The cluster can't carry the workers.
        RaysalError: Training failed more often than compute.max_failures.
    """
    check_workers(plan.cfg)
    _drop_broken(folder)
    if (weights := plan.cfg.model.encoder_weights) is not None and is_file(weights):
        plan = dataclasses.replace(plan, weights=absolute(weights))
    with (
        cluster.data_context(ordered=True),
        cluster.room_beside_elastic_workers(plan.cfg.compute),
        metered(folder) as meters,
        _watch(plan.cfg, folder, meters, on_progress),
    ):
        try:
            _trainer(plan, folder).fit()
        except ray.train.TrainingFailedError as error:
            cause = _root_cause(error)
            if said := re.fullmatch(r"raysal\.errors\.(\w+): (.*)", cause):
                raise getattr(errors, said[1], RaysalError)(said[2]) from error
            raise RaysalError(
                f"training in {folder} failed: {cause}; mend the cause and run the same command: it resumes from the last checkpoint"
            ) from error
    fit_folder = join(folder, "fit")
    last, best = join(fit_folder, saved.name(plan.cfg.train.steps)), join(fit_folder, saved.best(fit_folder))
    chosen = best if plan.cfg.loop.checkpoint == "best" else last
    return Trained(chosen, saved.metrics(chosen), last, best)


def check_workers(cfg: Config) -> None:
    """Refuses workers that the cluster can't carry, or that the batches are too small for. Raises ResourceError or DataError."""
    cluster.check_training(cfg.compute)
    for name in ("batch_labeled", "batch_unlabeled"):
        check_share(getattr(cfg.train, name), max(1, cfg.compute.train_workers), f"train.{name}")


def _trainer(plan: Plan, folder: str) -> ray.train.torch.TorchTrainer:
    compute = plan.cfg.compute
    workers: dict[str, Any] = {"num_workers": compute.train_workers}  # a dict: type checkers see the options of Ray's older trainer
    if compute.min_workers:
        workers = {"num_workers": (compute.min_workers, compute.train_workers), "elastic_resize_monitor_interval_s": compute.resize_every_s}
    return ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"plan": ray.put(plan), "folder": folder},
        torch_config=Torch(),
        scaling_config=ray.train.ScalingConfig(
            use_gpu=compute.use_gpu,
            resources_per_worker={"CPU": compute.cpus_per_worker} | ({"GPU": 1} if compute.use_gpu else {}),
            **workers,
        ),
        run_config=ray.train.RunConfig(
            name="fit",
            storage_path=_path(folder),
            storage_filesystem=_filesystem(folder),
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=plan.cfg.train.keep_checkpoints, checkpoint_score_attribute="miou", checkpoint_score_order="max"
            ),
        ),
        datasets={"unlabeled": _unlabeled_dataset(plan, folder)} if plan.semi_supervised else {},
        dataset_config=ray.train.DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=True)),
    )


def fetch_checkpoint(source: str, target: str) -> None:
    """Copies the model's files (not the training state) of a checkpoint folder; the description last."""
    for name in CHECKPOINT_FILES:
        write_bytes(join(target, name), read_bytes(join(source, name)))


def _worker(config: dict) -> None:
    """Runs on every train worker. The loop is imported here alone: Ray's controller and its data processes start faster without it."""
    from raysal.train.loop import train

    plan: Plan = ray.get(config["plan"])
    session = (LocalSession if plan.cfg.compute.train_workers == 0 else RaySession)(plan, config["folder"])
    torch.set_num_threads(_threads(plan.cfg, session))
    try:
        train(plan, session)
    finally:
        session.close()


def _threads(cfg: Config, session: RaySession) -> int:
    context = ray.train.get_context()
    return cfg.compute.threads or max(1, cluster.cores()[ray.get_runtime_context().get_node_id()] // max(1, context.get_local_world_size()))


class RaySession:
    """The loop's `Session` on Ray Train."""

    def __init__(self, plan: Plan, folder: str) -> None:
        context = ray.train.get_context()
        self.plan, self.folder, self._log = plan, folder, Log(folder)
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device() if plan.cfg.compute.use_gpu else torch.device("cpu")

    def wrap(self, model: nn.Module) -> nn.Module:
        # The pseudo-label pass and the student's pass both move batch-norm buffers: broadcasting them would trip autograd.
        return ray.train.torch.prepare_model(model, move_to_device=False, parallel_strategy_kwargs={"broadcast_buffers": False})

    @contextmanager
    def resume(self) -> Iterator[Path | None]:
        """What Ray says; where it knows of none (its bookkeeping was lost, or local mode wrote them), what the folder holds."""
        checkpoint = ray.train.get_checkpoint()
        with checkpoint.as_directory() if checkpoint else saved.newest(join(self.folder, "fit")) as folder:
            yield None if folder is None else Path(folder)

    def unlabeled(self, start_step: int) -> Iterator[UnlabeledBatch]:
        steps, first = self.plan.cfg.train.steps, start_step
        room = most(self.plan.cfg.train.batch_unlabeled, self.world) * self.plan.mixed
        shard = ray.train.get_dataset_shard("unlabeled")
        while first < steps:
            if self.rank == 0:
                write_bytes(join(self.folder, FEED), json.dumps({"first_step": first, "world": self.world}).encode())
            for batch in shard.iter_batches(batch_size=room, batch_format="numpy", prefetch_batches=2, drop_last=True):
                there = batch["draw"] >= 0
                yield torch.tensor(batch["image"][there]), torch.tensor(batch["valid"][there])
            first += _blocks(self.plan) // self.world * _steps_per_block(self.plan, self.world)

    def report(self, metrics: dict, folder: Path | None) -> None:
        background = self.plan.cfg.compute.asynchronous_upload and metrics["step"] != self.plan.cfg.train.steps
        mode = ray.train.CheckpointUploadMode.ASYNC if background else ray.train.CheckpointUploadMode.SYNC
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if folder else None,
            checkpoint_dir_name=saved.name(metrics["step"]),
            checkpoint_upload_mode=mode,
            delete_local_checkpoint_after_upload=True,
        )

    def log(self, record: dict, first_step: int | None = None) -> None:
        if self.rank != 0:
            return
        if first_step is not None:
            self._log.start(first_step)
        self._log.add(record)

    def close(self) -> None:
        self._log.close()


class LocalSession(RaySession):
    """In this process, without train workers. Ray's local mode keeps no checkpoints, so they are kept here: the last and the best."""

    def report(self, metrics: dict, folder: Path | None) -> None:
        assert folder is not None
        fit_folder, name = join(self.folder, "fit"), saved.name(metrics["step"])
        for file in saved.FILES:  # state.json last: with it the checkpoint is whole
            write_bytes(join(fit_folder, name, file), (folder / file).read_bytes())
        shutil.rmtree(folder)
        kept = {name, saved.best(fit_folder)}
        for old in saved.names(fit_folder):
            if old not in kept:
                remove_tree(join(fit_folder, old))


def _steps_per_block(plan: Plan, world: int) -> int:
    images = min(IMAGES_PER_BLOCK, BLOCK_BYTES // (4 * plan.cfg.augment.crop_px**2))  # three channels, and which pixels are valid
    return max(1, images // (most(plan.cfg.train.batch_unlabeled, world) * plan.mixed))


def _blocks(plan: Plan) -> int:
    """Blocks of one execution of the stream: enough for the whole schedule on any number of workers that may come, or the most allowed."""
    most_workers = max(1, plan.cfg.compute.train_workers)
    worlds = range(plan.cfg.compute.min_workers or most_workers, most_workers + 1)
    whole = max(-(-plan.cfg.train.steps // _steps_per_block(plan, world)) * world for world in worlds)
    return max(most_workers, min(whole, SEGMENT_BLOCKS))


def _unlabeled_dataset(plan: Plan, folder: str) -> ray.data.Dataset:
    """The stream of unlabelled draws, one block = some steps of one worker.

    It is opened anew for each segment of the schedule; ``feed.json`` says at which step and for how many workers, so that a replaced
    worker, another number of them or a restarted driver decodes nothing twice. Ray deals blocks of one size to the workers in turn
    (`block_draws` counts on it). Pixels cross the object store here, once: from the task that decodes them to the worker that learns
    from them.
    """
    blocks = _blocks(plan)
    stream = Stream(
        draws=ray.put(Draws(plan.dataset, plan.unlabeled, plan.cfg, "unlabeled")),
        feed=join(folder, FEED),
        blocks=blocks,
        batch=plan.unlabeled_batch,
        unit=plan.mixed,
        end_step=plan.cfg.train.steps,
        side=plan.cfg.augment.crop_px,
        steps_per_block={world: _steps_per_block(plan, world) for world in range(1, max(1, plan.cfg.compute.train_workers) + 1)},
    )
    tasks = plan.cfg.compute.ingest_tasks or max(1, int(ray.cluster_resources().get("CPU", 1)) // 4)
    return ray.data.range(blocks, override_num_blocks=blocks).map_batches(
        partial(decode, stream=stream),
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.TaskPoolStrategy(size=min(tasks, blocks)),
        num_cpus=cluster.INGEST_CPUS,
    )


def _path(uri: str) -> str:
    return open_fs(uri)[1]


def _filesystem(uri: str) -> pyarrow.fs.FileSystem | None:
    """pyarrow's view of an fsspec file system; None for local disks, which Ray knows."""
    fs, _ = open_fs(uri)
    return None if isinstance(fs, LocalFileSystem) else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))


def _drop_broken(folder: str) -> None:
    """Forgets Ray's bookkeeping where a kill left it half-written (it is written in place, and not read back then) or where a checkpoint
    that it lists is gone. The checkpoints themselves stay: `RaySession.resume` finds the newest whole one."""
    fit_folder = join(folder, "fit")
    snapshot = join(fit_folder, "checkpoint_manager_snapshot.json")
    if not exists(snapshot):
        return
    try:
        kept = json.loads(read_bytes(snapshot))["checkpoint_results"]
        whole = all(exists(join(fit_folder, c["checkpoint_dir_name"], "state.json")) for c in kept)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        remove_tree(snapshot)


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    causes = [str(e).strip().splitlines()[-1] for e in failures.values() if str(e).strip()]
    return "; ".join(dict.fromkeys(causes)) or str(error).strip().splitlines()[-1]


class _watch:
    """Tells of the training, which runs elsewhere, what its metrics.jsonl says."""

    def __init__(self, cfg: Config, folder: str, meters: Meters, on_progress: OnProgress | None) -> None:
        self.cfg, self.folder, self.meters, self.on_progress, self._done = cfg, folder, meters, on_progress, threading.Event()

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _poll(self) -> None:
        seen, ended, since = -1, False, time.monotonic()
        while not ended:
            ended = self._done.wait(1.0)
            newest = {kind: record for record in read_log(self.folder) for kind in ("loss", "eval") if kind in record}
            for record in newest.values():
                self.meters.train(record, self.cfg.train.steps)
            if "loss" in newest and newest["loss"]["step"] != seen:
                seen, since = newest["loss"]["step"], time.monotonic()
                if self.on_progress is not None:
                    self.on_progress(seen, self.cfg.train.steps, newest["loss"])
            elif time.monotonic() - since > STILL_S:
                since = time.monotonic()
                lack = ""
                with suppress(Exception):  # a cluster whose head is away tells nothing
                    lack = cluster.lacks_for_training(self.cfg.compute)
                if lack:
                    LOG.warning("training waits for nodes, and goes on by itself from its last checkpoint once they are there: %s", lack)
