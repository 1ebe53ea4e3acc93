"""What a run is about, before anything is changed: the images of a manifest, the output that they go to, and what is missing there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raysal.archive.uris import absolute, join, read_record
from raysal.config import Config, digest_of
from raysal.model.checkpoint import digest_at, read_info
from raysal.model.engines import as_before
from raysal.stream import manifest as manifests
from raysal.stream.manifest import Manifest
from raysal.stream.output import RUN, Held, Output
from raysal.stream.worker import STATUSES, PoolWorker, Task

LIMITS = {"max_bytes", "max_pixels", "max_bands", "max_seconds"}
"""Of the data section: what no image may be beyond."""


@dataclass(frozen=True)
class Job:
    """What a run is about, before anything is changed.

    Attributes:
        manifest: A table of the columns that are needed, or the URI of a long one.
        wanted: uint64 [n], the key of each of its rows.
        output: Where rows go.
        task: What an actor does, without the run's token and on one thread.
    """

    manifest: Manifest
    wanted: np.ndarray
    output: Output
    task: Task

    def missing(self, held: Held, retry_failed: bool | str = False) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of the manifest are to be done (bool [n]), and the sorted keys of those in the output that stay.

        Args:
            held: What the output holds.
            retry_failed: Whether images that failed are done again; or the one status whose images are.
        """
        again = held.status == STATUSES.index(retry_failed) if isinstance(retry_failed, str) else ~held.good & retry_failed
        there = np.sort(held.key[~again])
        return ~among(self.wanted, there), there


def prepare(
    worker: type[PoolWorker],
    manifest: Manifest,
    checkpoint_uri: str,
    out_uri: str,
    schema: pa.Schema,
    cfg: Config,
    class_bonus: Sequence[float] | None,
) -> Job:
    """Finds out what a run is about. Arguments and errors as in `raysal.stream.pool.run_pool`."""
    manifest, wanted = manifests.read(manifest)
    checkpoint_uri, out_uri = absolute(checkpoint_uri), absolute(out_uri)
    digest, bonus = digest_at(checkpoint_uri), None if class_bonus is None else tuple(class_bonus)
    decides = digest_of([_deciding(cfg).digest(), schema.names, bonus])
    device = "cuda" if cfg.compute.use_gpu else "cpu"
    identity = {"kind": worker.__name__, "model_digest": digest, "config_digest": decides}
    there = read_record(join(out_uri, RUN))
    before = str(there.get("runtime")) if identity.items() <= there.items() else ""
    runtime = as_before(cfg.runtime, read_info(checkpoint_uri).model, device, before)
    # The runtime too: another one rounds otherwise, and one folder holds one model's masks to the byte.
    identity |= {"runtime": str(runtime)}
    task = Task(cfg, checkpoint_uri, digest, out_uri, schema, device, 1, "", bonus, runtime)
    return Job(manifest, wanted, Output(out_uri, schema, identity), task)


def _deciding(cfg: Config) -> Config:
    """A configuration without what only decides which images fail, or how many run together: to raise a limit and do the failed ones
    again must go into the same output."""
    usual = Config()
    data = cfg.data.model_copy(update=usual.data.model_dump(include=LIMITS))
    score = cfg.score.model_copy(update={"batch_size": usual.score.batch_size})
    return cfg.model_copy(update={"data": data, "score": score})


def among(keys: np.ndarray, of: np.ndarray) -> np.ndarray:
    """bool [n]: which of n keys are in a sorted array."""
    if not len(of):
        return np.zeros(len(keys), bool)
    found: np.ndarray = of[np.minimum(np.searchsorted(of, keys), len(of) - 1)] == keys
    return found
