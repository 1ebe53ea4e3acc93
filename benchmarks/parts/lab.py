"""Trainings, scores and queries of many experiments, each done once: kept by digest, run as Ray tasks, shared by whoever asks.

A training's digest is that of what decides it (configuration, labels in order of purchase, weights file, split) and of no path, so results
travel between machines. Small results are JSON files; models and scores, which only a running experiment needs, lie beside them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from torch import set_num_threads

from raysal.archive.tables import manifest_of, read_table, scores_schema
from raysal.archive.uris import exists, join, list_names, read_bytes, remove_tree, write_bytes
from raysal.config import Config, digest_of
from raysal.datasets.base import Dataset, Item
from raysal.datasets.build import build
from raysal.errors import InputError
from raysal.model import checkpoint
from raysal.model.network import TwoBranch
from raysal.model.runtime import Predictor
from raysal.query.scores import needed_columns, rarity_bonus
from raysal.rounds.choose import choose, random_start, typical_start
from raysal.rounds.single import count_classes
from raysal.stream.score import ScoreImages
from raysal.stream.worker import Task
from raysal.train.evaluate import evaluate
from raysal.train.loop import model_info, train
from raysal.train.plan import Plan

from .plain import PlainSession

DECIDES = {"seed", "method", "data", "augment", "model", "loss", "cps", "optim", "train"}
"""Sections of the configuration that decide a training."""

SCORES = ("entropy", "uncertainty", "margin")
"""Columns of every scoring; BALD costs ten passes and is computed where a row asks for it."""


@dataclass(frozen=True)
class Split:
    """Which images a comparison buys from and which it measures on.

    Attributes:
        fold: None: the data set's own pool and val. (k, n): only the pool; site groups number k, k + n, k + 2n ... of the pool are
            measured on and the others bought from. Choices are made here, so that val stays unseen.
        limit: At most so many images of either; for smoke runs.
    """

    fold: tuple[int, int] | None = None
    limit: int | None = None

    def open(self, cfg: Config) -> tuple[Dataset, tuple[Item, ...], tuple[Item, ...]]:
        """The data set, its pool, and the images to measure on."""
        dataset = build(cfg.data, cfg.run)
        pool, held = dataset.split(cfg.data.pool_split), dataset.split(cfg.data.val_split)
        if self.fold is not None:
            k, n = self.fold
            site = site_groups(cfg, pool)
            order = list(dict.fromkeys(site[item.name] for item in pool))
            if not 0 <= k < n <= len(order):
                raise InputError(f"fold {k}/{n}: K is 0 to N - 1, and N at most the {len(order)} site groups of the pool")
            out = set(order[k::n])
            pool, held = tuple(i for i in pool if site[i.name] not in out), tuple(i for i in pool if site[i.name] in out)
        return dataset, pool[: self.limit], held[: self.limit]


def site_groups(cfg: Config, items: Sequence[Item]) -> dict[str, str]:
    """Site of each image: column site_group of a folder's tiles.csv, else the item's own group."""
    table, coarse = join(cfg.data.root or "", "tiles.csv"), {}
    if cfg.data.reader == "folder" and exists(table):
        rows = csv.DictReader(io.StringIO(read_bytes(table).decode()))
        coarse = {row["name"]: row["site_group"] for row in rows if row.get("site_group")}
    return {item.name: coarse.get(item.name, item.group) for item in items}


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        cfg: Its configuration.
        labels: Names of the labelled images in order of purchase.
        split: Where the unlabelled rest and the images to measure on come from.
        start: The training whose weights it starts from, None for the encoder's.
    """

    cfg: Config
    labels: tuple[str, ...]
    split: Split
    start: Training | None = None

    def digest(self) -> str:
        """32 hex digits; knobs at their defaults are no part of it, so that new knobs leave old results valid."""
        cfg = decides(self.cfg)
        more = {"fold": self.split.fold, "limit": self.split.limit} | ({"start": self.start.digest()} if self.start else {})
        return digest_of([cfg, list(self.labels), more])[:32]


