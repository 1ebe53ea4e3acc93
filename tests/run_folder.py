"""A run folder as the loop leaves it, fabricated in seconds from real parts: real images, real checkpoints, real scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from raysal.archive.tables import labels_schema, manifest_of, queue_schema, read_table, scores_schema, write_table
from raysal.config import Config, build as build_config
from raysal.datasets.base import Dataset, Item
from raysal.datasets.folder import read as read_folder
from raysal.datasets.synthetic import write_archive
from raysal.images.masks import encode_mask
from raysal.labels import IGNORE, S5MARS
from raysal.model import checkpoint
from raysal.model.network import TwoBranch
from raysal.model.runtime import Predictor
from raysal.query.scores import class_fractions, score_images
from raysal.query.select import select, strategy_scores
from raysal.rounds.audit import audit
from raysal.rounds.oracle import buy
from raysal.train.evaluate import evaluate

CLASSES = S5MARS.classes


def tiny_config(run: str, **loop: object) -> Config:
    return build_config(
        {
            "name": "tiny <b>run</b>",
            "run": run,
            "data": {"synthetic": {"images": 16, "val_images": 5, "size_px": 48}},
            "model": {"arch": "Unet", "encoder": "tu-mobilenetv3_small_050", "channels_last": False},
            "loop": {"initial": 4, "per_round": 3, "rounds": 1, "full_miou": 0.8, **loop},
        }
    )


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def dataset_of(run: Path, cfg: Config) -> Dataset:
    return read_folder(cfg.data.model_copy(update={"root": str(run / "data")}))


class Fabricator:
    """Writes a run folder stage by stage, as the loop does, with an untrained model unless it is given a trained one."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.run = cfg, Path(cfg.run)
        made = cfg.data.synthetic
        write_archive(str(self.run / "data"), made.images, made.val_images, made.size_px, made.seed)
        self.dataset = dataset_of(self.run, cfg)
        self.pool, self.val = self.dataset.split("train"), self.dataset.split("val")
        put(self.run / "config.yaml", cfg.to_yaml())
        put(self.run / "run.json", {"config_digest": cfg.digest(), "raysal_version": "0.1.0", "created_at": "2026-01-02T03:04:05+00:00"})
        write_table(str(self.run / "manifest.parquet"), manifest_of(self.pool))
        self.bought: list[pa.Table] = []
        self.stages = 0
        self.by_id = {item.id: item for item in self.pool}

    def folder(self, n: int) -> Path:
        return self.run / "rounds" / f"{n:03d}"

    def stage(self, n: int, name: str, seconds: float, **outputs: object) -> None:
        self.stages += 1
        marker = {"stage": name, "round": n, "finished_at": f"2026-01-02T03:04:{self.stages:02d}", "seconds": seconds, "outputs": outputs}
        put(self.folder(n) / "stages" / f"{name}.json", marker)

    def choose(self, n: int) -> list[Item]:
        rows: list[dict]
        if n == 0:
            rows = [
                {"id": i.id, "uri": i.image, "strategy": "random start", "score": None, "reasons": []}
                for i in self.pool[:: len(self.pool) // self.cfg.loop.initial][: self.cfg.loop.initial]
            ]
        else:
            table = read_table(str(self.folder(n - 1) / "scores"))
            table = table.filter(pa.array([s == "ok" for s in table["status"].to_pylist()]))
            ids = table["id"].to_pylist()
            columns = {c: table[c].to_numpy() for c in ("uncertainty", "entropy")}
            value = strategy_scores(columns, ids, "ueq", 0.5, 0, self.cfg.loop.per_round, 4)
            rows = [
                {
                    "id": ids[i],
                    "uri": self.by_id[ids[i]].image,
                    "strategy": "ueq",
                    "score": float(value[i]),
                    "reasons": [(c, float(v[i])) for c, v in columns.items()],
                }
                for i in select(ids, value, self.cfg.loop.per_round, self.cfg.query, 0)
            ]
        rows = [row | {"rank": i + 1, "round": n} for i, row in enumerate(rows)]
        write_table(str(self.folder(n) / "chosen.parquet"), pa.Table.from_pylist(rows, schema=queue_schema()))
        self.stage(n, "choose", 0.4)
        chosen = [self.by_id[str(row["id"])] for row in rows]
        self.bought.append(buy(self.dataset, chosen, n))
        write_table(str(self.folder(n) / "labels.parquet"), self.bought[-1])
        self.stage(n, "buy", 0.2)
        return chosen

    def evaluate(self, n: int, model: TwoBranch, log: list[dict] | None = None) -> Predictor:
        info = checkpoint.ModelInfo(S5MARS, self.cfg.model, self.cfg.data.input_scale, 48)
        digest = checkpoint.save(str(self.folder(n) / "checkpoint"), model, info)
        predictor = Predictor(model, info)
        result = evaluate(predictor, self.dataset, self.val, 4).to_dict(CLASSES)
        put(self.folder(n) / "train" / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in log or made_up_log(n)))
        self.stage(n, "train", 61.5 + n)
        pixels = np.array([row for table in self.bought for row in table["class_pixels"].to_pylist()])
        metrics = {
            "round": n, "labels": len(pixels), **result, "checkpoint_digest": digest, "seconds": {"train": 61.5}, "images_per_second": {},
            "class_images": dict(zip(CLASSES, (pixels > 0).sum(0).tolist(), strict=True)), "pool_uncertainty": 0.12,
        }  # fmt: skip
        put(self.folder(n) / "metrics.json", metrics)
        return predictor

    def score(self, n: int, predictor: Predictor) -> None:
        have = {i for table in self.bought for i in table["id"].to_pylist()}
        rows = []
        for item in (i for i in self.pool if i.id not in have):
            image = self.dataset.image(item)
            z1, z2 = predictor.logits([image], "decoder")
            valid = torch.ones(1, *image.shape[:2], dtype=torch.bool)
            found = {k: float(v[0]) for k, v in score_images(z1, z2, valid, self.cfg.score).items() if np.ndim(v) == 1}
            rows.append(
                {"id": item.id, "uri": item.image, "status": "ok", "width": 48, "height": 48, **found}
                | {"class_fractions": np.asarray(class_fractions(z1, z2, valid))[0].tolist()}
            )
        rows[-1] |= {"status": "decode", "error": "not <i>an</i> image", "uncertainty": None, "entropy": None, "class_fractions": None}
        table = pa.Table.from_pylist(rows, schema=scores_schema(self.cfg.score.scores))
        write_table(str(self.folder(n) / "scores" / "part-0.parquet"), table)
        self.stage(n, "score", 8.1, counts={"ok": len(rows) - 1, "decode": 1}, images_per_second=31.4)

    def label(self, n: int, predictor: Predictor) -> None:
        digest, rows = checkpoint.digest_at(str(self.folder(n) / "checkpoint")), []
        for item in self.pool:
            prediction = predictor.predict([self.dataset.image(item)])
            mask = prediction.masks[0].copy()
            mask[:4] = IGNORE
            height, width = mask.shape
            sure, open_ = float(prediction.confidence.mean()), float((mask == IGNORE).mean())
            row = {"id": item.id, "uri": item.image, "status": "ok", "width": width, "height": height, "mask_png": encode_mask(mask)}
            shares = np.bincount(prediction.masks[0][4:].ravel(), minlength=len(CLASSES)) / mask[4:].size
            rows.append(row | {"confidence": sure, "abstained": open_, "class_fractions": shares, "model_digest": digest})
        half = len(rows) // 2
        for i, part in enumerate((rows[:half], rows[half:])):
            write_table(str(self.run / "labels" / f"part-{i}.parquet"), pa.Table.from_pylist(part, schema=labels_schema(S5MARS)))
        self.stage(n, "label", 5.5, counts={"ok": len(rows)}, images_per_second=25.0)

    def audit(self, n: int) -> None:
        learnt = {i for table in self.bought for i in table["id"].to_pylist()}
        found = audit(str(self.folder(n) / "checkpoint"), str(self.run / "labels"), self.dataset, self.pool, learnt, 6, seed=0)
        put(self.run / "audit.json", found)


def made_up_log(n: int) -> list[dict]:
    rng = np.random.default_rng(n)
    lines: list[dict] = [{"start": 0, "world": 1}]
    for step in range(5, 105, 5):
        fall = math.exp(-step / 60) + 0.05 * rng.random()
        agreement = {c: round(float(rng.random()), 3) for c in CLASSES[:7]}
        lines.append(
            {
                "step": step,
                "loss": 3 * fall,
                "sup1": fall,
                "sup2": 1.1 * fall,
                "cps": 0.6 * fall,
                "images_per_second": 20.0,
                "agreement": agreement,
            }
        )
    return [*lines, {"step": 100, "eval": {"miou": 0.3}}]


def fabricate(run: Path) -> Path:
    torch.set_num_threads(1)
    made = Fabricator(tiny_config(str(run)))
    for n in range(2):
        made.choose(n)
        predictor = made.evaluate(n, TwoBranch(made.cfg.model, len(CLASSES), seed=n))
        if n == 0:
            made.score(n, predictor)
    made.label(1, predictor)
    made.audit(1)
    return run
