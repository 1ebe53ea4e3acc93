"""What is answered: masks as pictures, numbers as JSON."""

import base64
import io
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

import raysal
from raysal.images.masks import encode_mask
from raysal.images.rle import coco_rle
from raysal.labels import IGNORE
from raysal.serving.models import SCORES, Model
from raysal.serving.problems import Problem
from raysal.serving.service import MAPS, Done

VIEWS = ("index", "colour", *MAPS)
"""Pictures of an image that can be asked for: class ids, colours of classes, and maps of doubt."""

FORMS = ("image/png", "application/json", "application/zip")


def form_of(accept: str, several: bool) -> str:
    """The form of answer that a client likes best.

    Args:
        accept: The header; empty means any.
        several: Whether there are several images.

    Raises:
        Problem: 406 where none of what it likes exists.
    """
    offered = [f for f in (FORMS[1:] if several else FORMS[:2])]
    best, liked = "", 0.0
    for part in (accept or "*/*").lower().split(","):
        kind, *parameters = [p.strip() for p in part.split(";")]
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            weight = float(quality)
        except ValueError:
            weight = 0.0
        for form in offered:
            fits = kind in (form, "*/*", f"{form.split('/')[0]}/*")
            if fits and weight > liked:
                best, liked = form, weight
    if not best:
        raise Problem(406, f"Accept: {accept[:80]!r} asks for what is not made; valid: {', '.join(offered)}", "accept")
    return best


def wants_of(form: str, view: str) -> frozenset[str]:
    """What must be computed for a form and a view."""
    if form == "application/json":
        return frozenset({"mask", "scores"} | ({view} & {*MAPS}))
    return frozenset({view if view in MAPS else "mask"})


def picture(done: Done, view: str) -> bytes:
    """A PNG of the image's own size: class ids, colours, or a map from 0 to 255."""
    if view in MAPS:
        assert done.map_HW is not None
        return encode_mask((done.map_HW * 255 + 0.5).astype(np.uint8))
    assert done.mask is not None
    if view == "index":
        return encode_mask(done.mask.mask_HW)
    image = Image.fromarray(done.mask.mask_HW, "P")
    image.putpalette(done.model.predictor.info.label_set.palette().tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", transparency=IGNORE)
    return file.getvalue()


def numbers(done: Done) -> dict[str, Any]:
    """All that is known of an image, JSON-able; `coco_rle` describes the masks."""
    model, (height, width) = done.model, done.size_HW
    found: dict[str, Any] = {
        "name": done.name,
        "width": width,
        "height": height,
        "source_sha256": done.id,
        "model_digest": model.digest,
        "raysal_version": raysal.__version__,
        "runtime": model.runtime,
    }
    if (mask := done.mask) is not None:
        label_set, thresholds = model.predictor.info.label_set, model.masks.thresholds
        found["confidence"] = None if mask.confidence is None else rounded(mask.confidence)
        found["abstained"] = rounded(mask.abstained)
        found["precision"] = model.spec.precision
        found["classes"] = [
            {
                "id": c,
                "name": name,
                "color": list(label_set.colors[c]),
                "fraction": rounded(mask.class_fractions[c]),
                "threshold": thresholds[c] if thresholds else None,
                **(coco_rle(mask.mask_HW == c) if mask.class_fractions[c] > 0 else {"segmentation": None, "area": 0, "bbox": None}),
            }
            for c, name in enumerate(label_set.classes)
        ]
    if done.scores is not None:
        found["scores"] = {name: rounded(done.scores[name]) for name in SCORES}
    if done.map_HW is not None:
        found["map_png"] = base64.b64encode(encode_mask((done.map_HW * 255 + 0.5).astype(np.uint8))).decode()
    return found


def rounded(share: float) -> float:
    """Shares in answers have six digits: enough for a pixel in a million."""
    return round(float(share), 6)


def archive(names: Sequence[str], pictures: Sequence[bytes]) -> bytes:
    """A zip file of PNGs, in the order of the images; names that clash or that no file may have are numbered."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as zip_:
        for k, (name, data) in enumerate(zip(names, pictures, strict=True)):
            stem = name.replace("\\", "/").rpartition("/")[2].rpartition(".")[0] or "image"
            zip_.writestr(f"{k:03d}_{''.join(c if c.isalnum() or c in '-_.' else '_' for c in stem)[:80]}.png", data)
    return file.getvalue()


def model_card(model: Model) -> dict[str, Any]:
    """What the model says of itself."""
    info = model.predictor.info
    metrics = info.parents.get("metrics") or {}
    return {
        "digest": model.digest,
        "label_set": info.label_set.name,
        "classes": [
            {"id": c, "name": name, "color": list(color)}
            for c, (name, color) in enumerate(zip(info.label_set.classes, info.label_set.colors, strict=True))
        ],
        "ignore": IGNORE,
        "architecture": info.model.arch,
        "encoder": info.model.encoder,
        "input_scale": info.input_scale,
        "whole_pixels": info.model.whole_pixels,
        "tile_px": info.model.tile_px,
        "runtime": model.runtime,
        "precision": model.spec.precision,
        "thresholds": list(model.masks.thresholds) or None,
        "val_miou": metrics.get("miou"),
        "val_iou": metrics.get("iou"),
        "raysal_version": raysal.__version__,
    }
