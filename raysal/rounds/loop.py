"""The active-learning loop: cold start, then rounds of train, score, query, buy; then masks for the pool.

    L_0   = cold start(initial)
    M_r   = train(L_r, rest of the pool)
    s     = score(rest of the pool, M_r)
    L_r+1 = L_r + labels of query(s, per_round)

until the rounds are done, the target is met or a stopping rule speaks. Everything is in the ledger, so the same call goes on after a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raysal.archive.tables import manifest_of, queue_schema, read_table, write_table
from raysal.archive.uris import join, remove_tree
from raysal.config import Config, ScoreConfig
from raysal.datasets.base import Dataset, Item
from raysal.datasets.build import build, check
from raysal.errors import DataError
from raysal.model import checkpoint
from raysal.model.network import TwoBranch
from raysal.query.scores import needed_columns, rarity_bonus
from raysal.query.select import offered
from raysal.rounds.audit import audit
from raysal.rounds.choose import available, choose, random_start, typical_start
from raysal.rounds.ledger import Ledger, OnStage, read_json, write_json
from raysal.rounds.oracle import buy
from raysal.rounds.preflight import preflight, preflight_nodes, preflight_rounds
from raysal.stream.label import TRUST, label_pool
from raysal.stream.pool import finished_by
from raysal.stream.score import score_pool
from raysal.train.loop import model_info
from raysal.train.plan import Plan
from raysal.train.ray import fetch_checkpoint, fit


@dataclass
class Watcher:
    """Callbacks of whoever shows progress.

    Attributes:
        on_stage: (round, stage, "start" | "done" | "kept", seconds).
        on_progress: (done, total, numbers) inside the running stage.
        on_round: The metrics of a finished round.
        on_warning: A sentence.
    """

    on_stage: OnStage = lambda *_: None
    on_progress: Callable[[int, int, dict], None] = lambda *_: None
    on_round: Callable[[dict], None] = lambda _: None
    on_warning: Callable[[str], None] = lambda _: None


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        run: URI of the run folder.
        rounds: metrics.json of each round.
        stopped: Why it ended: "rounds", "target", "no gain", "uncertainty", or "pool" where no image is left to ask for.
        checkpoint: URI of the final checkpoint.
        labels: URI of the masks of the pool.
        audit: mIoU of those masks as {value, low, high}, estimated from so many {images}; None without an audit.
    """

    run: str
    rounds: list[dict] = field(default_factory=list)
    stopped: str = "rounds"
    checkpoint: str = ""
    labels: str = ""
    audit: dict | None = None


def run_loop(cfg: Config, watcher: Watcher | None = None) -> Outcome:
    """Runs or resumes the loop of a configuration. Ray must be up (`raysal.cluster.connected`).

    Raises:
        InputError: Configuration, data or machine can't carry the run; found before any training.
    """
    watcher = watcher or Watcher()
    ledger = Ledger(cfg.run, watcher.on_stage)
    with ledger.lock():
        return _Loop(cfg, ledger, watcher).run()


def open_data(cfg: Config, on_warning: Callable[[str], None]) -> tuple[Dataset, tuple[Item, ...], tuple[Item, ...]]:
    """The data set, its pool and its val split, checked.

    Raises:
        DataError: A split is empty, a mask is missing or wrong, or the budget is larger than the pool.
    """
    if cfg.data.reader == "synthetic":  # before any scene is drawn
        _check_budget(cfg, cfg.data.synthetic.images)
    dataset = build(cfg.data, cfg.run)
    pool, val = dataset.split(cfg.data.pool_split), dataset.split(cfg.data.val_split)
    _check_budget(cfg, len(pool))
    for warning in check(dataset, (cfg.data.pool_split, cfg.data.val_split), pool={cfg.data.pool_split}):
        on_warning(warning)
    return dataset, pool, val


def _check_budget(cfg: Config, pool: int) -> None:
    if cfg.budget > pool:
        raise DataError(
            f"the budget is {cfg.loop.initial} + {cfg.loop.rounds} x {cfg.loop.per_round} = {cfg.budget} labels, "
            f"but the pool ({cfg.data.pool_split!r}) has {pool} images; lower loop.initial, loop.rounds or loop.per_round"
        )