def decides(cfg: Config) -> dict[str, Any]:
    """What of a configuration decides a training, without paths of this machine."""
    tree = cfg.model_dump(mode="json", include=DECIDES, exclude_defaults=True)
    tree.get("data", {}).pop("root", None)
    tree.get("data", {}).pop("black_border", None)  # decides which pixels a score counts, not how a network learns
    weights = cfg.model.encoder_weights
    if weights and exists(weights):
        tree["model"]["encoder_weights"] = hashlib.sha256(read_bytes(weights)).hexdigest()[:32]
    return tree


def fingerprint(cfg: Config) -> str:
    """32 hex digits over the names of a data set's splits and the bytes of their masks: results of one set say nothing of another."""
    dataset = build(cfg.data, cfg.run)
    seen = hashlib.sha256()
    for split in (cfg.data.pool_split, cfg.data.val_split):
        for item in dataset.split(split):
            seen.update(f"{split}/{item.name}/".encode() + (read_bytes(item.mask) if item.mask else b""))
    return seen.hexdigest()[:32]


class Lab:
    """Does what experiments ask for, each thing once.

    Args:
        cache: URI of a folder that all nodes reach; one program at a time.
        data: `fingerprint` of the data set.
        known: JSON Lines file of earlier results, see `export`; left aside where it is of other data.
        say: Called with a line after each training.

    Raises:
        InputError: The cache is of other data.
    """

    def __init__(self, cache: str, data: str, known: Path | None = None, say: Callable[[str], None] = print) -> None:
        self.cache, self.data, self.say, self.code = cache, data, say, commit()
        self._lock, self._running = threading.Lock(), dict[str, Future[Any]]()
        self._known: dict[str, Any] = {}
        if known is not None and known.exists():
            entries = [json.loads(line) for line in known.read_text().splitlines()]
            self._known = {entry["key"]: entry["value"] for entry in entries}
            if self._known.get("data") != data:
                say(f"{known}: results of other data, not used")
                self._known = {}
        mine = join(cache, "data.json")
        if exists(mine) and json.loads(read_bytes(mine)) != data:
            raise InputError(f"{cache}: keeps results of other data; give another --cache")
        write_bytes(mine, json.dumps(data).encode())
        self.done, self.started = 0, time.perf_counter()

    def trained(self, training: Training) -> dict:
        """Metrics of a training: run, waited for, or known."""
        result: dict = self._once(f"training-{training.digest()}", lambda: self._train(training))
        return result

    def _train(self, training: Training) -> Any:
        if training.start:
            self._have_model(training.start)
        return run_training.remote(training, self.cache, training.digest(), self.code)

    def predicted(self, training: Training, model: dict[str, Any]) -> dict:
        """Metrics of a training whose model predicts with other settings (``flip``, ``predict``); none on the rest of the pool then."""
        if not model:
            return self.trained(training)
        digest = training.digest()

        def run() -> Any:
            self._have_model(training)
            return run_evaluation.remote(training, with_(training.cfg, model=model), self.cache, digest)

        result: dict = self._once("evaluation-" + digest_of([digest, model])[:32], run)
        return self.trained(training) | {"rest": None} | result

    def _have_model(self, training: Training) -> None:
        """Trains again where a result is known but its model is not in the cache."""
        self.trained(training)
        digest = training.digest()
        if not exists(join(self.cache, "models", digest, checkpoint.INFO)):
            self._once(f"model-{digest}", lambda: self._train(training), keep=False)

    def _scored(self, training: Training, cfg: Config) -> str:
        """Folder of the pool's scores by a trained model, for all queries that read the same columns."""
        columns = tuple(dict.fromkeys((*SCORES, *needed_columns(cfg.query.strategy))))
        cfg = with_(cfg, score={"scores": columns})
        place = "scores-" + digest_of([cfg.score.model_dump(mode="json"), cfg.seed])[:16]
        out = join(self.cache, "models", training.digest(), place)
        if not exists(join(out, "done")):
            self._have_model(training)
            self._once(f"{training.digest()}-{place}", lambda: run_scores.remote(training, cfg, self.cache, out), keep=False)
        return out

    def started_with(self, cfg: Config, split: Split, budget: int) -> tuple[str, ...]:
        """Names of the first labels, as cfg.loop.cold_start says."""
        asked = decides(cfg) if cfg.loop.cold_start == "typical" else cfg.seed
        key = "start-" + digest_of([asked, split.fold, split.limit, cfg.loop.cold_start, budget])[:32]
        return tuple(self._once(key, lambda: run_start.remote(cfg, split, budget, self.cache, key)))

    def asked(self, training: Training, cfg: Config, budget: int) -> tuple[str, ...]:
        """Names that a query chooses after a training."""
        digest = training.digest()
        query = [
            cfg.query.model_dump(mode="json", exclude_defaults=True),
            cfg.score.model_dump(mode="json", exclude_defaults=True),
            cfg.seed,
            budget,
        ]
        key = "query-" + digest_of([digest, query])[:32]

        def run() -> Any:
            blind = (cfg.query.strategy, cfg.query.batch) == ("random", "topk")
            return run_query.remote(training, cfg, budget, None if blind else self._scored(training, cfg))

        return tuple(self._once(key, run))

    def export(self, file: Path) -> None:
        """Writes every result that is known or in the cache as JSON Lines, in order of key."""
        found = (
            {"data": self.data}
            | self._known
            | {
                name.removesuffix(".json"): json.loads(read_bytes(join(self.cache, name)))
                for name in list_names(self.cache)
                if name.startswith(("training-", "evaluation-", "start-", "query-"))
            }
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"key": key, "value": found[key]}) + "\n" for key in sorted(found)))

    def _once(self, key: str, submit: Callable[[], Any], keep: bool = True) -> Any:
        """A result by its key: known, in the cache, under way in another thread, or made now (and kept in the cache)."""
        uri = join(self.cache, f"{key}.json")
        mine = Future[Any]()
        with self._lock:
            job = self._running.setdefault(key, mine)
        if job is mine:
            try:
                if key in self._known:
                    value = self._known[key]
                elif keep and exists(uri):
                    value = json.loads(read_bytes(uri))
                else:
                    value = ray.get(submit())
                    if keep:
                        write_bytes(uri, json.dumps(value).encode())
                        self._tell(key, value)
                job.set_result(value)
            except BaseException as error:
                job.set_exception(error)
        return job.result()

    def _tell(self, key: str, value: Any) -> None:
        if key.startswith("training-"):
            self.done += 1
            minutes = (time.perf_counter() - self.started) / 60
            what = f"{value['labels_n']} labels, seed {value['seed']}, mIoU {value['miou']:.4f}, {value['seconds']:.0f} s"
            self.say(f"{minutes:6.1f} min  training {self.done}: {what}")


