"""What a run would do and how long it would take, from a few measured steps. Nothing is written to the run folder."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from raysal.config import Config
from raysal.datasets.base import Dataset, Item
from raysal.errors import ImageError
from raysal.model.runtime import Predictor
from raysal.rounds.loop import open_data
from raysal.rounds.single import count_classes
from raysal.train.feeds import Draws, UnlabeledBatch, loader
from raysal.train.loop import Learner, model_info
from raysal.train.plan import Plan

WARM_STEPS, TIMED_STEPS = 1, 3
START_S = 15.0
"""Seconds that Ray and its workers take to start, a training or a scoring; measured on two cores."""


@dataclass(frozen=True)
class Estimate:
    """A plan in numbers. Seconds are of this machine, with the workers and actors that the configuration asks for."""

    pool: int
    val: int
    unlabeled: int
    budget: int
    share_of_pool: float
    trainings: int
    steps: int
    train_step_s: float
    score_images_per_second: float
    train_s: float
    score_s: float
    label_s: float
    warnings: tuple[str, ...]

    @property
    def total_s(self) -> float:
        return self.train_s + self.score_s + self.label_s

    def to_dict(self) -> dict:
        return asdict(self) | {"total_s": self.total_s}

    def text(self) -> str:
        lines = [
            *(f"warning: {w}" for w in self.warnings),
            f"pool {self.pool} images, val {self.val}, unlabelled in the first round {self.unlabeled}",
            f"labels {self.budget} = {100 * self.share_of_pool:.2f}% of the pool",
            f"{self.trainings} trainings x {self.steps} steps x {self.train_step_s:.2f} s = {_time(self.train_s)}",
            f"{self.trainings - 1} scorings of the pool at {self.score_images_per_second:.1f} images/s = {_time(self.score_s)}",
            f"masks for the pool = {_time(self.label_s)}",
            f"about {_time(self.total_s)} in all; nothing was changed",
        ]
        return "\n".join(lines)


def estimate(cfg: Config) -> Estimate:
    """Measures a few steps and forward passes on the real data (or a few synthetic scenes) in this process."""
    warnings: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        small = cfg
        if cfg.data.reader == "synthetic":
            few = cfg.data.synthetic.model_copy(update={"images": min(cfg.data.synthetic.images, max(cfg.budget, 24)), "val_images": 8})
            small = cfg.model_copy(update={"run": scratch, "data": cfg.data.model_copy(update={"synthetic": few})})
        dataset, pool, val = open_data(small, warnings.append)
        step_s, images_per_s = _measure(small, dataset, pool)
    n_pool = cfg.data.synthetic.images if cfg.data.reader == "synthetic" else len(pool)
    n_val = cfg.data.synthetic.val_images if cfg.data.reader == "synthetic" else len(val)
    workers = max(1, cfg.compute.train_workers)
    share = min(workers, os.cpu_count() or 1) if not cfg.compute.use_gpu else workers
    trainings = cfg.loop.rounds + 1
    evaluations = 1 + (math.ceil(cfg.train.steps / cfg.train.eval_every) - 1 if cfg.train.eval_every else 0)
    final = (cfg.loop.final_steps or cfg.train.steps) - cfg.train.steps
    train_s = (trainings * cfg.train.steps + max(0, final)) * step_s / share + trainings * (evaluations * n_val / images_per_s + START_S)
    # Counts whole passes; most encoders run once for all of BALD, so its real time is shorter.
    passes = 1 + (cfg.score.bald_passes if "bald" in (*cfg.score.scores, cfg.query.strategy) else 0)
    extra = len(dataset.split(cfg.data.unlabeled_split)) if cfg.data.unlabeled_split else 0
    return Estimate(
        pool=n_pool,
        val=n_val,
        unlabeled=n_pool - cfg.loop.initial + extra,
        budget=cfg.budget,
        share_of_pool=cfg.budget / n_pool,
        trainings=trainings,
        steps=cfg.train.steps,
        train_step_s=step_s / share,
        score_images_per_second=images_per_s / passes,
        train_s=train_s,
        score_s=cfg.loop.rounds * (n_pool / (images_per_s / passes) + START_S),
        label_s=n_pool / images_per_s + START_S,
        warnings=tuple(warnings),
    )


def _measure(cfg: Config, dataset: Dataset, pool: tuple[Item, ...]) -> tuple[float, float]:
    """Seconds of a training step on one worker's whole global batch, and images per second of a forward pass."""
    labeled, rest = pool[: cfg.loop.initial], pool[cfg.loop.initial :]
    counts = count_classes(dataset, labeled[:8])
    plan = Plan(cfg, dataset, labeled, rest, (), tuple(counts.sum(0).tolist()), tuple((counts > 0).sum(0).tolist()))
    session = _Bare(plan)
    learner = Learner(plan, session)
    learner.bind()
    n = WARM_STEPS + TIMED_STEPS
    feed = iter(loader(Draws(dataset, plan.labeled, cfg, "labeled"), 0, n, cfg.train.batch_labeled, 0, 1, 0))
    unlabeled = session.unlabeled(0) if plan.semi_supervised else None
    start = 0.0
    for step in range(n):
        if step == WARM_STEPS:
            start = time.perf_counter()
        learner.step(step, next(feed), next(unlabeled) if unlabeled is not None else None)
    step_s = (time.perf_counter() - start) / TIMED_STEPS
    predictor = Predictor(learner.model, model_info(plan), session.device)
    images = []
    for item in pool[:16]:
        try:
            images.append(dataset.image(item))
        except ImageError:
            continue
    images = [i for i in images if i.shape == images[0].shape][: cfg.score.batch_size]
    predictor.predict(images)
    start = time.perf_counter()
    predictor.predict(images)
    return step_s, len(images) / (time.perf_counter() - start)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Bare:
    """The loop's session without Ray: one process, nothing kept."""

    rank, world = 0, 1

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.device = torch.device("cuda" if plan.cfg.compute.use_gpu and torch.cuda.is_available() else "cpu")

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def resume(self) -> Path | None:
        return None

    def unlabeled(self, start_step: int) -> Iterator[UnlabeledBatch]:
        draws = Draws(self.plan.dataset, self.plan.unlabeled, self.plan.cfg, "unlabeled")
        for image, _, valid in loader(draws, start_step, self.plan.cfg.train.steps, self.plan.unlabeled_batch, 0, 1, 0):
            yield image, valid

    def report(self, metrics: dict, folder: Path | None) -> None:
        raise NotImplementedError("an estimate saves nothing")

    def log(self, record: dict, first_step: int | None = None) -> None:
        return None