class _Loop:
    def __init__(self, cfg: Config, ledger: Ledger, watcher: Watcher) -> None:
        self.ledger, self.watcher, self.warnings = ledger, watcher, dict[str, None]()
        self.cfg = cfg.model_copy(update={"run": ledger.run, "score": _with_needed_scores(cfg)})

    def run(self) -> Outcome:
        self.ledger.check(self.cfg, "loop")
        self.dataset, self.pool, self.val = open_data(self.cfg, self._warn)
        self.by_id = {item.id: item for item in self.pool}
        preflight_rounds(self.cfg, self.pool, preflight(self.cfg, self.dataset))
        preflight_nodes(self.cfg, self.pool)
        self.ledger.open(self.cfg, "loop")
        self.warnings |= dict.fromkeys(self.ledger.notes().get("warnings", []))
        write_table(join(self.ledger.run, "manifest.parquet"), manifest_of(self.pool))
        outcome = Outcome(self.ledger.run)
        bought: list[pa.Table] = []
        for round_ in range(self.cfg.loop.rounds + 1):
            ids = [i for table in bought for i in table["id"].to_pylist()]
            chosen = self.ledger.stage(round_, "choose", partial(self._choose, round_, ids))
            self.ledger.stage(round_, "buy", partial(self._buy, round_, chosen["ids"]))
            bought.append(read_table(join(self.ledger.folder(round_), "labels.parquet")))
            trained = self.ledger.stage(round_, "train", partial(self._train, round_, bought, None, "train"))
            remove_tree(join(self.ledger.folder(round_), "train", "fit"))  # its last and best checkpoints are kept beside it
            metrics = self._metrics(round_, bought, trained)
            outcome.rounds.append(metrics)
            outcome.checkpoint = join(self.ledger.folder(round_), trained["checkpoint"])
            outcome.stopped = self._stop(outcome.rounds) or "rounds"
            more = round_ < self.cfg.loop.rounds
            if more and outcome.stopped == "rounds":
                scored = self.ledger.stage(round_, "score", partial(self._score, trained["checkpoint"], bought))
                metrics = self._metrics(round_, bought, trained)
                outcome.rounds[-1] = metrics
                if self._confident(metrics):
                    outcome.stopped = "uncertainty"
                elif not scored["left"]:
                    outcome.stopped = "pool"
            self.watcher.on_round(metrics)
            if outcome.stopped != "rounds":
                break
        return self._finish(outcome, bought, round_)

    def _warn(self, text: str) -> None:
        self.warnings[text] = None
        self.watcher.on_warning(text)

    # --- stages -----------------------------------------------------------------------------------------------------

    def _choose(self, round_: int, bought: Sequence[str], folder: str) -> dict:
        """Ids to buy next: from a cold start, or from the scores of the round before. Never reads a label."""
        cfg = self.cfg
        if round_ > 0:
            scores = read_table(join(self.ledger.folder(round_ - 1), "scores"))
            budget = min(cfg.loop.per_round, available(scores, bought, cfg, self._groups()))
            if budget < cfg.loop.per_round:
                self._warn(f"round {round_}: only {budget} images are left to ask for, {cfg.loop.per_round} were wanted")
            rows = choose(scores, set(bought), cfg, budget, self._groups())
        elif cfg.loop.cold_start == "typical":
            rows = typical_start(lambda: self._embed(folder), cfg.loop.initial, cfg.seed)
        else:
            rows = random_start(self.dataset, self.pool, cfg.loop.initial, cfg.seed)
        table = pa.Table.from_pylist([row | {"rank": i + 1, "round": round_} for i, row in enumerate(rows)], schema=queue_schema())
        write_table(join(folder, "chosen.parquet"), table)
        return {"ids": table["id"].to_pylist()}

    def _groups(self) -> dict[str, str]:
        return {item.id: item.group for item in self.pool}

    def _embed(self, folder: str) -> pa.Table:
        """Features of the pool by the encoder as training will find it, through the same stream that scores."""
        cfg, initial = self.cfg, join(folder, "initial")
        plan = Plan(cfg, self.dataset, (), (), (), (), ())
        checkpoint.save(initial, TwoBranch(cfg.model, self.dataset.label_set.n_classes, cfg.seed), model_info(plan))
        score = cfg.score.model_copy(update={"scores": (), "embedding_dim": cfg.score.embedding_dim or 128})
        only = cfg.model_copy(update={"score": score, "query": cfg.query.model_copy(update={"strategy": "random"})})
        score_pool(manifest_of(self.pool), initial, join(folder, "embeddings"), only, on_progress=self.watcher.on_progress, replace=True)
        return read_table(join(folder, "embeddings"), ["id", "uri", "status", "embedding"])

    def _buy(self, round_: int, ids: Sequence[str], folder: str) -> dict:
        table = buy(self.dataset, [self.by_id[i] for i in ids], round_)
        write_table(join(folder, "labels.parquet"), table)
        return {"labels": table.num_rows}

    def _train(self, round_: int, bought: Sequence[pa.Table], steps: int | None, place: str, folder: str) -> dict:
        plan = self._plan(round_, bought, steps)
        trained = fit(plan, join(folder, place), self.watcher.on_progress)
        name = "checkpoint" if place == "train" else f"checkpoint-{place}"
        fetch_checkpoint(trained.checkpoint, join(folder, name))
        if trained.last != trained.best:
            other, what = (trained.best, "best") if trained.checkpoint == trained.last else (trained.last, "last")
            fetch_checkpoint(other, join(folder, f"{name}-{what}"))
        return {"checkpoint": name, "digest": checkpoint.digest_at(join(folder, name)), "metrics": trained.metrics}

    def _plan(self, round_: int, bought: Sequence[pa.Table], steps: int | None) -> Plan:
        cfg = self.cfg.at_round(round_) if steps is None else self.cfg
        if steps:
            cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"steps": steps})})
        labeled = {i for table in bought for i in table["id"].to_pylist()}
        extra = self.dataset.split(cfg.data.unlabeled_split) if cfg.data.unlabeled_split else ()
        counts = np.array([row for table in bought for row in table["class_pixels"].to_pylist()], dtype=np.int64)
        for missing in np.flatnonzero(counts.sum(0) == 0):
            self._warn(f"round {round_}: no bought label shows class {self.dataset.label_set.classes[missing]!r} yet")
        warm = cfg.loop.warm_start and round_ > 0
        return Plan(
            cfg=cfg,
            dataset=self.dataset,
            labeled=tuple(self.by_id[i] for table in bought for i in table["id"].to_pylist()),
            unlabeled=tuple(item for item in self.pool if item.id not in labeled) + tuple(extra),
            val=self.val,
            pixels=tuple(counts.sum(0).tolist()),
            images=tuple((counts > 0).sum(0).tolist()),
            start=join(self.ledger.folder(round_ - 1), "checkpoint") if warm else None,
            parents={"round": round_, "strategy": cfg.query.strategy},
        )

    def _score(self, name: str, bought: Sequence[pa.Table], folder: str) -> dict:
        have = {i for table in bought for i in table["id"].to_pylist()}
        spread = self.cfg.query.batch in ("kcenter", "product")  # distances to what is labelled need its embeddings too
        rest = [item for item in self.pool if spread or item.id not in have]
        bonus = None
        if self.cfg.score.class_bonus:
            counts = np.array([row for table in bought for row in table["class_pixels"].to_pylist()])
            bonus = rarity_bonus((counts > 0).sum(0))
        summary = score_pool(
            manifest_of(rest), join(folder, name), join(folder, "scores"), self.cfg, bonus, self.watcher.on_progress, replace=True
        )
        table = read_table(join(folder, "scores"))
        rest = table.take(pa.array(offered(table["id"].to_pylist(), table["status"].to_pylist(), have)))
        return {
            "counts": summary.counts,
            "images_per_second": summary.images_per_second,
            "pool_uncertainty": pc.mean(rest["uncertainty"]).as_py() if "uncertainty" in rest.column_names else None,
            "left": available(table, have, self.cfg, self._groups()),
        }

    def _metrics(self, round_: int, bought: Sequence[pa.Table], trained: dict) -> dict:
        counts = np.array([row for table in bought for row in table["class_pixels"].to_pylist()])
        classes, scored = self.dataset.label_set.classes, self.ledger.done(round_, "score") or {}
        metrics = {
            "round": round_,
            "labels": len(counts),
            **(trained["metrics"] or {"miou": None}),
            "checkpoint_digest": trained["digest"],
            "seconds": self.ledger.seconds(round_),
            "images_per_second": {"score": scored["images_per_second"]} if scored else {},
            "class_images": dict(zip(classes, (counts > 0).sum(0).tolist(), strict=True)),
            "class_pixels": dict(zip(classes, counts.sum(0).tolist(), strict=True)),
            "pool_uncertainty": scored.get("pool_uncertainty"),
        }
        write_json(join(self.ledger.folder(round_), "metrics.json"), metrics)
        return metrics

    def _finish(self, outcome: Outcome, bought: list[pa.Table], round_: int) -> Outcome:
        """The last training, where it differs from a round's, and masks for every image of the pool."""
        final, frozen = self.cfg.loop.final_steps, round_ < self.cfg.loop.frozen_rounds
        if frozen:  # a stopping rule ended the rounds early
            final = final or self.cfg.train.steps
        if final and (frozen or final != self.cfg.train.steps):
            trained = self.ledger.stage(round_, "final", partial(self._train, round_, bought, final, "final"))
            outcome.checkpoint = join(self.ledger.folder(round_), trained["checkpoint"])
            outcome.rounds[-1] = self._metrics(round_, bought, trained)
        outcome.labels = join(self.ledger.run, "labels")
        if finished_by(outcome.labels) != checkpoint.digest_at(outcome.checkpoint):
            self.ledger.forget(round_, "label")  # one folder for all ends that a run had: another end's masks may lie there

        def label(_: str) -> dict:
            progress = self.watcher.on_progress
            summary = label_pool(manifest_of(self.pool), outcome.checkpoint, outcome.labels, self.cfg, progress, replace=True)
            return {"counts": summary.counts, "images_per_second": summary.images_per_second}

        self.ledger.stage(round_, "label", label)
        self._audit(outcome, bought, round_)
        self.ledger.note(stopped=outcome.stopped, warnings=list(self.warnings))
        outcome.rounds[-1] = outcome.rounds[-1] | {"seconds": self.ledger.seconds(round_)}
        write_json(join(self.ledger.folder(round_), "metrics.json"), outcome.rounds[-1])
        return outcome

    def _audit(self, outcome: Outcome, bought: Sequence[pa.Table], round_: int) -> None:
        """Asks about random images that were never learnt from, and states how good the masks are."""
        learnt = {i for table in bought for i in table["id"].to_pylist()}
        images = self.cfg.loop.audit
        done = self.ledger.done(round_, "audit")
        if done and (done["images"], done["digest"]) != (images, checkpoint.digest_at(outcome.checkpoint)):
            self.ledger.forget(round_, "audit")
        if images == 0 or len(learnt) == len(self.pool):
            remove_tree(join(self.ledger.run, "audit.json"))
            return

        def work(_: str) -> dict:
            device = "cuda" if self.cfg.compute.use_gpu and torch.cuda.is_available() else "cpu"  # the driver may have none
            progress = lambda done, total: self.watcher.on_progress(done, total, {})  # noqa: E731
            found = audit(outcome.checkpoint, outcome.labels, self.dataset, self.pool, learnt, images, self.cfg.seed, device, progress)
            write_json(join(self.ledger.run, "audit.json"), found)
            trust = join(outcome.labels, TRUST)
            write_json(trust, read_json(trust) | {"audit": found})
            return {"images": images, "digest": found["model_digest"], "miou": found["miou"], "checked": len(found["images"])}

        done = self.ledger.stage(round_, "audit", work)
        outcome.audit = done["miou"] | {"images": done["checked"]}

    # --- stopping rules ----------------------------------------------------------------------------------------------

    def _stop(self, rounds: Sequence[dict]) -> str | None:
        rule = self.cfg.loop
        values = [m["miou"] for m in rounds]
        if any(v is None for v in values):
            return None
        if rule.target_miou is not None and values[-1] >= rule.target_miou:
            return "target"
        n = rule.no_gain_rounds
        if n and len(values) > n and max(values[-n:]) < max(values[:-n]) + rule.min_gain:
            return "no gain"
        return None

    def _confident(self, metrics: dict) -> bool:
        mean = metrics["pool_uncertainty"]
        return mean is not None and mean < self.cfg.loop.uncertainty_below


def _with_needed_scores(cfg: Config) -> ScoreConfig:
    needed = (*needed_columns(cfg.query.strategy), *(("uncertainty",) if cfg.loop.uncertainty_below else ()))
    missing = [c for c in dict.fromkeys(needed) if c not in cfg.score.scores]
    return cfg.score.model_copy(update={"scores": (*cfg.score.scores, *missing)})