@ray.remote(num_cpus=1, max_retries=5)
def run_training(training: Training, cache: str, digest: str, code: str) -> dict:
    """Trains on one core and measures; the model goes to models/DIGEST."""
    set_num_threads(1)
    began = time.perf_counter()
    cfg, folder = training.cfg, join(cache, "models", digest)
    dataset, pool, held = training.split.open(cfg)
    by_name, bought = {item.name: item for item in pool}, set(training.labels)
    labeled = tuple(by_name[name] for name in training.labels)
    extra = dataset.split(cfg.data.unlabeled_split) if cfg.data.unlabeled_split else ()
    counts = count_classes(dataset, labeled)
    pixels, images = tuple(counts.sum(0).tolist()), tuple((counts > 0).sum(0).tolist())
    rest = tuple(item for item in pool if item.name not in bought)
    start = join(cache, "models", training.start.digest()) if training.start else None
    plan = Plan(cfg, dataset, labeled, (*rest, *extra), held, pixels, images, start)
    session = PlainSession(plan, join(folder, "log"), processes=0, keep=folder)
    train(plan, session)
    session.close()
    measured = json.loads(read_bytes(join(folder, checkpoint.INFO)))["parents"]["metrics"]
    del measured["reliability"]  # counts by class and confidence: the checkpoint's, too long for a record
    classes, sites = dataset.label_set.classes, site_groups(cfg, pool)
    archive = evaluate(Predictor.load(folder), dataset, rest, cfg.train.eval_batch).to_dict(classes) if rest else {}
    return {
        "digest": digest,
        "seed": cfg.seed,
        "config": decides(cfg),
        "fold": training.split.fold,
        "pool": len(pool),
        "labels_n": len(labeled),
        "labels": list(training.labels) if len(labeled) < len(pool) else "all",
        "class_images": dict(zip(classes, images, strict=True)),
        "sites": len({sites[item.name] for item in labeled}),
        "panoramas": len({item.group for item in labeled}),
        **measured,
        "rest": {key: archive[key] for key in ("miou", "iou")} if rest else None,
        "seconds": round(time.perf_counter() - began, 1),
        "commit": code,
    }


