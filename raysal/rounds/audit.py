"""A statement of trust with a set of masks: a few random images of it, labelled by people, say how good all of them are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from raysal.archive.tables import read_table
from raysal.datasets.base import Dataset, Item
from raysal.errors import DataError, ImageError, InputError
from raysal.model.audit import estimate
from raysal.model.metrics import Calibration, ClassReliability, confusion
from raysal.model.runtime import Predictor
from raysal.query.rank import hash01

COLUMNS = ["id", "status", "width", "height", "abstained", "class_fractions", "model_digest"]


def audit(
    checkpoint: str,
    labels: str,
    dataset: Dataset,
    items: Sequence[Item],
    learnt: Collection[str],
    images: int,
    seed: int,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Estimates the quality of masks on images that were not learnt from.

    Args:
        checkpoint: The model that made the masks.
        labels: The table of masks (see `raysal.archive.tables.labels_schema`).
        dataset: Reads images and the experts' masks.
        items: Images that experts can be asked about; the draw is among those that are in `labels`.
        learnt: Ids of labelled images that the model learnt from: no part of the draw or of what is estimated.
        images: How many to draw; all where there are fewer.
        seed: Of the draw and the intervals.
        device: Where the model runs.
        on_progress: Called as on_progress(done, total) after each image.

    Returns:
        JSON-able: ``images`` (ids drawn), ``population``, ``miou`` and ``iou`` by class as {value, low, high} (95%),
        ``accuracy``, ``calibration``, and ``abstention``: how right the pixels are that reach the thresholds of the checkpoint's own
        evaluation.

    Raises:
        InputError: The masks are another model's, or no image can be drawn.
        DataError: A drawn image has no mask, or it can't be used.
    """
    predictor = Predictor.load(checkpoint, device)
    table = read_table(labels, COLUMNS)
    if others := set(table["model_digest"].to_pylist()) - {predictor.digest, None}:
        raise InputError(f"{labels}: masks of another model ({min(others)[:12]}) than {checkpoint} ({predictor.digest[:12]}); give its own")
    ok = [r for r in table.to_pylist() if r["status"] == "ok" and r["id"] not in learnt]
    by_id = {item.id: item for item in items}
    ids = sorted(r["id"] for r in ok if r["id"] in by_id)
    if not ids:
        raise InputError(f"{labels}: has no mask of an image that experts can be asked about and that was not learnt from")
    chosen = [ids[i] for i in np.argsort(hash01(seed, ids, "audit"), kind="stable")[:images]]

    label_set = predictor.info.label_set
    n = label_set.n_classes
    confusions = np.zeros((len(chosen), n, n))
    calibration, reliability = Calibration(), ClassReliability(n)
    for k, id_ in enumerate(chosen):
        image_HWC, truth_HW = _read(dataset, by_id[id_])
        found = predictor.predict([image_HWC])
        truth_BHW = torch.from_numpy(truth_HW)[None]
        confusions[k] = confusion(torch.from_numpy(found.masks), truth_BHW, n).numpy()
        calibration.add(found.probabilities, truth_BHW)
        reliability.add(found.masks, found.confidence, truth_BHW)
        if on_progress:
            on_progress(k + 1, len(chosen))
    predicted_C = sum(r["width"] * r["height"] * (1 - r["abstained"]) * np.asarray(r["class_fractions"], np.float64) for r in ok)
    miou, iou = estimate(confusions, predicted_C, seed)
    total_CC = confusions.sum(0)
    return {
        "images": chosen,
        "population": len(ok),
        "miou": miou.to_dict(),
        "iou": {c: e.to_dict() for c, e in zip(label_set.classes, iou, strict=True)},
        "accuracy": round(float(total_CC.trace() / max(1.0, total_CC.sum())), 6),
        "calibration": calibration.to_dict(),
        "abstention": _at_thresholds(reliability, (predictor.info.parents.get("metrics") or {}).get("abstention") or [], label_set.classes),
        "model_digest": predictor.digest,
        "seed": seed,
    }


def _read(dataset: Dataset, item: Item) -> tuple[np.ndarray, np.ndarray]:
    try:
        image_HWC = dataset.image(item)
    except ImageError as error:
        raise DataError(f"audited image {error}; restore the file, or audit with another --seed") from error
    return image_HWC, dataset.mask(item, image_HWC.shape[:2])


def _at_thresholds(reliability: ClassReliability, settled: Sequence[dict], classes: Sequence[str]) -> list[dict]:
    """What the thresholds that were settled on val come to on the audited images."""
    all_pixels = int(reliability.counts[0].sum())
    found = []
    for entry in settled:
        at = reliability.at([entry["threshold"].get(c) for c in classes])
        kept, right = (sum(column) for column in zip(*at, strict=True))
        found.append(
            {
                "precision": entry["precision"],
                "threshold": entry["threshold"],
                "reached": {c: r / k if k else None for c, (k, r) in zip(classes, at, strict=True)},
                "reached_of_all": right / kept if kept else None,
                "kept_of_all": kept / max(1, all_pixels),
            }
        )
    return found
