"""A statement of trust with a set of masks: a few random images of it, labelled by people, say how good all of them are."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from raysal.archive.tables import read_table
from raysal.datasets.base import Dataset, Item
from raysal.errors import DataError, ImageError, InputError
from raysal.labels import IGNORE
from raysal.model.audit import estimate
from raysal.model.metrics import Calibration, ClassReliability, confusion
from raysal.model.runtime import Predictor
from raysal.query.rank import hash01
from raysal.stream.output import made_by

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
        items: Images that experts can be asked about; the draw is among those that are in `labels`, and so is what is estimated.
        learnt: Ids of labelled images that the model learnt from: no part of either.
        images: How many to draw; all where there are fewer.
        seed: Of the draw and the intervals.
        device: Where the model runs.
        on_progress: Called as on_progress(done, total) after each image.

    Returns:
        JSON-able: ``images`` (ids drawn), ``population`` (images that the estimates speak for), ``miou`` and ``iou`` by class as {value,
        low, high} (95%; null where too few audited images show the class), ``classes_known``, ``accuracy``, ``calibration``, and
        ``abstention``: how right the pixels are that reach the thresholds of the checkpoint's own evaluation.

    Raises:
        InputError: The masks are another model's, no image can be drawn, or `learnt` names fewer images than the model learnt from.
        DataError: Drawn images have no mask yet, or one can't be used.
    """
    predictor = Predictor.load(checkpoint, device, made_by(labels))  # by what made the masks, whatever is at hand now
    if (told := predictor.info.parents.get("labels") or 0) > len(learnt):
        raise InputError(f"{checkpoint} learnt from {told} labels, {len(learnt)} are named here; name all of them (--learnt)")
    ok, chosen = draw(labels, predictor.digest, items, learnt, images, seed)
    by_id = {item.id: item for item in items}
    if missing := [by_id[i].name for i in chosen if by_id[i].mask is None]:
        raise DataError(
            f"{len(missing)} of {len(chosen)} images of this audit have no mask yet: {', '.join(missing[:10])}"
            f"{' ...' if len(missing) > 10 else ''}; label them first (raysal audit --ask FILE writes all their names)"
        )

    label_set = predictor.info.label_set
    n = label_set.n_classes
    confusions, blanks = np.zeros((len(chosen), n, n)), np.zeros((len(chosen), n))
    calibration, reliability = Calibration(), ClassReliability(n)
    for k, id_ in enumerate(chosen):
        image_HWC, truth_HW, valid_HW = _read(dataset, by_id[id_])
        for piece in next(predictor.pieces([image_HWC])):
            part = piece.rows, piece.cols
            truth_BHW = torch.from_numpy(truth_HW[part])[None]
            confusions[k] += confusion(torch.from_numpy(piece.mask)[None], truth_BHW, n).numpy()
            blanks[k] += np.bincount(piece.mask[valid_HW[part] & (truth_HW[part] == IGNORE)], minlength=n)
            calibration.add(torch.from_numpy(piece.probabilities)[None], truth_BHW)
            reliability.add(piece.mask[None], piece.confidence[None], truth_BHW)
        if on_progress:
            on_progress(k + 1, len(chosen))
    predicted_C = sum(r["width"] * r["height"] * (1 - r["abstained"]) * np.asarray(r["class_fractions"], np.float64) for r in ok)
    miou, iou = estimate(confusions, blanks, predicted_C, len(ok), seed)
    total_CC = confusions.sum(0)
    return {
        "images": chosen,
        "population": len(ok),
        "classes_known": [c for c, e in zip(label_set.classes, iou, strict=True) if not math.isnan(e.value)],
        "miou": miou.to_dict(),
        "iou": {c: e.to_dict() for c, e in zip(label_set.classes, iou, strict=True)},
        "accuracy": round(float(total_CC.trace() / max(1.0, total_CC.sum())), 6),
        "calibration": calibration.to_dict(),
        "abstention": _at_thresholds(reliability, (predictor.info.parents.get("metrics") or {}).get("abstention") or [], label_set.classes),
        "model_digest": predictor.digest,
        "seed": seed,
    }


def draw(
    labels: str, digest: str, items: Sequence[Item], learnt: Collection[str], images: int, seed: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the table of masks that an audit speaks for, and the ids that it draws of them; more images continue the same draw.

    Raises:
        InputError: The masks are another model's, or no image can be drawn.
    """
    table = read_table(labels, COLUMNS)
    if others := set(table["model_digest"].to_pylist()) - {digest, None}:
        raise InputError(f"{labels}: masks of another model ({min(others)[:12]}) than the checkpoint ({digest[:12]}); give its own")
    asked = {item.id for item in items} - set(learnt)
    ok = sorted((r for r in table.to_pylist() if r["status"] == "ok" and r["id"] in asked), key=lambda r: r["id"])
    if not ok:
        raise InputError(f"{labels}: has no mask of an image that experts can be asked about and that was not learnt from")
    order = np.argsort(hash01(seed, [r["id"] for r in ok], "audit"), kind="stable")
    return ok, [ok[i]["id"] for i in order[:images]]


def _read(dataset: Dataset, item: Item) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        image_HWC = dataset.image(item)
    except ImageError as error:
        raise DataError(f"audited image {error}; restore the file, or take the image out of the pool") from error
    shape_HW = (image_HWC.shape[0], image_HWC.shape[1])
    return image_HWC, dataset.mask(item, shape_HW), dataset.valid(item, shape_HW)


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
