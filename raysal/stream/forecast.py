"""What scoring or labeling would take, from a sample of its images."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich import filesize

from raysal.config import Config
from raysal.stream.job import prepare
from raysal.stream.manifest import Manifest, missing_rows
from raysal.stream.output import EMPTY
from raysal.stream.worker import PoolWorker
from raysal.words import duration


@dataclass(frozen=True)
class Forecast:
    """What a run would do, from a sample of its images on this machine's cores.

    Attributes:
        rows, todo: Images of the manifest, and those that the output does not hold.
        sampled: Images that were tried; `counts` says what became of them.
        seconds: For all that is to be done, without the start of processes and the loading of the model.
        load_seconds: For loading the model, once.
        bytes_read, bytes_written: For all that is to be done.
    """

    rows: int
    todo: int
    sampled: int
    counts: dict[str, int]
    seconds: float
    load_seconds: float
    bytes_read: int
    bytes_written: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if not self.todo:
            return f"{self.rows:,} images, nothing to do"
        bad = sum(n for status, n in self.counts.items() if status != "ok")
        return (
            f"{self.todo:,} of {self.rows:,} images to do: about {duration(self.seconds)} on this machine's {os.cpu_count()} cores once "
            f"the model is loaded ({duration(self.load_seconds)}), {filesize.decimal(self.bytes_read)} to read, "
            f"{filesize.decimal(self.bytes_written)} to write; from {self.sampled} images, {bad} of them bad. Nothing was changed"
        )


def forecast(
    worker: type[PoolWorker],
    manifest: Manifest,
    checkpoint_uri: str,
    out_uri: str,
    *,
    schema: pa.Schema,
    cfg: Config,
    class_bonus: Sequence[float] | None = None,
    retry_failed: bool = False,
    replace: bool = False,
    sample: int = 32,
) -> Forecast:
    """Tries some images of what `run_pool` would do, in this process, and changes nothing. Arguments and errors as there."""
    job = prepare(worker, manifest, checkpoint_uri, out_uri, schema, cfg, class_bonus)
    held = job.output.read() if job.output.mine(replace) else EMPTY
    missing, _ = job.missing(held, retry_failed)
    todo = int(missing.sum())
    if not todo:
        return Forecast(len(job.wanted), 0, 0, {}, 0.0, 0.0, 0, 0)
    tried_places = np.zeros(len(missing), bool)
    tried_places[np.flatnonzero(missing)[np.linspace(0, todo - 1, min(sample, todo)).astype(np.int64)]] = True
    table = missing_rows(job.manifest, tried_places)
    threads = torch.get_num_threads()
    try:
        began = time.perf_counter()
        made = worker(dataclasses.replace(job.task, threads=os.cpu_count() or 1))
        load_seconds = time.perf_counter() - began
        tried = made.tried(table)
    finally:
        torch.set_num_threads(threads)
    share = todo / table.num_rows
    return Forecast(
        len(job.wanted),
        todo,
        table.num_rows,
        tried.counts,
        tried.seconds * share,
        load_seconds,
        int(tried.bytes_read * share),
        int(tried.bytes_written * share),
    )
