"""The loop's steps one by one: a training on given labels, an evaluation, a query."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from raysal.archive.tables import manifest_of, manifest_schema, queue_schema, read_table, write_table
from raysal.archive.uris import absolute, exists, join, open_fs, read_bytes
from raysal.config import Config
from raysal.datasets.base import Dataset, Item
from raysal.datasets.build import build, check, class_pixels
from raysal.errors import DataError, InputError
from raysal.model import checkpoint
from raysal.model.runtime import Predictor
from raysal.rounds.choose import choose
from raysal.rounds.ledger import Ledger, write_json
from raysal.rounds.loop import Watcher
from raysal.train.evaluate import evaluate
from raysal.train.plan import Plan
from raysal.train.ray import fetch_checkpoint, fit

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


def train_once(cfg: Config, labels: str | None, watcher: Watcher) -> dict:
    """One training under ``run``: train/, checkpoint/, metrics.json. The same call resumes; a finished one is not repeated.

    Args:
        cfg: Configuration; loop and query sections are not used.
        labels: Text file of image names, or a labels.parquet; None: every image of the pool split.
        watcher: Shows progress.
    """
    ledger = Ledger(cfg.run, watcher.on_stage)
    with ledger.lock():
        cfg = cfg.model_copy(update={"run": ledger.run})
        ledger.open(cfg)
        dataset = build(cfg.data, cfg.run)
        pool, val = dataset.split(cfg.data.pool_split), dataset.split(cfg.data.val_split)
        labeled = _named(pool, labels) if labels else pool
        for warning in check(dataset, (cfg.data.pool_split, cfg.data.val_split)):
            watcher.on_warning(warning)

        def work(_: str) -> dict:
            counts = count_classes(dataset, labeled)
            names = {item.name for item in labeled}
            extra = dataset.split(cfg.data.unlabeled_split) if cfg.data.unlabeled_split else ()
            plan = Plan(
                cfg=cfg,
                dataset=dataset,
                labeled=labeled,
                unlabeled=(*(item for item in pool if item.name not in names), *extra),
                val=val,
                pixels=tuple(counts.sum(0).tolist()),
                images=tuple((counts > 0).sum(0).tolist()),
            )
            trained = fit(plan, join(cfg.run, "train"), watcher.on_progress)
            target = join(cfg.run, "checkpoint")
            fetch_checkpoint(trained.checkpoint, target)
            metrics = {"labels": len(labeled), **(trained.metrics or {"miou": None})}
            write_json(join(cfg.run, "metrics.json"), metrics)
            return {"checkpoint": "checkpoint", "digest": checkpoint.digest_at(target), **metrics}

        result = ledger.stage(0, "train", work)
        return result | {"checkpoint": join(cfg.run, result["checkpoint"])}


def evaluate_checkpoint(uri: str, cfg: Config, split: str, on_progress: Callable[[int, int, dict], None]) -> dict:
    """Metrics of a checkpoint on a labelled split.

    Raises:
        CheckpointError: The checkpoint was made for other classes than the data set's.
    """
    predictor = Predictor.load(uri, "cuda" if cfg.compute.use_gpu else "cpu")
    dataset = build(cfg.data, cfg.run)
    checkpoint.require_classes(uri, predictor.info, dataset.label_set)
    items = dataset.split(split)
    check(dataset, (split,))
    result = evaluate(predictor, dataset, items, cfg.train.eval_batch, on_progress=lambda done, total: on_progress(done, total, {}))
    return {
        "checkpoint": uri,
        "digest": predictor.digest,
        "split": split,
        "images": len(items),
        **result.to_dict(dataset.label_set.classes),
    }


def query_scores(scores: str, cfg: Config, budget: int, out: str, labeled: str | None, manifest: str | None) -> list[dict]:
    """Chooses from a scores table and writes the queue. Returns its rows."""
    bought = set(read_table(labeled, ["id"])["id"].to_pylist()) if labeled else set()
    groups: dict[str, str] = {}
    if manifest:
        table = read_table(manifest, ["id", "group", "site", "drive"])
        for row in table.to_pylist():
            groups[row["id"]] = row["group"] or (f"{row['site']}/{row['drive']}" if row["site"] is not None else "")
    elif cfg.query.group_cap:
        raise InputError("query.group_cap needs to know sites and drives; give --manifest")
    rows = choose(read_table(scores), bought, cfg, budget, groups)
    rows = [row | {"rank": i + 1, "round": None} for i, row in enumerate(rows)]
    write_table(out, pa.Table.from_pylist(rows, schema=queue_schema()))
    return [{k: v for k, v in row.items() if k != "reasons"} | {"reasons": dict(row["reasons"])} for row in rows]


def open_manifest(uri: str) -> pa.Table:
    """A manifest table, or one made from the images under a folder. Raises InputError where there is neither."""
    if not exists(uri):
        raise InputError(f"{uri}: does not exist; give a manifest.parquet or a folder of images")
    fs, path = open_fs(uri)
    if fs.isfile(path):
        return read_table(uri).cast(manifest_schema())
    found = fs.find(path, detail=True)
    if any(p.endswith(".parquet") for p in found):
        return read_table(uri)
    items = []
    for file, info in sorted(found.items()):
        if file.lower().endswith(IMAGE_SUFFIXES):
            image = absolute(fs.unstrip_protocol(file))
            stamp = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified")
            key = hashlib.sha256(f"{image}|{info.get('size')}|{stamp}".encode()).hexdigest()[:32]
            items.append(_Listed(key, image))
    if not items:
        raise InputError(f"{uri}: holds no image ({', '.join(IMAGE_SUFFIXES)}) and no manifest")
    return manifest_of(items)


def count_classes(dataset: Dataset, items: Sequence[Item]) -> np.ndarray:
    """Pixels of each class in each labelled image: int64 [n, C]."""

    def count(item: Item) -> np.ndarray:
        shape = dataset.image(item).shape[:2]
        return class_pixels(dataset.mask(item, shape), dataset.label_set.n_classes)

    with ThreadPoolExecutor(8) as threads:
        return np.stack(list(threads.map(count, items)))


class _Listed:
    """An image of a listing, as `manifest_of` wants it."""

    exclude: tuple[str, ...] = ()
    group = ""

    def __init__(self, id_: str, image: str) -> None:
        self.id, self.image = id_, image


def _named(pool: Sequence[Item], labels: str) -> tuple[Item, ...]:
    if labels.endswith(".parquet"):
        names = read_table(labels, ["name"])["name"].to_pylist()
    else:
        try:
            names = [line.strip() for line in read_bytes(labels).decode().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{labels}: can't be read ({error}); give a text file with one image name a line") from error
    by_name = {item.name: item for item in pool} | {posixpath.splitext(item.name)[0]: item for item in pool}
    if unknown := [n for n in names if n not in by_name]:
        raise DataError(f"{labels}: {len(unknown)} names are not in the pool, for example {unknown[:3]}; names look like {pool[0].name!r}")
    if not names:
        raise DataError(f"{labels}: names no image")
    return tuple(dict.fromkeys(by_name[n] for n in names))
