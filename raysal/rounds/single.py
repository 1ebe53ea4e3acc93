"""The loop's steps one by one: a training on given labels, an evaluation, a query."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from raysal.archive.tables import queue_schema, read_table, write_table
from raysal.archive.uris import exists, join, list_names, open_fs, read_bytes, write_bytes
from raysal.config import Config, digest_of
from raysal.datasets.base import Dataset, Item
from raysal.datasets.build import build, check, class_pixels
from raysal.errors import DataError, ImageError, InputError
from raysal.model import checkpoint
from raysal.model.engines import settle
from raysal.model.runtime import Predictor
from raysal.rounds.audit import audit, draw
from raysal.rounds.choose import choose
from raysal.rounds.ledger import Ledger, write_json
from raysal.rounds.loop import Watcher
from raysal.rounds.preflight import preflight, preflight_nodes
from raysal.train.evaluate import evaluate
from raysal.train.plan import Plan
from raysal.train.ray import fetch_checkpoint, fit


def train_once(cfg: Config, labels: Sequence[str] | None, watcher: Watcher) -> dict:
    """One training under ``run``: train/, checkpoint/, metrics.json. The same call resumes; a finished one is not repeated.

    Args:
        cfg: Configuration; loop and query sections are not used.
        labels: Text files of image names, labels.parquet files or run folders; None or empty: every image of the pool split.
        watcher: Shows progress.
    """
    ledger = Ledger(cfg.run, watcher.on_stage)
    with ledger.lock():
        cfg = cfg.model_copy(update={"run": ledger.run})
        dataset = build(cfg.data, cfg.run)
        pool, val = dataset.split(cfg.data.pool_split), dataset.split(cfg.data.val_split)
        labeled = _named(pool, labels) if labels else pool
        given = digest_of(sorted(item.name for item in labeled)) if labels else None
        ledger.check(cfg, "train", given)
        for warning in check(dataset, (cfg.data.pool_split, cfg.data.val_split), pool={cfg.data.pool_split}):
            watcher.on_warning(warning)
        preflight(cfg, dataset)
        preflight_nodes(cfg, pool)
        ledger.open(cfg, "train", given)

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

        result = ledger.stage(None, "train", work)
        return result | {"checkpoint": join(cfg.run, result["checkpoint"])}


def evaluate_checkpoint(uri: str, cfg: Config, split: str, on_progress: Callable[[int, int, dict], None]) -> dict:
    """Metrics of a checkpoint on a labelled split.

    Raises:
        CheckpointError: The checkpoint was made for other classes than the data set's.
    """
    device = "cuda" if cfg.compute.use_gpu else "cpu"
    predictor = Predictor.load(uri, device, settle(cfg.runtime, checkpoint.read_info(uri).model, device))
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


def audit_labels(
    labels: str,
    checkpoint_uri: str,
    cfg: Config,
    images: int,
    learnt: Sequence[str],
    ask: str | None,
    on_progress: Callable[[int, int, dict], None],
) -> dict:
    """Audits a table of masks with the labels of a data set; see `raysal.rounds.audit.audit`.

    Args:
        labels: Table of masks.
        checkpoint_uri: The model that made them.
        cfg: Its data section names the data set; pool_split holds the images that experts can be asked about.
        images: How many to draw.
        learnt: Text files of image names, labels.parquet files or run folders that the model learnt from.
        ask: Where to write the names of the images to label; then nothing else is done.
        on_progress: Called as on_progress(done, total, {}).
    """
    dataset = build(cfg.data, cfg.run)
    items, device = dataset.split(cfg.data.pool_split), "cuda" if cfg.compute.use_gpu else "cpu"
    ids = {item.id for item in _named(items, learnt)}
    checkpoint.require_classes(checkpoint_uri, checkpoint.read_info(checkpoint_uri), dataset.label_set)
    if ask is not None:
        _, chosen = draw(labels, checkpoint.digest_at(checkpoint_uri), items, ids, images, cfg.seed)
        names = {item.id: item.name for item in items}
        write_bytes(ask, "".join(f"{names[i]}\n" for i in chosen).encode())
        return {"ask": ask, "images": chosen}
    return audit(checkpoint_uri, labels, dataset, items, ids, images, cfg.seed, device, lambda done, total: on_progress(done, total, {}))


def query_scores(scores: str, cfg: Config, budget: int, out: str, labeled: Sequence[str], manifest: str | None) -> list[dict]:
    """Chooses from a scores table and writes the queue. Returns its rows.

    Args:
        scores: Scores table, a file or a folder.
        cfg: Its query section, ueq_alpha and seed decide.
        budget: Images to choose.
        out: Parquet file for the queue.
        labeled: Tables of labels that exist, or run folders, whose rounds' labels are all taken: never chosen again.
        manifest: Manifest with sites and drives, for query.group_cap.
    """
    bought = {i for given in labeled for table in _label_tables(given) for i in read_table(table, ["id"])["id"].to_pylist()}
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


def count_classes(dataset: Dataset, items: Sequence[Item]) -> np.ndarray:
    """Pixels of each class in each labelled image: int64 [n, C]."""

    def count(item: Item) -> np.ndarray:
        try:
            shape = dataset.image(item).shape[:2]
        except ImageError as error:
            raise DataError(f"labelled image {error}; restore the file, or leave it out of the labels") from error
        return class_pixels(dataset.mask(item, shape), dataset.label_set.n_classes)

    with ThreadPoolExecutor(8) as threads:
        return np.stack(list(threads.map(count, items)))


def _label_tables(uri: str) -> list[str]:
    """The tables behind one place of labels: those of all rounds where it is a run folder, else itself."""
    rounds = [join(uri, "rounds", name, "labels.parquet") for name in list_names(join(uri, "rounds"))]
    if not rounds:
        return [uri]
    if not (bought := [table for table in rounds if exists(table)]):
        raise InputError(f"{uri}: this run has bought no labels yet; let it finish a round, or name other labels")
    return bought


def _named(pool: Sequence[Item], labels: Sequence[str]) -> tuple[Item, ...]:
    """Items of the pool that text files, label tables or run folders name, each once."""
    by_name = {item.name: item for item in pool} | {posixpath.splitext(item.name)[0]: item for item in pool}
    chosen: list[Item] = []
    for source in (table for given in labels for table in _label_tables(given)):
        names = _names(source)
        if unknown := [n for n in names if n not in by_name]:
            raise DataError(
                f"{source}: {len(unknown)} names are not in the pool, for example {unknown[:3]}; names look like {pool[0].name!r}"
            )
        if not names:
            raise DataError(f"{source}: names no image")
        chosen += [by_name[n] for n in names]
    return tuple(dict.fromkeys(chosen))


def _names(source: str) -> list[str]:
    fs, path = open_fs(source)
    if source.endswith(".parquet") or fs.isdir(path):
        return list(read_table(source, ["name"])["name"].to_pylist())
    try:
        return [line.strip() for line in read_bytes(source).decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: can't be read ({error}); give a text file with one image name a line") from error
