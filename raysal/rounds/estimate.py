"""What a run would do and how long it would take, from a few measured steps. Nothing is written to the run folder."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from raysal.config import Config
from raysal.datasets.base import Dataset, Item
from raysal.model.runtime import Predictor
from raysal.rounds.choose import random_start
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
    """A plan in numbers. Seconds are of this machine, with the workers and actors that the configuration asks for.

    Attributes:
        labels: Labels after each round, round 0 first.
        audit: Random labels asked for at the end and never learnt from, beyond the budget.
        trainings, steps: One training a round, and its steps.
        final_steps: Of one more training after the last round, 0 where there is none.
        evaluations: On the val split, over all trainings.
        train_s, evaluate_s, score_s, label_s, start_s: The parts of the whole; start_s is what Ray and its workers take to start.
    """

    pool: int
    val: int
    unlabeled: int
    budget: int
    share_of_pool: float
    labels: tuple[int, ...]
    audit: int
    trainings: int
    steps: int
    final_steps: int
    evaluations: int
    scorings: int
    starts: int
    train_step_s: float
    images_per_second: float
    score_images_per_second: float
    warnings: tuple[str, ...]

    @property
    def train_s(self) -> float:
        return self.trainings * self.steps * self.train_step_s

    @property
    def final_s(self) -> float:
        return self.final_steps * self.train_step_s

    @property
    def evaluate_s(self) -> float:
        return self.evaluations * self.val / self.images_per_second

    @property
    def score_s(self) -> float:
        return self.scorings * self.pool / self.score_images_per_second

    @property
    def label_s(self) -> float:
        return self.pool / self.images_per_second

    @property
    def start_s(self) -> float:
        return self.starts * START_S

    @property
    def total_s(self) -> float:
        return self.train_s + self.final_s + self.evaluate_s + self.score_s + self.label_s + self.start_s

    def to_dict(self) -> dict:
        parts = ("train_s", "final_s", "evaluate_s", "score_s", "label_s", "start_s", "total_s")
        return asdict(self) | {name: getattr(self, name) for name in parts}

    def text(self) -> str:
        parts = [(f"{_count(self.trainings, 'training')} x {self.steps} steps x {self.train_step_s:.3g} s", self.train_s)]
        if self.final_steps:
            parts.append((f"last training, {self.final_steps} steps x {self.train_step_s:.3g} s", self.final_s))
        parts += [
            (f"{_count(self.evaluations, 'evaluation')} x {self.val} images at {self.images_per_second:.3g} images/s", self.evaluate_s),
            (f"{_count(self.scorings, 'scoring')} x {self.pool} images at {self.score_images_per_second:.3g} images/s", self.score_s),
            (f"masks for {self.pool} images at {self.images_per_second:.3g} images/s", self.label_s),
            (f"{_count(self.starts, 'start')} of Ray's workers x {START_S:g} s", self.start_s),
        ]
        size, unit = _unit(self.total_s)
        shown = [round(seconds / size, 1) for _, seconds in parts]  # the total is that of the rounded parts: what is printed adds up
        return "\n".join(
            [
                *(f"warning: {w}" for w in self.warnings),
                f"pool {self.pool} images, val {self.val}, unlabelled in the first round {self.unlabeled}",
                f"labels {self.budget} = {100 * self.share_of_pool:.2f}% of the pool",
                "labels after each round: " + ", ".join(f"round {i}: {n}" for i, n in enumerate(self.labels)),
                *([f"{self.audit} more random labels at the end, for the audit alone"] if self.audit else []),
                *(f"{what} = {amount:.1f} {unit}" for (what, _), amount in zip(parts, shown, strict=True)),
                f"about {sum(shown):.1f} {unit} in all; nothing was changed",
            ]
        )


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
    loop, train = cfg.loop, cfg.train
    trainings = loop.rounds + 1
    final = loop.final_steps if loop.final_steps and loop.final_steps != train.steps else 0
    # Counts whole passes; most encoders run once for all of BALD, so its real time is shorter.
    passes = 1 + (cfg.score.bald_passes if "bald" in (*cfg.score.scores, cfg.query.strategy) else 0)
    extra = len(dataset.split(cfg.data.unlabeled_split)) if cfg.data.unlabeled_split else 0
    return Estimate(
        pool=n_pool,
        val=n_val,
        unlabeled=n_pool - loop.initial + extra,
        budget=cfg.budget,
        share_of_pool=cfg.budget / n_pool,
        labels=tuple(loop.initial + r * loop.per_round for r in range(trainings)),
        audit=loop.audit,
        trainings=trainings,
        steps=train.steps,
        final_steps=final,
        evaluations=trainings * _evaluations(cfg, train.steps) + (_evaluations(cfg, final) if final else 0),
        scorings=loop.rounds,
        starts=trainings + (final > 0) + loop.rounds + 1,
        train_step_s=step_s / share,
        images_per_second=images_per_s,
        score_images_per_second=images_per_s / passes,
        warnings=tuple(warnings),
    )


def _evaluations(cfg: Config, steps: int) -> int:
    """Evaluations of a training: every so many steps, and at its end."""
    return math.ceil(steps / cfg.train.eval_every) if cfg.train.eval_every else 1


def _measure(cfg: Config, dataset: Dataset, pool: tuple[Item, ...]) -> tuple[float, float]:
    """Seconds of a training step on one worker's whole global batch, and images per second of a forward pass.

    Raises:
        DataError: None, or too few, of the pool's images can be read.
    """
    n = WARM_STEPS + TIMED_STEPS
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"steps": max(cfg.train.steps, n)})})
    # First labels as a run draws them, which passes over what can't be read; no more than these few steps look at.
    first = random_start(dataset, pool, min(cfg.loop.initial, n * cfg.train.batch_labeled), cfg.seed)
    ids = {row["id"] for row in first}
    labeled, rest = tuple(i for i in pool if i.id in ids), tuple(i for i in pool if i.id not in ids)
    counts = count_classes(dataset, labeled[:8])
    plan = Plan(cfg, dataset, labeled, rest, (), tuple(counts.sum(0).tolist()), tuple((counts > 0).sum(0).tolist()))
    session = _Bare(plan)
    learner = Learner(plan, session)
    learner.bind()
    feed = iter(loader(Draws(dataset, plan.labeled, cfg, "labeled"), 0, n, cfg.train.batch_labeled, 0, 1, 0))
    unlabeled = session.unlabeled(0) if plan.semi_supervised else None
    start = 0.0
    for step in range(n):
        if step == WARM_STEPS:
            start = time.perf_counter()
        learner.step(step, next(feed), next(unlabeled) if unlabeled is not None else None)
    step_s = (time.perf_counter() - start) / TIMED_STEPS
    predictor = Predictor(learner.model, model_info(plan), session.device)
    images = [dataset.image(item) for item in labeled[:16]]
    images = [i for i in images if i.shape == images[0].shape]
    images = [images[i % len(images)] for i in range(cfg.score.batch_size)]
    predictor.predict(images)
    start = time.perf_counter()
    predictor.predict(images)
    return step_s, len(images) / (time.perf_counter() - start)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _unit(seconds: float) -> tuple[float, str]:
    """Seconds of the unit in which so long a time is told, and its name."""
    if seconds < 300:
        return 1, "s"
    return (60, "min") if seconds < 3 * 3600 else (3600, "h")


class _Bare:
    """The loop's session without Ray: one process, nothing kept."""

    rank, world = 0, 1

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.device = torch.device("cuda" if plan.cfg.compute.use_gpu and torch.cuda.is_available() else "cpu")

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def resume(self) -> AbstractContextManager[None]:
        return nullcontext()

    def unlabeled(self, start_step: int) -> Iterator[UnlabeledBatch]:
        draws = Draws(self.plan.dataset, self.plan.unlabeled, self.plan.cfg, "unlabeled")
        for image, _, valid in loader(draws, start_step, self.plan.cfg.train.steps, self.plan.unlabeled_batch, 0, 1, 0):
            yield image, valid

    def report(self, metrics: dict, folder: Path | None) -> None:
        raise NotImplementedError("an estimate saves nothing")

    def log(self, record: dict, first_step: int | None = None) -> None:
        return None
