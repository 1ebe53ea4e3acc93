"""The training loop's session on plain torch: alone or under torchrun, no Ray Train and no Ray Data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from raysal.archive.uris import join, write_bytes
from raysal.train.feeds import Draws, UnlabeledBatch, loader
from raysal.train.logs import Log
from raysal.train.plan import CHECKPOINT_FILES, Plan


class PlainSession:
    """See `raysal.train.loop.Session`.

    Args:
        plan: What is trained.
        folder: URI for metrics.jsonl.
        processes: That decode unlabelled images; 0: in this process.
        keep: URI for the model's files, None to keep none.
    """

    def __init__(self, plan: Plan, folder: str, processes: int = 1, keep: str | None = None) -> None:
        self.plan, self.processes, self.keep, self._log = plan, processes, keep, Log(folder)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if self.world > 1:
            dist.init_process_group("gloo")

    def wrap(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if self.world > 1 else model

    def resume(self) -> AbstractContextManager[None]:
        return nullcontext()

    def unlabeled(self, start_step: int) -> Iterator[UnlabeledBatch]:
        plan = self.plan
        draws = Draws(plan.dataset, plan.unlabeled, plan.cfg, "unlabeled")
        steps, batch = plan.cfg.train.steps, plan.unlabeled_batch
        for image, _, valid in loader(draws, start_step, steps, batch, self.rank, self.world, self.processes):
            yield image, valid

    def report(self, metrics: dict, folder: Path | None) -> None:
        if folder is not None:
            for name in CHECKPOINT_FILES if self.keep else ():
                write_bytes(join(str(self.keep), name), (folder / name).read_bytes())
            shutil.rmtree(folder)
        if self.world > 1:
            dist.barrier()

    def log(self, record: dict, first_step: int | None = None) -> None:
        if self.rank == 0:
            if first_step is not None:
                self._log.start(first_step)
            self._log.add(record)

    def close(self) -> None:
        self._log.close()