@ray.remote(num_cpus=1, max_retries=5)
def run_evaluation(training: Training, cfg: Config, cache: str, digest: str) -> dict:
    """Measures a trained model that predicts as another configuration says."""
    set_num_threads(1)
    dataset, _, held = training.split.open(cfg)
    loaded = checkpoint.load(join(cache, "models", digest))
    predictor = Predictor(loaded.model, replace(loaded.info, model=cfg.model, predict=cfg.model.predict))
    found = evaluate(predictor, dataset, held, cfg.train.eval_batch).to_dict(dataset.label_set.classes)
    del found["reliability"]
    return found


@ray.remote(num_cpus=1, max_retries=5)
def run_start(cfg: Config, split: Split, budget: int, cache: str, key: str) -> list[str]:
    """Chooses the first labels."""
    set_num_threads(1)
    dataset, pool, _ = split.open(cfg)

    def embed() -> pa.Table:
        folder = join(cache, "models", key)
        plan = Plan(cfg, dataset, (), (), (), (), ())
        checkpoint.save(folder, TwoBranch(cfg.model, dataset.label_set.n_classes, cfg.seed), model_info(plan))
        _score(with_(cfg, score={"scores": ()}), pool, folder, join(folder, "embeddings"))
        return read_table(join(folder, "embeddings"))

    typical = cfg.loop.cold_start == "typical"
    rows = typical_start(embed, budget, cfg.seed) if typical else random_start(dataset, pool, budget, cfg.seed)
    names = {item.id: item.name for item in pool}
    return [names[row["id"]] for row in rows]


@ray.remote(num_cpus=1, max_retries=5)
def run_scores(training: Training, cfg: Config, cache: str, out: str) -> int:
    """Scores the whole pool with a trained model, by the actor that scores archives. Returns how many rows."""
    set_num_threads(1)
    dataset, pool, _ = training.split.open(cfg)
    bonus = None
    if cfg.score.class_bonus:
        counts = count_classes(dataset, [item for item in pool if item.name in set(training.labels)])
        bonus = tuple(rarity_bonus((counts > 0).sum(0)).tolist())
    return _score(cfg, pool, join(cache, "models", training.digest()), out, bonus)


@ray.remote(num_cpus=1, max_retries=5)
def run_query(training: Training, cfg: Config, budget: int, scores: str | None) -> list[str]:
    """Chooses from the pool's scores, or blindly."""
    _, pool, _ = training.split.open(cfg)
    by_id, bought = {item.id: item for item in pool}, set(training.labels)
    if scores is None:
        listed = manifest_of(pool).select(["id", "uri"])
        table = listed.append_column("status", pa.array(["ok"] * len(pool)))
    else:
        table = read_table(scores)
    have = {item.id for item in pool if item.name in bought}
    rows = choose(table, have, cfg, budget, {item.id: item.group for item in pool})
    return [by_id[row["id"]].name for row in rows]


def _score(cfg: Config, pool: Sequence[Item], model: str, out: str, bonus: tuple[float, ...] | None = None) -> int:
    """Writes the scores table of a pool, from nothing: a note that a killed attempt left would be taken for a deadly image."""
    remove_tree(out)
    schema = scores_schema(cfg.score.scores, cfg.score.embedding_dim)
    task = Task(cfg, model, checkpoint.digest_at(model), out, schema, "cpu", 1, bonus)
    receipt = ScoreImages(task)(manifest_of(pool)).to_pylist()[0]
    if receipt.get("error") or receipt["model"] or receipt["fetch"]:
        raise RuntimeError(f"scoring with {model} failed: {receipt}")
    write_bytes(join(out, "done"), b"")
    return len(pool)


def commit() -> str:
    """The checked-out commit, marked where files differ from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def with_(cfg: Config, **sections: dict[str, Any]) -> Config:
    """A configuration with some knobs of some sections changed, checked."""
    tree = cfg.model_dump()
    return Config.model_validate(tree | {name: tree[name] | update for name, update in sections.items()})


def cores() -> int:
    """Of this machine: one training each."""
    return os.cpu_count() or 1
