"""What scoring, labelling and training count, for Prometheus; docs/metrics.md says what each number means.

All is told by a job's own process: it hears of every shard once and reads the training's log. So workers do nothing for it, and nothing
is counted twice when one of them dies.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

import ray
from ray.util.metrics import Counter, Gauge

from raysal.telemetry.lines import submission_id

BEAT_S = 5.0
"""Ray hands a gauge on once and forgets it 20 s later, so what stays as it is is told again."""

OF_ALL = ("run", "submission_id")
"""Tags of every metric: the folder that is written to, and the id of the job, empty where it was not submitted."""

COUNTERS = {
    "raysal_rows_total": ("Images that were scored or labelled, by what became of them.", ("status",)),
}
GAUGES = {
    "raysal_rows_left": ("Images that have no row yet.", ()),
    "raysal_job_model_info": ("1 for the model that scores or labels.", ("digest", "runtime")),
    "raysal_train_step": ("Steps that a training has done.", ()),
    "raysal_train_steps": ("Steps that it will have done.", ()),
    "raysal_train_loss": ("Losses: loss (the sum), sup1 and sup2 (the branches on labels), cps.", ("term",)),
    "raysal_train_images_per_second": ("Images that all workers together learn from.", ()),
    "raysal_train_step_seconds": ("Seconds of a step.", ()),
    "raysal_train_data_wait_ratio": ("Exposed data time: the share of a step in which the first worker waits for images.", ()),
    "raysal_val_miou": ("mIoU on val, at the last evaluation.", ()),
    "raysal_val_iou": ("IoU on val, by class.", ("class",)),
}
"""What each says, and its tags beside those of all."""

LOSSES = ("loss", "sup1", "sup2", "cps")


class Meters:
    """Counts nothing; of use where Ray is not up."""

    def rows(self, counts: Mapping[str, int], left: int) -> None:
        """Images got their rows, so many of each status; so many are left."""

    def model(self, digest: str, runtime: str) -> None:
        """What computes the rows."""

    def train(self, record: dict, steps: int) -> None:
        """A record of a training's metrics.jsonl, of a step or an evaluation."""

    def beat(self) -> None:
        """Now and then: tells again what stays as it is."""


class RayMeters(Meters):
    """Counts by Ray's metrics, which carry the node.

    Args:
        run: Folder that the work writes to.
    """

    def __init__(self, run: str) -> None:
        about = {"run": run, "submission_id": submission_id()}
        self._counters = {n: Counter(n, text, (*OF_ALL, *tags)).set_default_tags(about) for n, (text, tags) in COUNTERS.items()}
        self._gauges = {n: Gauge(n, text, (*OF_ALL, *tags)).set_default_tags(about) for n, (text, tags) in GAUGES.items()}
        self._shown: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def rows(self, counts: Mapping[str, int], left: int) -> None:
        for status, n in counts.items():
            if n:
                self._counters["raysal_rows_total"].inc(n, {"status": status})
        self._set("raysal_rows_left", left)

    def model(self, digest: str, runtime: str) -> None:
        self._set("raysal_job_model_info", 1, digest=digest[:12], runtime=runtime)

    def train(self, record: dict, steps: int) -> None:
        self._set("raysal_train_steps", steps)
        if "loss" in record:
            self._set("raysal_train_step", record["step"])
            for term in LOSSES:
                self._set("raysal_train_loss", record[term], term=term)
            self._set("raysal_train_images_per_second", record["images_per_second"])
            self._set("raysal_train_step_seconds", record["step_s"])
            self._set("raysal_train_data_wait_ratio", record["data_wait_s"] / max(record["step_s"], 1e-9))
        if "eval" in record:
            self._set("raysal_val_miou", record["eval"]["miou"])
            for name, value in record["eval"]["iou"].items():
                if value is not None:  # a class that occurs nowhere
                    self._set("raysal_val_iou", value, **{"class": name})

    def _set(self, name: str, value: float, **tags: str) -> None:
        self._shown[name, tuple(tags.items())] = value
        self._gauges[name].set(value, tags)

    def beat(self) -> None:
        for (name, tags), value in self._shown.copy().items():
            self._gauges[name].set(value, dict(tags))


@contextlib.contextmanager
def metered(run: str) -> Iterator[Meters]:
    """Meters of the work that writes to a folder; they count where Ray is up."""
    if not ray.is_initialized():
        yield Meters()
        return
    meters, ended = RayMeters(run), threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            meters.beat()

    beating = threading.Thread(target=beat, name="meters", daemon=True)
    beating.start()
    try:
        yield meters
    finally:
        ended.set()
        beating.join()
