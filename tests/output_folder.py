"""Folders as `raysal score` and `raysal label` leave them, made in seconds from real parts: real images, errors, shards and markers."""

from __future__ import annotations

import io
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from raysal.archive.fetch import fetch_image
from raysal.archive.tables import labels_schema, manifest_schema, scores_schema, write_table
from raysal.datasets.synthetic import scene
from raysal.errors import ImageError
from raysal.images.decode import decode_image
from raysal.images.masks import encode_mask
from raysal.labels import IGNORE, S5MARS
from raysal.model.metrics import Calibration, ClassReliability, confusion
from raysal.stream.output import TRUST, Output
from raysal.stream.pool import Summary
from raysal.stream.worker import shard_name
from raysal.train.evaluate import Evaluation

N_CLASSES = S5MARS.n_classes
MODEL = "ab12" * 16
START = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
SCORES = ("uncertainty", "entropy")
FAILURES = 4


def archive(root: Path, images: int, size_px: int) -> list[dict]:
    """Readable images in folders of sols, two to a sol, and what became of four more that are not: rows with id, uri, status and error."""
    rows = []
    for i in range(images):
        path = root / f"sol_{10 * (i // 2):04d}" / f"scene_{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(3, i, size_px)[0]).save(path)
        rows.append({"id": f"{i:032x}", "uri": str(path), "status": "ok", "width": size_px, "height": size_px})
    Image.fromarray(np.zeros((64, 65, 3), np.uint8)).save(root / "large.png")
    (root / "damaged.png").write_bytes(b"\x00\xff garbage")
    for i, name in enumerate(("gone_1.png", "sol_0010/gone_2.png", "damaged.png", "large.png")):
        uri = str(root / name)
        try:
            decode_image(fetch_image(uri, 10**6), 64 * 64, uri)
        except ImageError as error:
            rows.append({"id": f"{images + i:032x}", "uri": uri, "status": error.status, "error": str(error)})
    assert len(rows) == images + FAILURES
    return rows


def labels(folder: Path, images: int = 16, size_px: int = 48, precision: float | None = None, finished: bool = True) -> Path:
    """A folder of labels whose masks are the scenes' own classes, open at the top where a precision is in use."""
    rows, rng = archive(folder.parent / "archive", images, size_px), np.random.default_rng(0)
    for i, row in enumerate(rows[:images]):
        mask_HW = scene(3, i, size_px)[1]
        if precision is not None:
            mask_HW[: size_px * i // (2 * images)] = IGNORE
        kept = mask_HW != IGNORE
        row |= {"mask_png": encode_mask(mask_HW), "confidence": float(rng.uniform(0.5, 1)), "abstained": float(1 - kept.mean())}
        row |= {"class_fractions": np.bincount(mask_HW[kept], minlength=N_CLASSES) / kept.sum(), "raysal_version": "0.1.0"}
    write(folder, labels_schema(S5MARS), "LabelImages", "labeled_at", rows, finished)
    reliability, val = evaluation()
    kept_for = None if precision is None else reliability.to_dict(S5MARS.classes, [precision])[0]
    if finished:
        (folder / TRUST).write_text(json.dumps({"model_digest": MODEL, "val": val, "kept": kept_for}))
    return folder


def scores(folder: Path, images: int = 12, size_px: int = 48, finished: bool = True) -> Path:
    """A folder of scores."""
    rows, rng = archive(folder.parent / "archive", images, size_px), np.random.default_rng(1)
    for i, row in enumerate(rows[:images]):
        shares = np.bincount(scene(3, i, size_px)[1].ravel(), minlength=N_CLASSES) / size_px**2
        row |= {name: float(rng.beta(2, 5)) for name in SCORES} | {"class_fractions": shares}
    write(folder, scores_schema(SCORES, 0, S5MARS), "ScoreImages", "scored_at", rows, finished)
    return folder


def write(folder: Path, schema: pa.Schema, kind: str, time: str, rows: list[dict], finished: bool, per_shard: int = 6) -> None:
    """Shards and markers, by the code that runs use."""
    output = Output(str(folder), schema, {"kind": kind, "model_digest": MODEL, "config_digest": "cd34" * 16})
    token = output.claim(replace=False)
    for start in range(0, len(rows), per_shard):
        part = [row | {time: START + timedelta(seconds=start), "model_digest": MODEL} for row in rows[start : start + per_shard]]
        table = pa.Table.from_pylist(part, schema=schema)
        write_table(str(folder / shard_name(table["id"].to_pylist(), token)), table)
    if finished:
        held = output.held()
        summary = Summary(len(rows), len(rows), 0, held.counts(), MODEL, "cd34" * 16, "eager float32", 12.5, len(rows) / 12.5, 25.0)
        output.commit(summary.to_dict(), held, token)


def evaluation() -> tuple[ClassReliability, dict]:
    """Counts of a made-up model on four scenes, surer where it is right; and the evaluation as a checkpoint carries it."""
    rng, reliability, calibration = np.random.default_rng(2), ClassReliability(N_CLASSES), Calibration()
    truth = np.stack([scene(3, 100 + i, 48)[1] for i in range(4)])
    confidence = rng.beta(4, 2, truth.shape).astype(np.float32)
    predicted = np.where(rng.random(truth.shape) < confidence, truth, rng.integers(0, N_CLASSES, truth.shape)).astype(np.uint8)
    reliability.add(predicted, confidence, truth)
    other = (1 - confidence[:, None]) / (N_CLASSES - 1)
    at_class = np.arange(N_CLASSES)[None, :, None, None] == predicted[:, None]
    calibration.add(np.where(at_class, np.maximum(confidence[:, None], other + 1e-3), other).astype(np.float32), truth)
    found = Evaluation(confusion(torch.from_numpy(predicted), torch.from_numpy(truth), N_CLASSES), calibration, reliability)
    return reliability, json.loads(json.dumps(found.to_dict(S5MARS.classes)))


def manifest(path: Path, rows: list[dict], **columns: list) -> str:
    """A manifest of rows with id and uri, and more columns."""
    table = [{"id": row["id"], "uri": row["uri"], **{k: v[i] for k, v in columns.items()}} for i, row in enumerate(rows)]
    write_table(str(path), pa.Table.from_pylist(table, schema=manifest_schema()))
    return str(path)


def png(side_px: int) -> bytes:
    """A small image file."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((side_px, side_px, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()
